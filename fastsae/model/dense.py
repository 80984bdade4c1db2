"""A threshold rule's loss over all of (N, M), in pieces of tokens: for steps in which many latents are active.

A dense product is then faster than gathering rows for a code. One pass computes the loss and all gradients, given the
weight of each part in the loss, so that no pre-act is computed twice; it stores both dictionaries' gradients. A
gradient of the error from another loss (one on the reconstruction, say) takes a second pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsae import reference
from fastsae.model.parameters import Parameters
from fastsae.ops.encode import infinite_as_nan
from fastsae.ops.gradients import weighted_rows
from fastsae.ops.sums import fixed_sum, sum_of_squares
from fastsae.reference import wide

PIECE = 2**23
"""Entries of (N, M) in one piece; about five buffers of this size exist at a time."""
SAMPLED_TOKENS = 64
"""Tokens on which the first step estimates the share of active latents."""


@dataclass(eq=False)
class DenseTask:
    """A pass's inputs that are not tensors, and its results that are not differentiable.

    losses by name; squares: sum of the squared errors; counts (M,) int64: on how many tokens each latent was active;
    selected: how many pre-acts the rule considers. The backward pass holds it, so it must not hold the loss.
    """

    sae: Parameters
    centred: bool
    weight: Tensor
    names: list[str]
    losses: dict[str, Tensor] = field(default_factory=dict)
    squares: Any = None
    counts: Any = None
    selected: Any = None


def objective(
    sae: Parameters, x: Tensor, goal: Tensor, gate_goal: Tensor, centred: bool, denominator: Any, weight: Tensor
) -> tuple[Tensor, Tensor, DenseTask]:
    """The loss of reconstructing goal (N, D_out) from the encoder's input x (N, D_in), and gate_goal from the gate.

    Returns the loss, 0-d float64, and the error (N, D_out), both differentiable, and the other results of the pass.
    centred: b_dec was subtracted from x and the goals, without a gradient to it, and is not added to A W_dec.
    weight: the penalty's weight in the loss, 0-d.
    """
    task = DenseTask(sae, centred, weight.detach(), list(sae.rule_parameters))
    denominator = torch.as_tensor(denominator, dtype=torch.float64, device=x.device)
    total, error = _Dense.apply(
        infinite_as_nan(x),
        goal,
        gate_goal,
        denominator,
        sae.W_enc,
        sae.W_dec,
        sae.b_enc,
        sae.b_dec,
        task,
        *sae.rule_parameters.values(),
    )
    return total, error, task


class _Pass:
    """One pass over all pieces; `grads`: the accumulated gradients, by name."""

    def __init__(self, task: DenseTask, x: Tensor, wants_x: bool):
        sae = task.sae
        self.task, self.rule, self.x = task, sae.rule, wide(x)
        self.W_dec, self.W_enc, self.b_enc = (wide(t.detach()) for t in (sae.W_dec, sae.encoder_weight, sae.b_enc))
        self.bias = None if task.centred else wide(sae.b_dec.detach())
        named = {"b_enc": self.b_enc, **sae.rule_parameters}
        self.leaves = {name: t.detach().requires_grad_() for name, t in named.items()}
        self.norms = reference.decoder_norms(self.W_dec, sae.layers).requires_grad_()
        self.leaves["norms"] = self.norms
        self.dW_enc, self.dW_dec = torch.zeros_like(self.W_enc), torch.zeros_like(self.W_dec)
        self.dpre = torch.zeros_like(self.b_enc)
        self.dx = torch.empty_like(self.x) if wants_x else None
        self.grads = {name: torch.zeros_like(t) for name, t in self.leaves.items()}

    def pieces(self) -> Iterator[slice]:
        size, n = max(1, PIECE // self.task.sae.d_sae), self.x.shape[0]
        return (slice(start, min(start + size, n)) for start in range(0, n, size))

    def rows(self) -> dict[str, Tensor]:
        return {name: t.unsqueeze(0) for name, t in self.rule.per_latent(self.leaves).items()}

    def pre_acts(self, here: slice) -> Tensor:
        return torch.addmm(self.b_enc, self.x[here], self.W_enc.mT).requires_grad_()

    def missed(self, acts: Tensor, goal: Tensor) -> Tensor:
        """recon - goal of a piece."""
        missed = acts.detach() @ self.W_dec - goal
        return missed if self.bias is None else missed.add_(self.bias)

    def backward(self, here: slice, z: Tensor, acts: Tensor, g: Tensor, more: list[tuple[Tensor, Tensor]]) -> None:
        """Adds the gradients of a piece. g = dL/d recon; more: (output, dL/d output) of everything else in the loss."""
        ends, slopes = zip((acts, g.to(acts.dtype) @ self.W_dec.mT), *more, strict=True)
        wanted = {"z": z, **self.leaves}
        found = torch.autograd.grad(ends, list(wanted.values()), slopes, allow_unused=True)
        dz = torch.zeros_like(z) if found[0] is None else found[0]
        for (name, total), grad in zip(self.grads.items(), found[1:], strict=True):
            if grad is not None:
                self.grads[name] = total + grad
        self.dW_dec.addmm_(acts.detach().mT.to(g.dtype), g)
        self.dW_enc.addmm_(dz.mT, self.x[here])
        self.dpre += dz.sum(0)
        if self.dx is not None:
            self.dx[here] = dz @ self.W_enc

    def finish(self, error_grad: Tensor) -> dict[str, Tensor | None]:
        """All gradients by parameter; error_grad (N, D_out): dL/d recon, whose sum is b_dec's."""
        sae, norms = self.task.sae, self.grads.pop("norms")
        if self.rule.needs_norms:
            segments = self.W_dec.unflatten(1, (sae.layers, -1))
            each = torch.linalg.vector_norm(segments, dim=-1)
            pull = norms[:, None] / torch.where(each > 0, each, torch.inf)
            self.dW_dec += (pull[..., None] * segments).flatten(1)
        b_dec = error_grad.sum(0)
        if sae.pre_bias:
            b_dec = b_dec - weighted_rows(self.dpre, self.W_enc)
        if sae.tied:
            self.dW_dec += self.dW_enc
        by_rule = self.grads.pop("b_enc")
        return {
            "x": self.dx, "W_enc": None if sae.tied else self.dW_enc, "W_dec": self.dW_dec,
            "b_enc": self.dpre + by_rule, "b_dec": b_dec, **self.grads,
        }  # fmt: skip


