"""squared_errors: the squared errors of nested reconstructions, forward and backward, for every loss of the family.

e_j = Σ_{i ≤ j} A_i W + bias - goal,    L = Σ_j weight_j ‖e_j‖²

dL/d e_j = 2 weight_j e_j,    G_j = Σ_{i ≥ j} dL/d e_i,    dA_j = ⟨G_j, W⟩|active,    dW = Σ_j A_jᵀ G_j,
dgoal = -G_1,    dbias = Σ_n G_1
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae.codes import SparseCodes
from fastsae.ops import ledger as ledgers
from fastsae.ops.products import decode, decode_error
from fastsae.ops.sums import sum_of_squares, total
from fastsae.reference import wide

_raw = torch.ops.fastsae


class SquaredErrors(NamedTuple):
    """weighted: Σ_j weight_j ‖e_j‖²; last: ‖e‖² of the last, 0-d float64; error: the last e (N, D), in W's dtype."""

    weighted: Tensor
    last: Tensor
    error: Tensor


def squared_errors(
    parts: Sequence[tuple[SparseCodes, float]],
    W: Tensor,
    goal: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    centred: bool = False,
    start: Tensor | None = None,
    overwrite: bool = False,
    shards: Callable[[Tensor], Tensor] | None = None,
    backend: str | None = None,
) -> SquaredErrors:
    """The squared errors of the reconstructions that parts, codes of N tokens with their weights, add up to.

    W (M, D), goal (N, D), bias (D,). centred: bias is already subtracted from goal (without a gradient to it), so it is
    not added. start (N, D): replaces bias - goal, which are then left out.
    While a ledger is open for W, the gradient is kept as terms. overwrite: the backward pass may overwrite the error,
    which saves (N, D) numbers; the caller must then read `error` before it.
    shards: W is a part of a dictionary, and this function sums what all parts give; no second derivatives then.
    Differentiable in acts, W, goal, bias and start; without a ledger any number of times.
    """
    ledger = ledgers.open_ledger(W_dec=W, **({} if bias is None else {"b_dec": bias}))
    frozen = not W.requires_grad and any(part.acts.requires_grad for part, _ in parts)
    frozen = frozen and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if ledger is None and not frozen and shards is None:
        return _composed(parts, W, goal, bias, centred, start, backend)
    flat = [part.flatten() for part, _ in parts]
    plan = _Plan(
        [part.detach() for part in flat], [weight for _, weight in parts], [part.encoded for part in flat], ledger,
        centred, overwrite, shards, backend,
    )  # fmt: skip
    return SquaredErrors(*_SquaredErrors.apply(W, goal, bias, start, plan, *[part.acts for part in flat]))


def _composed(
    parts: Sequence[tuple[SparseCodes, float]],
    W: Tensor,
    goal: Tensor | None,
    bias: Tensor | None,
    centred: bool,
    start: Tensor | None,
    backend: str | None,
) -> SquaredErrors:
    """The same composed of differentiable ops."""
    error = start
    sums = []
    for codes, _ in parts:
        recon = decode(codes.flatten(), W, backend=backend)
        if error is None:
            assert goal is not None
            recon = recon if bias is None or centred else recon + bias
            error = recon - goal
        else:
            error = error + recon
        sums.append(total(wide(error).square().sum(-1).double()))
    assert error is not None
    weighted = [weight * squares for (_, weight), squares in zip(parts, sums, strict=True)]
    return SquaredErrors(weighted[0] if len(sums) == 1 else torch.stack(weighted).sum(), sums[-1], error)


@dataclass(eq=False)
class _Plan:
    parts: list[SparseCodes]
    weights: list[float]
    encoded: list[Any]
    ledger: ledgers.Ledger | None
    centred: bool
    overwrite: bool
    shards: Callable[[Tensor], Tensor] | None
    backend: str | None
    spent: bool = False


