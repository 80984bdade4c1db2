"""The reference backend: raw-op signatures over fastsae.reference, dense (N, M), any dtype, any device.

It computes in float32 at least (bfloat16 and float16 are promoted, the result is cast once at the end) and in float64
when given float64. It ignores screens: its product is in full precision, so it redoes no token.
A zero of the dense A times a NaN is NaN, so inputs that are not finite spread NaN further than in a sparse backend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae import reference
from fastsae.backends.contract import RawTerm, UpdateArguments
from fastsae.codes import Screen, SparseCodes
from fastsae.reference import wide


def available() -> str | None:
    return None


def detail() -> dict[str, Any]:
    return {"what": "dense PyTorch, any dtype and device; the truth that other backends are tested against"}


def supports(op: str, *tensors: Tensor, **info: Any) -> str | None:
    return None


def by_name_only() -> bool:
    return False


def prepare_screen(W: Tensor, b: Tensor | None, x: Tensor | None, k: int | None) -> Screen | None:
    return None


def _none_redone(x: Tensor) -> Tensor:
    return x.new_zeros((), dtype=torch.int64)


def _fixed(values: Tensor, latents: Tensor, last: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Slots in the canonical order: occupied first, ascending; then empty ones, which carry the index `last`."""
    acts = values.to(dtype)  # before looking for zeros: a narrow dtype can make some
    indices = torch.where(acts != 0, latents, last)
    order = torch.where(acts != 0, indices, last + 1).argsort(dim=-1, stable=True)
    return acts.gather(-1, order), indices.gather(-1, order).int()


def _ragged(
    dense: Tensor, occupied: Tensor, capacity: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The occupied entries of (N, M) in token order, cut at capacity: acts, indices, offsets, overflow."""
    tokens, latents = occupied.nonzero(as_tuple=True)
    offsets = torch.cat([tokens.new_zeros(1), occupied.sum(-1).cumsum(0)])
    kept = min(capacity, tokens.numel())
    acts = dense.new_zeros(capacity, dtype=dtype)
    indices = torch.zeros(capacity, dtype=torch.int32, device=dense.device)
    acts[:kept] = dense[tokens[:kept], latents[:kept]].to(dtype)
    indices[:kept] = latents[:kept].int()
    return acts, indices, offsets.clamp(max=capacity), offsets[-1] > capacity


def encode_topk(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    k: int,
    rows: Tensor | None,
    scale: Tensor | None,
    index_offset: int,
    screen: list[Tensor] | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if rows is None:
        pre = reference.pre_acts(wide(x), wide(W), wide(b), None if scale is None else wide(scale))
        latents = torch.arange(W.shape[0], dtype=torch.int64, device=x.device)
    else:
        latents = rows.long().clamp(min=0)
        pre = reference.pre_acts(
            wide(x), wide(W[latents]), wide(b[latents]), None if scale is None else wide(scale[latents])
        )
        pre = torch.where(rows < 0, 0, pre)
    values, chosen = reference.top_k(torch.relu(pre), k)
    last = index_offset + W.shape[0] - 1
    acts, indices = _fixed(values, latents[chosen] + index_offset, last, x.dtype)
    return acts, indices, _none_redone(x)


def encode_above(
    x: Tensor, W: Tensor, b: Tensor, threshold: Tensor, capacity: int, screen: list[Tensor] | None, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    pre = reference.pre_acts(wide(x), wide(W), wide(b))
    acts, indices, offsets, overflow = _ragged(pre, reference.is_above(pre, wide(threshold)), capacity, x.dtype)
    return acts, indices, offsets, overflow, _none_redone(x)


def encode_batch_topk(
    x: Tensor, W: Tensor, b: Tensor, k: int, screen: list[Tensor] | None, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    A = reference.batch_top_k(reference.pre_acts(wide(x), wide(W), wide(b)), k)
    acts, indices, offsets, _ = _ragged(A, A.to(x.dtype) != 0, x.shape[0] * k, x.dtype)
    return acts, indices, offsets, _none_redone(x)


def _dense(acts: Tensor, indices: Tensor, offsets: Tensor | None, d_sae: int) -> Tensor:
    return SparseCodes(wide(acts), indices, d_sae, offsets).to_dense()


def decode(acts: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor) -> Tensor:
    return reference.decode(_dense(acts, indices, offsets, W.shape[0]), wide(W)).to(W.dtype)


def decode_error(
    acts: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor, target: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    error = reference.decode(_dense(acts, indices, offsets, W.shape[0]), wide(W)) - wide(target)
    if bias is not None:
        error = error + wide(bias)
    return error.to(W.dtype), error.double().square().sum(-1)


def active_dot(x: Tensor, acts: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor) -> Tensor:
    codes = SparseCodes(acts, indices, W.shape[0], offsets)
    occupied = codes.occupied().flatten()
    dots = wide(acts).new_zeros(acts.numel())
    dense = reference.active_dot(wide(x), wide(W))
    dots[occupied] = dense[codes.token_ids()[occupied], indices.flatten()[occupied].long()]
    return dots.view_as(acts).to(acts.dtype)


def active_outer(
    acts: Tensor, indices: Tensor, offsets: Tensor | None, x: Tensor, d_sae: int, by_latent: list[Tensor] | None
) -> Tensor:
    return reference.active_outer(_dense(acts, indices, offsets, d_sae), wide(x)).to(x.dtype)


def by_latent(acts: Tensor, indices: Tensor, offsets: Tensor | None, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    codes = SparseCodes(acts, indices, d_sae, offsets)
    occupied = codes.occupied().flatten()
    latents = torch.where(occupied, indices.flatten().long(), d_sae)
    slots = latents.argsort(stable=True)
    counts = torch.bincount(latents, minlength=d_sae + 1)[:d_sae]
    tokens = codes.token_ids()[slots].int()
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]), tokens, slots


def update_latents_(call: UpdateArguments) -> Tensor:
    params = {name: wide(weight) for name, weight in call.parameters().items()}
    terms = [_dense_term(term, call.W_dec.shape[0]) for term in call.terms()]
    raw = reference.gradients(params, terms, call.pre_bias, call.parts())
    grads = reference.shape_gradients(params, raw, call.unit_norm, call.clip_rows)
    if call.norms_only:
        return reference.squared_norms(grads)
    call.write_step(params, grads)
    return reference.squared_norms(raw)


def _dense_term(term: RawTerm, d_sae: int) -> reference.Term:
    """In a fixed code a slot whose act is 0 is empty, even if its dact is not 0."""
    A = _dense(term.acts, term.indices, term.offsets, d_sae)
    dA = None
    if term.dacts is not None:
        occupied = SparseCodes(term.acts, term.indices, d_sae, term.offsets).occupied()
        dA = _dense(torch.where(occupied, wide(term.dacts), 0), term.indices, term.offsets, d_sae)
    return reference.Term(A, wide(term.x), wide(term.grad), term.has_bias, dA)