@dataclass(eq=False)
class _Found:
    """total: 0-d float64; error and gate_grad = dL/d (gate's recon), or None, (N, D_out); squares: of both errors;
    grads: dL/d each input, by name."""

    total: Tensor
    error: Tensor
    gate_grad: Tensor | None
    squares: Tensor
    grads: dict[str, Tensor | None]


def _whole_pass(
    task: DenseTask, x: Tensor, goal: Tensor, gate_goal: Tensor, denominator: Tensor, wants_x: bool
) -> _Found:  # fmt: skip
    """The loss and all of its gradients; the other results are stored in the task."""
    run = _Pass(task, x, wants_x)
    rule, n = run.rule, x.shape[0]
    error = torch.empty_like(goal)
    gate_grad: Tensor | None = None
    task.counts = torch.zeros_like(task.sae.fired)
    squares, gate_squares, sparse, selected = (x.new_zeros((), dtype=torch.float64) for _ in range(4))
    slope = task.weight * _penalty_slope(run)
    for here in run.pieces():
        z = run.pre_acts(here)
        with torch.enable_grad():
            rows = run.rows()
            acts = rule.activate(z, rows)
            sparsity = rule.sparsity(z, acts, rows, run.norms.unsqueeze(0))
            mean = None if sparsity is None else fixed_sum(sparsity) / n
            gate = rule.gate(z)
        missed = run.missed(acts, wide(goal[here]))
        error[here] = missed
        squares += sum_of_squares(missed)
        more = []
        if mean is not None:
            more.append((mean, slope.to(mean.dtype)))
            sparse += mean.detach()
        if gate is not None:
            off = run.missed(gate, wide(gate_goal[here]))
            gate_squares += sum_of_squares(off)
            off = off.mul_(2 / denominator)
            more.append((gate, off.to(gate.dtype) @ run.W_dec.mT))
            gate_grad = torch.empty_like(gate_goal) if gate_grad is None else gate_grad
            gate_grad[here] = off
        run.backward(here, z, acts, missed.mul_(2 / denominator), more)
        task.counts += _column_counts(acts.detach() != 0)
        selected += _column_counts(rule.considered(z.detach(), rows)).sum()
    task.squares, task.selected = squares, selected
    total = squares / denominator
    if rule.penalizes:
        task.losses["sparsity"] = rule.penalty(sparse)
        total = total + task.weight * task.losses["sparsity"]
    if gate_grad is not None:
        task.losses["gate"] = gate_squares / denominator
        total = total + task.losses["gate"]
    return _Found(total, error, gate_grad, squares + gate_squares, run.finish(wide(error) * (2 / denominator)))


