"""The sparse products that close forward and backward, and the regrouping of a code latent by latent.

A is the dense (N, M) view of a code and · stands for its occupied slots only:

    decode        y = A W           dA = ⟨dy, W⟩|active,  dW = Aᵀ dy
    active_dot    S = ⟨x, W⟩|active    dx = dS W,  dW = dSᵀ x
    active_outer  G = Aᵀ x          dA = ⟨x, dG⟩|active,  dx = A dG

Every formula is made of differentiable ops, so second derivatives follow, with one exception: a slot where the
*gradient* is exactly 0 counts as empty in the second backward (see SparseCodes), so differentiating a gradient at an
all-zero cotangent gives 0. The backward pass runs on the backend that the forward call named.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsae.backends import check_name
from fastsae.codes import LatentOrder, SparseCodes
from fastsae.ops import checks as check_that
from fastsae.ops import ledger as ledgers
from fastsae.ops import recorded
from fastsae.ops.gradients import latent_sums
from fastsae.ops.register import CODE, define, empty_ints, no_gradients

_raw = torch.ops.fastsae


# -- decode -----------------------------------------------------------------------------------------------------------


def decode(codes: SparseCodes, W: Tensor, *, backend: str | None = None) -> Tensor:
    """A W: (*batch, D), in W's dtype. An act of 0 adds nothing and receives no gradient."""
    check_name(backend)
    check_that.dictionary("W", W)
    check_that.latents_of(codes, W.shape[0])
    flat, ledger = codes.flatten(), ledgers.open_ledger(W_dec=W)
    if ledger is None:
        out = _raw.decode(flat.acts, flat.indices, flat.offsets, W, backend)
    else:
        out = recorded.decode(flat, W, ledger, backend)
    return out.view(*codes.batch_shape, W.shape[1])


def _fake_decode(acts: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor) -> Tensor:
    return W.new_empty(check_that.code_tokens(acts, offsets), W.shape[1])


def _check_inside(acts: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor, *_: Any) -> None:
    check_that.code_inside(indices, offsets, W.shape[0])


def _setup_decode(ctx: Any, inputs: Any, output: Any) -> None:
    acts, indices, offsets, W, ctx.backend = inputs
    ctx.save_for_backward(acts, indices, offsets, W)


def _decode_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    acts, indices, offsets, W = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dacts = _raw.active_dot(grad, acts, indices, offsets, W, ctx.backend) if needs[0] else None
    dW = _raw.active_outer(acts, indices, offsets, grad, W.shape[0], None, ctx.backend) if needs[3] else None
    return dacts, None, None, dW, None


define(
    "decode",
    f"({CODE}, Tensor W, str? backend) -> Tensor",
    fake=_fake_decode,
    check=check_that.code_of,
    check_values=_check_inside,
    setup=_setup_decode,
    backward=_decode_backward,
    cast=("acts",),
)


# -- decode_error -----------------------------------------------------------------------------------------------------