class _SquaredErrors(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, W: Tensor, goal: Tensor | None, bias: Tensor | None, start: Tensor | None, plan: _Plan, *acts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        errors, sums = _errors(W, goal, bias, start, plan)
        ctx.save_for_backward(W, goal, bias, start, *acts, *errors)
        ctx.plan = plan
        weighted = [weight * squares for weight, squares in zip(plan.weights, sums, strict=True)]
        return weighted[0] if len(sums) == 1 else torch.stack(weighted).sum(), sums[-1].clone(), errors[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        plan, needs = ctx.plan, ctx.needs_input_grad
        W, goal, bias, start, *rest = ctx.saved_tensors
        acts, errors = rest[: len(plan.parts)], rest[len(plan.parts) :]
        if torch.is_grad_enabled():
            if plan.shards is not None:
                raise RuntimeError("a sharded SAE has no second derivatives; leave create_graph=True out")
            return _differentiable_backward(plan, needs, (W, goal, bias, start, *acts), grads)
        if plan.spent:
            errors = _errors(W, goal, bias, start, plan)[0]
        slopes = _slopes(errors, plan, grads, in_place=plan.overwrite and not plan.spent)
        plan.spent = plan.overwrite
        ledger = plan.ledger if ledgers.keeps(plan.ledger, plan.encoded, bias is not None) else None
        dacts: list[Tensor | None] = []
        dW: Tensor | None = None
        for j, (part, slope) in enumerate(zip(plan.parts, slopes, strict=True)):
            code = replace(part, acts=acts[j])
            dact = None
            if needs[0] or needs[5 + j]:
                has_bias = j == 0 and bias is not None
                dact = ledgers.decoded_backward(code, slope, W, ledger, plan.encoded[j], has_bias, plan.backend)
            dacts.append(dact if needs[5 + j] else None)
            if ledger is None and needs[0]:
                more = _raw.active_outer(code.acts, part.indices, part.offsets, slope, W.shape[0], None, plan.backend)
                dW = more if dW is None else dW + more
        whole = slopes[0]
        dgoal = -whole if needs[1] and start is None else None
        dbias = whole.sum(0) if needs[2] and ledger is None else None
        return dW, dgoal, dbias, whole if needs[3] else None, None, *dacts


def _differentiable_backward(
    plan: _Plan, needs: Sequence[bool], inputs: tuple[Any, ...], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients as functions of inputs and grads, for a second derivative: by the composed way."""
    # Aliases, because goal may be what the acts were made from: a gradient of goal is not to flow through them.
    inputs = tuple(None if t is None else t.view_as(t) for t in inputs)
    W, goal, bias, start, *acts = inputs
    if plan.centred and bias is not None and goal is not None:
        goal = goal + bias.detach()
    parts = [(replace(part, acts=a), w) for part, a, w in zip(plan.parts, acts, plan.weights, strict=True)]
    found = _composed(parts, W, goal, bias, False, start, plan.backend)
    ends = [(end, grad) for end, grad in zip(found, grads, strict=True) if grad is not None]
    places = [0, 1, 2, 3, *range(5, 5 + len(acts))]  # the plan stands between them
    wanted = [t for t, place in zip(inputs, places, strict=True) if needs[place]]
    got = iter(
        torch.autograd.grad(
            [end for end, _ in ends], wanted, [grad for _, grad in ends], create_graph=True, allow_unused=True
        )
    )
    found_grads = [next(got) if needs[place] else None for place in places]
    return (*found_grads[:4], None, *found_grads[4:])


def _errors(
    W: Tensor, goal: Tensor | None, bias: Tensor | None, start: Tensor | None, plan: _Plan
) -> tuple[list[Tensor], list[Tensor]]:
    """Every error (N, D), and its sum of squares."""
    errors: list[Tensor] = []
    sums: list[Tensor] = []
    with torch.no_grad():
        for part in plan.parts:
            before = errors[-1] if errors else start
            if before is None:
                assert goal is not None
                added = None if bias is None or plan.centred else bias.detach()
                if plan.shards is None:
                    error, rows = decode_error(part, W.detach(), goal, added, backend=plan.backend)
                    sums.append(total(rows))
                    errors.append(error)
                    continue
                before = -goal if added is None else added - goal
            error = decode(part, W.detach(), backend=plan.backend)
            error = (error if plan.shards is None else plan.shards(error)).add_(before)
            sums.append(sum_of_squares(error))
            errors.append(error)
    return errors, sums


def _slopes(errors: list[Tensor], plan: _Plan, grads: tuple[Tensor | None, ...], in_place: bool) -> list[Tensor]:
    """G_j of every part: the gradient of all reconstructions that it is in."""
    of_weighted, of_last, of_error = grads
    # Copy if the caller's own tensor would be kept.
    alone = of_weighted is None and of_last is None
    whole, slopes = of_error.clone() if alone and of_error is not None else of_error, []
    for j in reversed(range(len(errors))):
        scale: Tensor | float = 0.0 if of_weighted is None else 2 * plan.weights[j] * of_weighted
        if j == len(errors) - 1 and of_last is not None:
            scale = scale + 2 * of_last
        if isinstance(scale, Tensor):
            # .data: an own version counter, since the error is one of this function's outputs
            grad = errors[j].data.mul_(scale) if in_place else errors[j] * scale
            whole = grad if whole is None else grad.add_(whole)
        elif whole is None:
            whole = torch.zeros_like(errors[j])
        slopes.append(whole)
    return slopes[::-1]