def _column_counts(mask: Tensor) -> Tensor:
    """How often each column of a bool (N, M) is true: int64 (M,). torch would first make int64 of all of the mask."""
    parts = [rows.sum(0, dtype=torch.uint8) for rows in mask.view(torch.uint8).split(255)]
    return torch.stack(parts).sum(0)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, goal: Tensor, gate_goal: Tensor, denominator: Tensor, W_enc: Tensor | None, W_dec: Tensor,
        b_enc: Tensor, b_dec: Tensor, task: DenseTask, *rule_parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        found = _whole_pass(task, x, goal, gate_goal, denominator, ctx.needs_input_grad[0])
        ctx.set_materialize_grads(False)
        # The weights are saved so that torch detects a write to them before the backward pass.
        ctx.save_for_backward(x, goal, gate_goal, denominator, found.error, found.gate_grad, W_dec, W_enc)
        ctx.task, ctx.squares, ctx.grads = task, found.squares, found.grads
        return found.total, found.error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        of_total, of_error = upstream
        x, goal, gate_goal, denominator, error, gate_grad, *_ = ctx.saved_tensors
        task, needs = ctx.task, ctx.needs_input_grad
        names = ["x", "W_enc", "W_dec", "b_enc", "b_dec", *task.names]
        found: dict[str, Tensor | None] = dict.fromkeys(names)
        dgoal = dgate = ddenominator = None
        if of_total is not None:
            # The gradients are returned without a copy; a second backward pass computes them again.
            found = ctx.grads or _whole_pass(task, x, goal, gate_goal, denominator, needs[0]).grads
            ctx.grads = None
            if of_total.device.type != "cpu" or float(of_total) != 1:
                found = {name: None if g is None else g.mul_(of_total) for name, g in found.items()}
            dgoal = error * (-2 * of_total / denominator) if needs[1] else None
            dgate = gate_grad * -of_total if needs[2] and gate_grad is not None else None
            ddenominator = -of_total * ctx.squares / denominator.square()
        if of_error is not None:
            more = _of_error(task, x, wide(of_error), needs[0])
            found = {name: _sum(found[name], more[name]) for name in names}
            dgoal = _sum(dgoal, -of_error)
        grads = [found[name] for name in names]
        dx, rest = grads[0], grads[1:]
        return dx, dgoal if needs[1] else None, dgate, ddenominator if needs[3] else None, *rest[:4], None, *rest[4:]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _of_error(task: DenseTask, x: Tensor, grad: Tensor, wants_x: bool) -> dict[str, Tensor | None]:
    """The gradients of Σ grad · error alone."""
    run = _Pass(task, x, wants_x)
    for here in run.pieces():
        z = run.pre_acts(here)
        with torch.enable_grad():
            acts = run.rule.activate(z, run.rows())
        run.backward(here, z, acts, grad[here], [])
    return run.finish(grad)


def _penalty_slope(run: _Pass) -> Tensor | float:
    """d penalty / d mean, at the mean of this batch. If it is not always 1, the mean costs an extra encoder pass."""
    if run.rule.penalty_is_mean:
        return 1.0
    mean = torch.zeros((), dtype=torch.float64, device=run.x.device)
    rows = run.rows()
    for here in run.pieces():
        z = run.pre_acts(here).detach()
        sparsity = run.rule.sparsity(z, run.rule.activate(z, rows), rows, run.norms.unsqueeze(0))
        assert sparsity is not None
        mean += sparsity.detach().sum() / run.x.shape[0]
    mean.requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(run.rule.penalty(mean), mean)[0]


@torch.no_grad()
def sampled_share(sae: Parameters, x: Tensor) -> float:
    """The share of pre-acts that the rule considers, on SAMPLED_TOKENS tokens spread over x (N, D); a host sync."""
    some = x[:: max(1, x.shape[0] // SAMPLED_TOKENS)][:SAMPLED_TOKENS]
    z = torch.addmm(wide(sae.b_enc), wide(some), wide(sae.encoder_weight).mT)
    rows = {name: t.unsqueeze(0) for name, t in sae.rule.per_latent(sae.rule_state).items()}
    return float(sae.rule.considered(z, rows).double().mean())
