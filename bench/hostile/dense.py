"""The truth of a module's forward pass and of a training step: fastsae.reference and autograd in float64, dense.

Rounding may change which latents are active, and a small change of a gradient may turn a step. So a result is held
against what the truth makes of inputs that are off by rounding: it must lie between the least and the largest of these,
or as near to them as they are to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.hostile.calls import Draw
from bench.hostile.truth import Wrong, roundoff
from fastsae import SparseAutoencoder, reference
from fastsae.model import losses
from fastsae.training.batch import SAEBatch

Tensors = dict[str, Tensor]
ATTEMPTS = 60
"""Sets of inputs off by rounding before a result is wrong."""
MODERATE = 1e4
"""Larger numbers have squares that may not fit float32, or the sums of them; there is no truth then."""


def moderate(t: Tensor) -> Tensor:
    """Which rows of t (*batch, D) have a truth: bool (N,)."""
    flat = t.detach().reshape(-1, t.shape[-1]).double()
    return (flat.isfinite() & (flat.abs() < MODERATE)).all(-1)


def divides(loss: str, goal: Tensor) -> bool:
    """Whether a loss of these rows (N, D) has a truth: fvu divides by their variance, which of one row repeated is
    rounding, and by nothing then.
    """
    spread = (goal - goal.mean(0)).square().sum()
    return loss != "fvu" or bool(spread > 1e-12 * goal.square().sum())


@dataclass
class Before:
    """What a module held before a call, in float64 where it is floating."""

    params: Tensors
    buffers: Tensors

    @staticmethod
    def of(module: torch.nn.Module) -> Before:
        def wide(named: Any) -> Tensors:
            return {n: t.detach().to(torch.float64 if t.is_floating_point() else t.dtype, copy=True) for n, t in named}

        return Before(wide(module.named_parameters()), wide(module.named_buffers()))


def forward(
    sae: SparseAutoencoder, before: Before, p: Mapping[str, Tensor], x: Tensor, target: Tensor | None
) -> Tensors:
    """loss, its parts, A and recon of x (N, d_in), as sae(x, target) gives them. p: the parameters; before: buffers."""
    shift, scale = x.new_zeros(()), x.new_ones(())
    if sae.norm.mode == "constant":
        scale = before.buffers["norm.scale"]
    elif sae.norm.mode == "layer_norm":
        shift = x.mean(-1, keepdim=True)
        scale = ((x - shift).square().mean(-1, keepdim=True) + 1e-5).sqrt()
    normal = (x - shift) / scale
    goal = normal if target is None else (target - shift) / scale
    state = {name: p[name] if name in p else before.buffers[name] for name in sae.rule_state}
    out = reference.forward(
        p, normal, sae.rule, state, target=goal, pre_bias=sae.pre_bias, loss=sae.loss, layers=sae.layers,
        training=sae.training,
    )  # fmt: skip
    found = {**out.losses, "A": out.A, "recon": out.recon * scale + shift}
    if not sae.training or (sae.aux_k is None and sae.ghost is None):
        return found
    n = x.shape[0]
    seen = before.buffers["tokens_since_fired"]
    dead = torch.where((out.A != 0).any(0), 0, seen + n) >= sae.dead_after
    error = (out.recon - goal).detach()
    denominator: Any = max(n, 1) if sae.loss == "mse" else (goal - goal.mean(0)).square().sum()
    inputs = normal - p["b_dec"] if sae.pre_bias else normal
    W_enc, W_dec = p.get("W_enc", p["W_dec"]), p["W_dec"]
    if sae.aux_k is not None:
        A = reference.keep_top_k(torch.where(dead, inputs @ W_enc.mT + p["b_enc"], 0), sae.aux_k)
        share = (dead.sum().double() / sae.aux_k).clamp(max=1.0)
        found["aux"] = share * (A @ W_dec + error).square().sum() / denominator
        return found | {"loss": found["loss"] + sae.aux_coef * found["aux"]}
    assert sae.ghost is not None
    rows = (W_enc[dead], p["b_enc"][dead], W_dec[dead])
    some = bool(dead.any())
    found["ghost"] = losses.ghost(sae.ghost, inputs, -error, rows, denominator) if some else x.new_zeros(())
    return found | {"loss": found["loss"] + sae.ghost_coef * found["ghost"]}


def unit_factors(batch: SAEBatch) -> Tensors:
    """1 for each number of the rows that a batch divides by their norm: inputs of `batch_forward`.

    The gradient g of such a row u is projected, g - u ⟨u, g⟩, and how near to 0 that comes is the rounding of u,
    relative to g. No change of the row before its division shows that: one number becomes ±1, whatever it was.
    """
    norms = {"W_enc": batch.encoder_norm, "W_dec": batch.decoder_norm}
    named = dict(batch.named_parameters())
    return {f"unit {n}": torch.ones_like(named[n], dtype=torch.float64) for n in norms.keys() & named.keys()
            if norms[n] == "forward"}  # fmt: skip


def batch_forward(
    batch: SAEBatch, i: int, before: Before, p: Mapping[str, Tensor], x: Tensor, units: Mapping[str, Tensor]
) -> Tensors:
    """The same of the i-th SAE of a batch without ghosts; p: of all of them; units: `unit_factors`, or near them."""
    names = dict(batch.named_parameters())
    own = {name: p[name][i] for name in names}
    for name in own:
        if f"unit {name}" in units:
            own[name] = _unit_rows(own[name], units[f"unit {name}"][i])
    rule = batch.rules[i]
    state = {name: t[i] for name, t in before.buffers.items() if name in ("threshold", "threshold_weight")}
    state |= {name: own[name] for name in names if name not in ("W_enc", "W_dec", "b_enc", "b_dec")}
    out = reference.forward(
        own, x, rule, state, pre_bias=batch.pre_bias, loss=batch.loss, training=batch.training
    )  # fmt: skip
    return {**out.losses, "A": out.A, "recon": out.recon}


def _unit_rows(W: Tensor, factors: Tensor) -> Tensor:
    """The rows u of W divided by their norm, times factors near 1; these rows also project the gradient."""
    norm = torch.linalg.vector_norm(W.detach(), dim=-1, keepdim=True)
    u = W.detach() / norm * factors
    moved = (W - W.detach()) / norm
    return u + moved - (moved * u).sum(-1, keepdim=True) * u


# -- a step ------------------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """An optimizer's settings. undecayed: parameters without weight decay."""

    kind: str
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = None
    clip_rows: float | None = None
    undecayed: tuple[str, ...] = field(default=())

    def __call__(
        self, p: Tensors, loss: Callable[[Tensors], Tensor], moments: Mapping[str, list[Tensor]], count: int, unit: bool
    ) -> Tensors:
        """The parameters after the count-th step, from those before, with W_dec's rows of norm 1 where `unit`."""
        leaves = {name: t.detach().clone().requires_grad_() for name, t in p.items()}
        found = torch.autograd.grad(loss(leaves), list(leaves.values()), allow_unused=True)
        grads = {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(p.items(), found, strict=True)}
        unused = {name for name, g in zip(p, found, strict=True) if g is None}
        grads = reference.shape_gradients(p, grads, unit, self.clip_rows)
        if self.clip_norm is not None:
            norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
            grads = {name: g * (self.clip_norm / (norm + 1e-6)).clamp(max=1.0) for name, g in grads.items()}
        lr, at = torch.tensor(self.lr, dtype=torch.float64), torch.tensor(count)
        new = {}
        for name, t in p.items():
            if name in unused and name not in ("W_enc", "W_dec", "b_enc", "b_dec"):
                new[name] = t
                continue
            decay = 0.0 if name in self.undecayed else self.weight_decay
            rule = reference.Optimizer(self.kind, self.betas, self.eps, decay)
            old = moments.get(name) or [torch.zeros_like(t) for _ in rule.moments]
            new[name], _ = rule.stepped(t, grads[name], tuple(old), lr, at)
        if unit:
            new["W_dec"] = reference.normalize(new["W_dec"])
        return new

    @property
    def turns(self) -> float:
        """By how much a parameter may be off where the sign of a gradient near 0 decides."""
        return 2.1 * self.lr if self.kind in ("lion", "signsgd") else 0.0


