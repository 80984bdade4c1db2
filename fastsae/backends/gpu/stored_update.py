"""update_latents_ for rows beyond the stages' ROW_LIMIT, which do not fit in a program's registers.

Here the dictionaries' gradients are stored: 4·M·(D_in + D_out) bytes, and as much again while they are projected,
clipped and stepped. active_dot and active_outer make them term by term; the reference's elementwise formulas do the
rest. Deterministic: every sum is active_outer's, or one of torch's reductions over a dimension. The host reads
nothing back. Everything is computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae import reference
from fastsae.backends import buffers
from fastsae.backends.contract import RawTerm, UpdateArguments
from fastsae.backends.gpu.active_outer import active_outer
from fastsae.backends.gpu.by_latent import by_latent
from fastsae.backends.gpu.stages import Stages
from fastsae.reference import Params


def update_storing_gradients(stages: Stages, call: UpdateArguments) -> Tensor:
    """One step, in place, or with norms_only nothing but the norms. Returns squared norms, (4,) float64."""
    params = {name: p.float() for name, p in call.parameters().items()}
    sums, parts = _sums(stages, call, params), call.parts()
    if parts.pre is not None:
        sums["b_enc"] += parts.pre
    if call.pre_bias:
        sums["b_dec"] -= _column_sums(stages, sums["b_enc"], params.get("W_enc", params["W_dec"]))
    raw = reference.with_parts(params, sums, parts)
    del sums
    grads = reference.shape_gradients(params, raw, call.unit_norm, call.clip_rows)
    if call.norms_only:
        return reference.squared_norms(grads)
    stats = reference.squared_norms(raw)
    del raw
    call.write_step(params, grads)
    return stats


def _sums(stages: Stages, call: UpdateArguments, params: Params) -> Params:
    """Over the terms: Aᵀ grad, dAᵀ x, Σₙ dA and Σₙ grad, float32."""
    sums = {name: torch.zeros_like(p) for name, p in params.items()}
    sums.setdefault("W_enc", torch.zeros_like(params["W_dec"]))
    for term in call.terms():
        acts, x, grad = term.acts.float(), term.x.float(), term.grad.float()
        order = list(by_latent(stages, acts, term.indices, term.offsets, call.W_dec.shape[0]))
        dacts = _dacts(stages, term, acts, grad, params["W_dec"])
        ones = buffers.full((x.shape[0], 1), 1, x.dtype, x.device)
        for name, weights, rows in (("W_dec", acts, grad), ("W_enc", dacts, x), ("b_enc", dacts, ones)):
            total = active_outer(stages, weights, term.indices, term.offsets, rows, call.W_dec.shape[0], order)
            sums[name] += total.view_as(sums[name])
        if term.has_bias:
            sums["b_dec"] += grad.sum(0)
    return sums


def _dacts(stages: Stages, term: RawTerm, acts: Tensor, grad: Tensor, W_dec: Tensor) -> Tensor:
    if term.dacts is not None:
        return term.dacts.float()
    dots = stages.active_dot(grad, acts, term.indices, term.offsets, W_dec)
    return torch.where(acts != 0, dots, 0)  # in a ragged code too


def _column_sums(stages: Stages, weights: Tensor, W: Tensor) -> Tensor:
    """Σᵢ weightsᵢ Wᵢ: a code whose M tokens all have one latent. In pieces, in parallel and in one order."""
    indices = buffers.zeros((W.shape[0], 1), torch.int32, W.device)
    return active_outer(stages, weights[:, None].contiguous(), indices, None, W, 1, None)[0]
