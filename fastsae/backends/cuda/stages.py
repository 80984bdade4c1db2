"""The CUDA kernels under the names of fastsae.backends.gpu.stages: what this backend computes itself.

The encoders' and the latent-major stages have their own files.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.backends import buffers
from fastsae.backends.cuda import update as cuda_update
from fastsae.backends.cuda.encode import (
    append,
    bars,
    count_listed,
    emit_listed,
    every_latent,
    exhaustive_top_k,
    histogram,
    narrow_rows,
    product,
    rescore,
    select,
    top_k,
)
from fastsae.backends.cuda.library import library, where
from fastsae.backends.cuda.update import (
    ROW_LIMIT,
    bias_parts,
    bias_programs,
    list_slots,
    outer,
    piece_starts,
    sort_slots,
    step_numbers,
    update_bias,
    update_rows,
)
from fastsae.backends.gpu.pieces import cut

__all__ = [
    "ROW_LIMIT", "active_dot", "append", "bars", "bias_parts", "bias_programs", "count_listed", "decode",
    "decode_error", "emit_listed", "every_latent", "exhaustive_top_k", "histogram", "list_slots", "narrow_rows",
    "outer", "piece_starts", "product", "rescore", "select", "sort_slots", "step_numbers", "top_k", "update_bias",
    "update_rows",
]  # fmt: skip


def _long_tokens(offsets: Tensor | None, slots: int, W: Tensor) -> tuple[Tensor | None, int, Tensor | None]:
    """The pieces of a ragged code's long tokens, their length, and rows to add them up in; a fixed code has none."""
    if offsets is None:
        return None, 0, None
    pieces = cut(cuda_update, offsets, slots, offsets.shape[0] - 1)
    if pieces.first is None:
        return None, 0, None
    sums = buffers.empty((pieces.capacity, W.shape[1]), torch.float32, W.device)
    return pieces.first, pieces.length, sums


def decode(acts: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor) -> Tensor:
    tokens = acts.shape[0] if offsets is None else offsets.shape[0] - 1
    out = buffers.empty((tokens, W.shape[1]), W.dtype, W.device)
    if out.numel():
        library.decode(where(W), acts, indices, offsets, W, out, *_long_tokens(offsets, acts.numel(), W))
    return out


def decode_error(
    acts: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor, target: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    error = torch.empty_like(target)
    tiles = library.decode_tiles(W, W.shape[1])
    squares = buffers.empty((tiles, target.shape[0]), torch.float32, W.device)
    if error.numel():
        pieces = _long_tokens(offsets, acts.numel(), W)
        library.decode_error(where(W), acts, indices, offsets, W, target, bias, error, squares, *pieces)
    return error, squares.double().sum(0)


def active_dot(x: Tensor, acts: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor) -> Tensor:
    out = torch.empty_like(acts)
    if out.numel():
        library.active_dot(where(W), x, acts, indices, offsets, W, out)
    return out