def decode_error(
    codes: SparseCodes, W: Tensor, target: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """A W (+ bias) - target: (*batch, D) in W's dtype, and Σ_d of its squares: float64 (*batch).

    target (*batch, D), bias (D,). What a loss needs from a decode, in one pass if the backend can; not differentiable.
    """
    check_name(backend)
    check_that.dictionary("W", W)
    check_that.latents_of(codes, W.shape[0])
    goal = check_that.flat_rows("target", target, W.shape[1])
    check_that.tokens("target", target, codes)
    flat = codes.flatten()
    with torch.no_grad():
        error, squares = _raw.decode_error(flat.acts, flat.indices, flat.offsets, W, goal, bias, backend)
    return error.view(*codes.batch_shape, W.shape[1]), squares.view(codes.batch_shape)


def _fake_decode_error(
    acts: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor, target: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return target.new_empty(target.shape), target.new_empty(target.shape[0], dtype=torch.float64)


def _check_decode_error(
    acts: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor, target: Tensor, bias: Tensor | None
) -> None:
    check_that.code_of(acts, indices, offsets, W)
    check_that.rows("target", target, W)
    check_that.rows_of_code("target", target, acts, offsets)
    if bias is not None:
        check_that.shape("bias", bias, W.shape[1:], ", the width of W")
        check_that.same_kind("bias", bias, "W", W)


define(
    "decode_error",
    f"({CODE}, Tensor W, Tensor target, Tensor? bias, str? backend) -> (Tensor error, Tensor squares)",
    fake=_fake_decode_error,
    check=_check_decode_error,
    check_values=_check_inside,
    cast=("acts", "target"),
)


# -- active_dot -------------------------------------------------------------------------------------------------------


def active_dot(x: Tensor, codes: SparseCodes, W: Tensor, *, backend: str | None = None) -> Tensor:
    """⟨xₙ, Wᵢ⟩ at the active latents only, 0 in empty slots: shape and dtype of codes.acts. x (*batch, D), W (M, D)."""
    check_name(backend)
    check_that.dictionary("W", W)
    rows = check_that.flat_rows("x", x, W.shape[1])
    check_that.tokens("x", x, codes)
    check_that.latents_of(codes, W.shape[0])
    flat = codes.flatten()
    return _raw.active_dot(rows, flat.acts, flat.indices, flat.offsets, W, backend).view(codes.acts.shape)


def _fake_active_dot(x: Tensor, acts: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor) -> Tensor:
    return acts.new_empty(acts.shape)


def _check_active_dot(x: Tensor, acts: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor) -> None:
    check_that.code_of(acts, indices, offsets, W)
    check_that.rows("x", x, W)
    check_that.rows_of_code("x", x, acts, offsets)


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


define(
    "active_dot",
    f"(Tensor x, {CODE}, Tensor W, str? backend) -> Tensor",
    fake=_fake_active_dot,
    check=_check_active_dot,
    check_values=lambda _, *code_and_W: _check_inside(*code_and_W),
    setup=_setup_active_dot,
    backward=_active_dot_backward,
    cast=("x", "acts"),
)


# -- active_outer -----------------------------------------------------------------------------------------------------


def active_outer(
    codes: SparseCodes,
    x: Tensor,
    d_sae: int | None = None,
    *,
    by_latent: LatentOrder | None = None,
    backend: str | None = None,
) -> Tensor:
    """Aᵀ x: (d_sae, D), in x's dtype. x (*batch, D); by_latent: the regrouped code, if it exists already."""
    check_name(backend)
    rows = check_that.flat_rows("x", x, x.shape[-1] if x.ndim else 0)
    check_that.tokens("x", x, codes)
    d_sae = codes.d_sae if d_sae is None else d_sae
    check_that.latents_of(codes, d_sae)
    flat = codes.flatten()
    order = None if by_latent is None else [by_latent.offsets, by_latent.tokens, by_latent.slots]
    return _raw.active_outer(flat.acts, flat.indices, flat.offsets, rows, d_sae, order, backend)


def _fake_active_outer(
    acts: Tensor, indices: Tensor, offsets: Tensor | None, x: Tensor, d_sae: int, by_latent: list[Tensor] | None
) -> Tensor:
    return x.new_empty(d_sae, x.shape[1])


def _check_active_outer(
    acts: Tensor, indices: Tensor, offsets: Tensor | None, x: Tensor, d_sae: int, by_latent: list[Tensor] | None
) -> None:
    _check_code_of_size(acts, indices, offsets, d_sae)
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (N, D)")
    check_that.rows_of_code("x", x, acts, offsets)
    check_that.same_kind("x", x, "acts", acts)
    if by_latent is None:
        return
    got = [(t.dtype, tuple(t.shape)) for t in by_latent]
    capacity = acts.numel()
    expected = [(torch.int64, (d_sae + 1,)), (torch.int32, (capacity,)), (torch.int64, (capacity,))]
    if got != expected:
        said = [", ".join(f"{dtype} of shape {size}" for dtype, size in one) for one in (got, expected)]
        raise ValueError(
            f"by_latent is {said[0]}, expected {said[1]}: it was made from another code; use ops.by_latent(codes)"
        )
    for t in by_latent:
        check_that.same_device("by_latent", t, "acts", acts)


def _check_code_of_size(acts: Tensor, indices: Tensor, offsets: Tensor | None, d_sae: int) -> None:
    check_that.code(acts, indices, offsets)
    check_that.floating("acts", acts)
    if d_sae < 0:
        raise ValueError(f"d_sae is {d_sae}, expected 0 or more latents")
    check_that.fits_int32("d_sae", d_sae)


def _check_active_outer_inside(
    acts: Tensor, indices: Tensor, offsets: Tensor | None, x: Tensor, d_sae: int, by_latent: list[Tensor] | None
) -> None:
    check_that.code_inside(indices, offsets, d_sae)
    if by_latent is not None and x.device.type == "cpu":
        _check_order_inside(by_latent, acts.numel(), x.shape[0])


def _check_order_inside(order: list[Tensor], capacity: int, tokens: int) -> None:
    """Raises ValueError if an order names tokens or slots that the code does not have. Reads it."""
    offsets, of_token, slots = order
    inside = check_that.rises(offsets, capacity)
    for places, count in ((of_token, tokens), (slots, capacity)):
        if inside and int(offsets[-1]):
            low, high = torch.aminmax(places[: int(offsets[-1])])
            inside = int(low) >= 0 and int(high) < count
    if not inside:
        raise ValueError("by_latent points outside the code: it was made from another one; use ops.by_latent(codes)")


def _setup_active_outer(ctx: Any, inputs: Any, output: Any) -> None:
    acts, indices, offsets, x, _, _, ctx.backend = inputs
    ctx.none = no_gradients(inputs)
    ctx.save_for_backward(acts, indices, offsets, x)


def _active_outer_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    acts, indices, offsets, x = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dacts = _raw.active_dot(x, acts, indices, offsets, grad, ctx.backend) if needs[0] else None
    dx = _raw.decode(acts, indices, offsets, grad, ctx.backend) if needs[3] else None
    return dacts, *ctx.none[1:3], dx, *ctx.none[4:]


define(
    "active_outer",
    f"({CODE}, Tensor x, SymInt d_sae, Tensor[]? by_latent, str? backend) -> Tensor",
    fake=_fake_active_outer,
    check=_check_active_outer,
    check_values=_check_active_outer_inside,
    setup=_setup_active_outer,
    backward=_active_outer_backward,
    cast=("x",),
    to="acts",
)


# -- by_latent --------------------------------------------------------------------------------------------------------


def by_latent(codes: SparseCodes, *, backend: str | None = None) -> LatentOrder:
    """The code regrouped latent by latent: a counting sort, computed once for both dictionary gradients.

    Tokens ascend within a latent; empty slots of a fixed code are left out.
    """
    check_name(backend)
    flat = codes.flatten()
    return LatentOrder(*_raw.by_latent(flat.acts.detach(), flat.indices, flat.offsets, codes.d_sae, backend))


def _fake_by_latent(acts: Tensor, indices: Tensor, offsets: Tensor | None, d_sae: int) -> tuple[Tensor, ...]:
    size = acts.numel()
    return empty_ints(acts, d_sae + 1), empty_ints(acts, size, dtype=torch.int32), empty_ints(acts, size)


define(
    "by_latent",
    f"({CODE}, SymInt d_sae, str? backend) -> (Tensor offsets, Tensor tokens, Tensor slots)",
    fake=_fake_by_latent,
    check=_check_code_of_size,
    check_values=lambda _, *code_and_size: check_that.code_inside(*code_and_size),
)


# -- per_latent -------------------------------------------------------------------------------------------------------


def per_latent(values: Tensor, codes: SparseCodes, backend: str | None = None) -> Tensor:
    """values (M,) at each slot's latent: the shape of codes.acts. Its gradient sums by latent, in a fixed order."""
    return _PerLatent.apply(values, codes.detach(), backend)


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
        return latent_sums(grad, flat.indices, flat.offsets, ctx.d_sae, None, ctx.backend), None, None
