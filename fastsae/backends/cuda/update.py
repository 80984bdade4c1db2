"""The latent-major stages of the CUDA backend (gpu.stages.LatentStages): allocation here, launches in csrc/cuda."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.backends import buffers
from fastsae.backends.cuda.library import library, where
from fastsae.backends.gpu.stages import Entries, Moments, Pieces

ROW_LIMIT = None
"""update_rows takes rows of any width (csrc/cuda/update_wide.cu)."""
STREAMS = 8
"""Streams of random bits in a step: 2i is the i-th parameter's m, 2i + 1 its v."""


def _floats(like: Tensor, *shape: int) -> Tensor:
    return buffers.empty(shape, torch.float32, like.device)


def _bytes(like: Tensor, size: int) -> Tensor:
    return buffers.empty((-(-size // 8),), torch.int64, like.device)


def list_slots(
    acts: Tensor, indices: Tensor, offsets: Tensor | None, d_sae: int,
    keys: Tensor, rows: Tensor, values: Tensor | None, first_row: int = 0,
) -> None:  # fmt: skip
    library.list_slots(where(acts), acts, indices, offsets, d_sae, keys, rows, values, first_row)


def sort_slots(
    keys: Tensor, rows: Tensor, values: Tensor | None, d_sae: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Raises ValueError for 2³¹ slots or more, which are numbered in int32."""
    slots = buffers.count_int32("the slots of the codes", keys.numel())
    starts = buffers.empty((d_sae + 1,), torch.int64, keys.device)
    sorted_rows, sorted_slots = torch.empty_like(rows), buffers.empty((slots,), torch.int64, keys.device)
    sorted_values = None if values is None else torch.empty_like(values)
    numbers = buffers.arange(slots, torch.int32, keys.device)
    workspace = _bytes(keys, library.sort_workspace(where(keys), slots, d_sae))
    library.sort_slots(
        where(keys), keys, rows, values, d_sae, numbers, torch.empty_like(keys), torch.empty_like(keys), workspace,
        starts, sorted_rows, sorted_slots, sorted_values,
    )  # fmt: skip
    return starts, sorted_rows, sorted_slots, sorted_values


def piece_starts(starts: Tensor, length: int) -> Tensor:
    first = buffers.empty(starts.shape, torch.int32, starts.device)
    workspace = _bytes(starts, library.piece_workspace(where(starts), starts.shape[0] - 1))
    library.piece_starts(where(starts), starts, length, workspace, first)
    return first


def outer(starts: Tensor, tokens: Tensor, slots: Tensor, acts: Tensor, x: Tensor, pieces: Pieces, out: Tensor) -> None:
    sums = None if pieces.first is None else _floats(x, pieces.capacity, x.shape[1])
    library.active_outer(where(x), starts, tokens, slots, acts, x, out, pieces.first, pieces.length, sums)


def step_numbers(
    lr: Tensor, step: Tensor, skip: Tensor | None, beta1: float, beta2: float, seed: int | None
) -> tuple[Tensor, Tensor]:
    numbers, keys = _floats(lr, 3), buffers.empty((STREAMS,), torch.int32, lr.device)
    library.step_numbers(where(lr), lr, step, skip, beta1, beta2, (seed or 0) % 2**32, numbers, keys)
    return numbers, keys


def update_rows(
    W_enc: Tensor | None, W_dec: Tensor, b_enc: Tensor, enc_moments: Moments, dec_moments: Moments,
    bias_moments: Moments, entries: Entries, pre_bias: Tensor | None, stats: Tensor, numbers: Tensor, keys: Tensor,
    eps: float, betas: tuple[float, float, float, float], unit_norm: bool, stochastic: bool, programs: int,
) -> None:  # fmt: skip
    """Before it changes anything, it also checks that `update_bias` can be launched afterwards."""
    at, pieces = where(W_dec), entries.pieces
    d_out, d_in = W_dec.shape[1], (W_dec if W_enc is None else W_enc).shape[1]
    sources = _in_one_dtype([entries.x, entries.more_x, entries.grad, entries.more_grad], W_dec.dtype)
    moments = [*enc_moments, *dec_moments, *bias_moments]
    piece_rows = piece_biases = dacts = scratch = None
    if pieces.first is not None:
        piece_rows, piece_biases = _floats(W_dec, pieces.capacity, d_out + d_in), _floats(W_dec, pieces.capacity)
    if not library.rows_are_staged(at, W_enc, W_dec, moments, sources):
        dacts, scratch = torch.empty_like(entries.acts), _floats(W_dec, programs, d_out)
    library.update_rows(
        at, [W_enc, W_dec, b_enc], moments, [entries.starts, entries.rows, entries.acts, *sources], entries.split,
        pieces.first, pieces.length, [piece_rows, piece_biases, dacts, scratch], pre_bias, stats, numbers, keys,
        eps, *betas, unit_norm, stochastic, programs,
    )  # fmt: skip


def _in_one_dtype(matrices: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Unchanged if all have the weights' dtype; else in float32, which holds every narrower number exactly."""
    if all(t is None or t.dtype == dtype for t in matrices):
        return matrices
    return [None if t is None else t.float() for t in matrices]


def update_bias(
    b: Tensor, m: Tensor, v: Tensor, grads: list[Tensor], pre_bias: Tensor | None, stats: Tensor,
    numbers: Tensor, keys: Tensor, eps: float, betas: tuple[float, float, float, float], stochastic: bool,
    workspace: Tensor,
) -> None:  # fmt: skip
    library.update_bias(
        where(b), b, m, v, grads, pre_bias, workspace, stats, numbers, keys, eps, *betas, stochastic
    )  # fmt: skip


def bias_parts(rows: int) -> int:
    parts: int = library.bias_parts(rows)
    return parts


def bias_programs(D: int) -> int:
    programs: int = library.bias_programs(D)
    return programs
