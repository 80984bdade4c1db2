"""The forward pass and the loss of a fused step, up to what `update_latents_` takes: terms, and what adds to them.

Three passes give the same numbers up to rounding. `selected_pass`: rules that fix how many latents are active; the
update computes the acts' gradients itself. `shaped_pass`: rules with a penalty or an activation of their own; the chain
from pre-acts to acts and penalty is differentiated by autograd over the slots of the code, nnz numbers. `dense_pass`:
the same over (N, M), piece by piece, for when so many latents are active that gathering them costs more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastsae import ops, reference
from fastsae.codes import SparseCodes, UpdateTerm
from fastsae.model import losses
from fastsae.model.rules import Activation, EncodeOptions
from fastsae.model.sae import SparseAutoencoder
from fastsae.ops.backward import per_latent
from fastsae.reference import wide

OFF = -1e4
"""The pre-act of a slot that no token owns: below every threshold, and finite."""


@dataclass(frozen=True)
class Task:
    """What a pass works on: x (N, D_in) of the encoder, goal (N, D_out) less what is not the latents' to explain.

    bias: what is added to A W_dec before comparing, None for nothing; over: what a squared error is divided by.
    """

    sae: SparseAutoencoder
    x: Tensor
    goal: Tensor
    bias: Tensor | None
    over: Tensor | int
    how: EncodeOptions
    outer: Callable[[Tensor], Tensor] | None = None
    """From the final error: the gradient of losses that lie behind the reconstruction (N, D_out)."""

    @property
    def rule(self) -> Activation:
        return self.sae.rule

    @property
    def n(self) -> int:
        return self.x.shape[0]

    def slope(self) -> Tensor:
        """The weight of the penalty in the loss, 0-d float64."""
        return self.rule.coef * self.sae.penalty_scale


@dataclass
class Pass:
    """What a pass found.

    error (N, D_out) = recon - target at the end; errors: after each part, with its weight (the last is `error`).
    active: 0-d int64, active latents in all; counts (M,) int64: how often each was. selected: the pre-acts looked at,
    where that is known. parts: the codes whose errors these are. rule_grads: of the rule's parameters, by name; adds:
    what else `update_latents_` takes, by its names.
    """

    error: Tensor
    squares: Tensor
    errors: list[tuple[Tensor, float]]
    parts: list[SparseCodes]
    active: Tensor
    counts: Tensor
    codes: SparseCodes | None = None
    selected: Tensor | None = None
    redone: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    total: Tensor | float = 0.0
    outer_grad: Tensor | None = None
    dacts: Tensor | None = None
    rule_grads: dict[str, Tensor] = field(default_factory=dict)
    adds: dict[str, Any] = field(default_factory=dict)


def selected_pass(task: Task) -> Pass:
    """For rules whose acts are their pre-acts and who penalise nothing."""
    sae, rule, backend = task.sae, task.rule, task.how.backend
    codes, _ = rule.select(task.x, sae.encoder_weight, sae.b_enc, sae.rule_state, True, task.how)
    parts = rule.parts(codes, sae.rule_state)
    errors: list[tuple[Tensor, float]] = []
    sums: list[Tensor] = []
    for part, weight in parts:
        if not errors:
            error, rows = ops.decode_error(part, sae.W_dec, task.goal, task.bias, backend=backend)
            squares = losses.total(rows)
        else:
            error = ops.decode(part, sae.W_dec, backend=backend).add_(errors[-1][0])
            squares = losses.sum_of_squares(error)
        errors.append((error, weight))
        sums.append(squares)
    total, named = sums[0] / task.over, {}
    if len(sums) > 1:
        total = torch.stack([weight * s for (_, weight), s in zip(errors, sums, strict=True)]).sum() / task.over
        named["nested"] = total
    return Pass(
        error=errors[-1][0], squares=sums[-1], errors=errors, parts=[part for part, _ in parts], active=codes.nnz,
        counts=sae.counts_of(codes), codes=codes, redone=codes.redone, losses=named, total=total,
        outer_grad=outer_of(task, errors[-1][0]),
    )  # fmt: skip


def shaped_pass(task: Task, pre: SparseCodes) -> Pass:
    """For rules with a penalty or an activation of their own, from their pre-acts (ragged, see `Activation.select`)."""
    sae, rule, backend = task.sae, task.rule, task.how.backend
    z = wide(pre.acts).detach().requires_grad_()
    leaves = leaves_of(sae)
    norms = reference.decoder_norms(wide(sae.W_dec), sae.layers).requires_grad_() if rule.needs_norms else None
    with torch.enable_grad():
        rows = {name: per_latent(t, pre, backend) for name, t in rule.per_latent(leaves).items()}
        weights = z.new_ones(()) if norms is None else per_latent(norms, pre, backend)
        acts = rule.activate(z, rows)
        sparsity = rule.sparsity(z, acts, rows, weights)
        penalty = None if sparsity is None else rule.penalty(losses.fixed_sum(sparsity) / task.n)
        gate = rule.gate(z)
    code = replace(pre, acts=acts.detach().to(pre.acts.dtype))
    error, sums = ops.decode_error(code, sae.W_dec, task.goal, task.bias, backend=backend)
    squares = losses.total(sums)
    found = Pass(
        error=error, squares=squares, errors=[(error, 1.0)], parts=[code], active=(code.acts != 0).sum(),
        counts=sae.counts_of(code), selected=code.nnz, codes=code, redone=code.redone, total=squares / task.over,
        outer_grad=outer_of(task, error),
    )  # fmt: skip
    ends, slopes = [acts], [_dot(task, error, code, found.outer_grad).to(acts.dtype)]
    if penalty is not None:
        ends.append(penalty)
        slopes.append(task.slope().to(penalty.dtype))
        found.losses["sparsity"] = penalty.detach().double()
        found.total = found.total + task.slope() * found.losses["sparsity"]
    if gate is not None:
        gate_code = replace(pre, acts=gate.detach().to(pre.acts.dtype))
        gate_error, sums = ops.decode_error(gate_code, sae.W_dec, task.goal, task.bias, backend=backend)
        ends.append(gate)
        slopes.append(_dot(task, gate_error, gate_code).to(gate.dtype))
        found.losses["gate"] = losses.total(sums) / task.over
        found.total = found.total + found.losses["gate"]
        found.adds["gate_error"] = gate_error
    wanted = {"z": z, **leaves, **({} if norms is None else {"norms": norms})}
    grads = gradients_of(ends, slopes, wanted)
    found.dacts = grads.pop("z").to(pre.acts.dtype)
    sort_out(found, task, grads)
    return found


def leaves_of(sae: SparseAutoencoder) -> dict[str, Tensor]:
    """The rule's parameters and b_enc, apart from the module's graph."""
    named = {"b_enc": wide(sae.b_enc), **sae.rule_parameters}
    return {name: t.detach().requires_grad_() for name, t in named.items()}


def gradients_of(ends: list[Tensor], slopes: list[Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    grads = torch.autograd.grad(ends, list(wanted.values()), slopes, allow_unused=True)
    return {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(wanted.items(), grads, strict=True)}


def _dot(task: Task, error: Tensor, code: SparseCodes, more: Tensor | None = None) -> Tensor:
    """⟨dL/d recon, W_dec_i⟩ at the slots; more (N, D_out): a gradient besides that of the squared error."""
    if more is not None:
        grad = error * (2 / task.over) + more
        return wide(ops.active_dot(grad, code, task.sae.W_dec, backend=task.how.backend))
    dots = ops.active_dot(error, code, task.sae.W_dec, backend=task.how.backend)
    return wide(dots) * (2 / task.over)


def outer_of(task: Task, error: Tensor) -> Tensor | None:
    return None if task.outer is None else task.outer(error)


def sort_out(found: Pass, task: Task, grads: dict[str, Tensor]) -> None:
    """b_enc's and the decoder norms' gradients go to the update, the others to their owners."""
    sae = task.sae
    b_enc, norms = grads.pop("b_enc"), grads.pop("norms", None)
    if "b_enc" in task.rule.per_latent(sae.rule_state):
        found.adds["db_enc"] = b_enc
    if norms is not None:
        each = torch.linalg.vector_norm(wide(sae.W_dec).unflatten(-1, (sae.layers, -1)), dim=-1)
        found.adds["decoder_pull"] = norms[:, None] / torch.where(each > 0, each, torch.inf)
    found.rule_grads = grads


def pre_acts_with_room(task: Task, capacity: int) -> tuple[SparseCodes, Tensor]:
    """A threshold rule's pre-acts in at most `capacity` slots, and whether that was too few (0-d bool)."""
    sae = task.sae
    codes, overflow = task.rule.select(
        task.x, sae.encoder_weight, sae.b_enc, sae.rule_state, True, task.how, capacity=capacity
    )
    assert overflow is not None
    return (codes.trimmed() if codes.acts.device.type == "cpu" else codes.masked(OFF)), overflow


def close(task: Task, found: Pass) -> tuple[list[UpdateTerm], Tensor]:
    """The update's terms, and the gradient of the reconstruction (N, D_out), Σ over parts.

    Part j's latents are in every reconstruction from the j-th on, so theirs is the sum of those errors' gradients. Each
    error becomes its gradient in place.
    """
    whole: Tensor | None = found.outer_grad
    slopes: list[Tensor] = []
    for error, weight in reversed(found.errors):
        grad = error.mul_(2 * weight / task.over)
        whole = grad if whole is None else grad.add_(whole)
        slopes.append(whole)
    assert whole is not None
    terms = [
        UpdateTerm(part.flatten(), task.x, grad, has_bias=j == 0, dacts=found.dacts)
        for j, (part, grad) in enumerate(zip(found.parts, reversed(slopes), strict=True))
    ]
    return terms, whole
