"""The only backward passes: a formula per op, in terms of the other ops, whatever backend computes them.

With P the pre-acts, A the dense (N, M) view of a code and · on its occupied slots only:

    encode   A = P|active, P = (x Wᵀ + b)·s    dx = (dA·s) W,  dW = (dA·s)ᵀ x,  db = Σₙ dA·s,  ds = Σₙ dA·P
    decode   y = A W                           dA = ⟨dy, W⟩|active,  dW = Aᵀ dy
    active_dot    S = ⟨x, W⟩|active            dx = dS W,  dW = dSᵀ x
    active_outer  G = Aᵀ x                     dA = ⟨x, dG⟩|active,  dx = A dG

The choice of the active latents has no gradient, and neither has an empty slot. Since every formula is made of
differentiable ops, second derivatives follow, with one exception: a slot where the *gradient* is exactly 0 counts as
empty in the second backward (see SparseCodes), so differentiating a gradient at an all-zero cotangent gives 0.
A backward runs on the backend that was asked for in forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsae.codes import SparseCodes
from fastsae.ops import register as library

_raw = torch.ops.fastsae


def _sums(
    grad: Tensor, indices: Tensor, offsets: Tensor | None, d_sae: int, order: list[Tensor] | None, backend: str | None
) -> Tensor:
    """Σₙ of each latent's slots: (M,), as Aᵀ 1, because active_outer is deterministic everywhere."""
    n = grad.shape[0] if offsets is None else offsets.shape[0] - 1
    return _raw.active_outer(grad, indices, offsets, grad.new_ones(n, 1), d_sae, order, backend).squeeze(1)


def _none(inputs: Any) -> list[Any]:
    """No gradient, in the structure of the op's inputs: None for an argument, a list of None for a list."""
    return [[None] * len(value) if isinstance(value, (list, tuple)) else None for value in inputs]


def _encoder_backward(
    ctx: Any, grad: Tensor, x: Tensor, W: Tensor, acts: Tensor, indices: Tensor, offsets: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dW, db from the gradient of the pre-acts at the active latents; None where nobody asks."""
    needs_x, needs_W, needs_b = ctx.needs_input_grad[:3]
    dx = _raw.decode(grad, indices, offsets, W, ctx.backend) if needs_x else None
    dW = db = None
    if needs_W or needs_b:
        order = _raw.by_latent(acts, indices, offsets, W.shape[0], ctx.backend)
        if needs_W:
            dW = _raw.active_outer(grad, indices, offsets, x, W.shape[0], order, ctx.backend)
        if needs_b:
            db = _sums(grad, indices, offsets, W.shape[0], order, ctx.backend)
    return dx, dW, db


def _setup_encode_topk(ctx: Any, inputs: Any, output: Any) -> None:
    x, W, b, _, _, scale, ctx.index_offset, _, _, ctx.backend = inputs
    ctx.none = _none(inputs)
    acts, indices, _ = output
    ctx.save_for_backward(x, W, b, scale, acts, indices)


def _encode_topk_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    x, W, b, scale, acts, indices = ctx.saved_tensors
    local = indices - ctx.index_offset
    grad = torch.where(acts != 0, grad, 0)
    dscale = None
    if scale is not None:
        chosen = scale[local.long()]
        if ctx.needs_input_grad[5]:
            pre = _raw.active_dot(x, acts, local, None, W, ctx.backend) + b[local.long()]
            order = _raw.by_latent(acts, local, None, W.shape[0], ctx.backend)
            dscale = _sums(grad * pre, local, None, W.shape[0], order, ctx.backend)
        grad = grad * chosen
    dx, dW, db = _encoder_backward(ctx, grad, x, W, acts, local, None)
    return dx, dW, db, *ctx.none[3:5], dscale, *ctx.none[6:]


def _setup_ragged(ctx: Any, inputs: Any, output: Any) -> None:
    x, W, ctx.backend, ctx.none = inputs[0], inputs[1], inputs[-1], _none(inputs)
    ctx.save_for_backward(x, W, *output[:3])


def _ragged_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    x, W, acts, indices, offsets = ctx.saved_tensors
    return *_encoder_backward(ctx, grad, x, W, acts, indices, offsets), *ctx.none[3:]


def _setup_decode(ctx: Any, inputs: Any, output: Any) -> None:
    acts, indices, offsets, W, ctx.backend = inputs
    ctx.save_for_backward(acts, indices, offsets, W)


def _decode_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    acts, indices, offsets, W = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dacts = _raw.active_dot(grad, acts, indices, offsets, W, ctx.backend) if needs[0] else None
    dW = _raw.active_outer(acts, indices, offsets, grad, W.shape[0], None, ctx.backend) if needs[3] else None
    return dacts, None, None, dW, None


def _setup_active_dot(ctx: Any, inputs: Any, output: Any) -> None:
    x, acts, indices, offsets, W, ctx.backend = inputs
    ctx.save_for_backward(x, acts, indices, offsets, W)


def _active_dot_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, acts, indices, offsets, W = ctx.saved_tensors
    if offsets is None:
        grad = torch.where(acts != 0, grad, 0)
    needs = ctx.needs_input_grad
    dx = _raw.decode(grad, indices, offsets, W, ctx.backend) if needs[0] else None
    dW = _raw.active_outer(grad, indices, offsets, x, W.shape[0], None, ctx.backend) if needs[4] else None
    return dx, None, None, None, dW, None


def _setup_active_outer(ctx: Any, inputs: Any, output: Any) -> None:
    acts, indices, offsets, x, _, _, ctx.backend = inputs
    ctx.none = _none(inputs)
    ctx.save_for_backward(acts, indices, offsets, x)


def _active_outer_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    acts, indices, offsets, x = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dacts = _raw.active_dot(x, acts, indices, offsets, grad, ctx.backend) if needs[0] else None
    dx = _raw.decode(acts, indices, offsets, grad, ctx.backend) if needs[3] else None
    return dacts, *ctx.none[1:3], dx, *ctx.none[4:]


class _PerLatent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, codes: SparseCodes, backend: str | None) -> Tensor:
        ctx.codes, ctx.backend, ctx.d_sae = codes, backend, values.shape[0]
        return values[codes.indices.long()]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        flat = ctx.codes.flatten()
        grad = grads[0].reshape(flat.indices.shape)
        return _sums(grad, flat.indices, flat.offsets, ctx.d_sae, None, ctx.backend), None, None


def per_latent(values: Tensor, codes: SparseCodes, backend: str | None = None) -> Tensor:
    """values (M,) at each slot's latent: the shape of codes.acts. Its gradient sums by latent, in a fixed order."""
    return _PerLatent.apply(values, codes.detach(), backend)


library.encode_topk.register_autograd(_encode_topk_backward, setup_context=_setup_encode_topk)
library.encode_above.register_autograd(_ragged_backward, setup_context=_setup_ragged)
library.encode_batch_topk.register_autograd(_ragged_backward, setup_context=_setup_ragged)
library.decode.register_autograd(_decode_backward, setup_context=_setup_decode)
library.active_dot.register_autograd(_active_dot_backward, setup_context=_setup_active_dot)
library.active_outer.register_autograd(_active_outer_backward, setup_context=_setup_active_outer)