# -- agreement ---------------------------------------------------------------------------------------------------------


def agree(
    got: Mapping[str, Tensor], compute: Callable[[Tensors], Tensors], inputs: Tensors, draw: Draw, dtype: torch.dtype,
    turns: float = 0.0,
) -> None:  # fmt: skip
    """Raises Wrong where `got` is not what `compute` makes of inputs near these; dtype: in which it was computed.

    turns: by how much each number may be off by itself.
    """
    u = roundoff(dtype)
    exact = compute(inputs)
    low, high = ({name: exact[name].detach().clone() for name in got} for _ in range(2))
    if not all(bool(t.isfinite().all()) for t in low.values()):
        return
    for attempt in range(ATTEMPTS):
        scale = u * ((1, 4, 16) if u > 1e-4 else (4, 16, 64))[attempt % 3]
        off = {n: torch.from_numpy(draw.rng.standard_normal(tuple(t.shape))) for n, t in inputs.items()}
        near = compute({name: t * (1 + scale * off[name]) for name, t in inputs.items()})
        for name in got:
            low[name] = torch.minimum(low[name], near[name].detach())
            high[name] = torch.maximum(high[name], near[name].detach())
        if attempt >= 2 and all(_within(got[n], exact[n].detach(), low[n], high[n], u, turns) is None for n in got):
            return
    for name in got:
        said = _within(got[name], exact[name].detach(), low[name], high[name], u, turns)
        if said is not None:
            raise Wrong(f"{name} is {said}")


def _within(got: Tensor, exact: Tensor, low: Tensor, high: Tensor, u: float, turns: float) -> str | None:
    got = got.detach().double()
    if got.shape != exact.shape:
        return f"of shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if not got.numel():
        return None
    room = (high - low) + 64 * u * (exact.abs() + exact.abs().max()) + 1e-30 + turns
    wrong = ~((got >= low - room) & (got <= high + room))
    if not bool(wrong.any()):
        return None
    return f"{got[wrong][:3].tolist()}, expected {exact[wrong][:3].tolist()} within {room[wrong][:3].tolist()}"
