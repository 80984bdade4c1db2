"""How tensors are shown to the C++ extension: addresses, shapes and dtypes, nothing copied.

They are contiguous and fit together (fastsae.ops.register sees to it), and the caller keeps them alive during the
call. torch is imported before the extension, so that both use one OpenMP runtime.
"""

from __future__ import annotations

import torch
from torch import Tensor, float32, float64, int32, int64
from torch import bfloat16 as bf16

from fastsae import _cpu

DTYPES = {float32: _cpu.Dtype.f32, bf16: _cpu.Dtype.bf16, float64: _cpu.Dtype.f64}


def matrix(t: Tensor) -> _cpu.Matrix:
    """A (rows, cols) tensor whose rows are contiguous, however far apart they lie."""
    return _cpu.Matrix(t.data_ptr(), t.shape[0], t.shape[1], t.stride(0), DTYPES[t.dtype])


def codes(acts: Tensor, indices: Tensor, offsets: Tensor | None, d_sae: int) -> _cpu.Codes:
    """A fixed-K code (N, K), or a ragged one with offsets (N+1,)."""
    n, k = (acts.shape[0], acts.shape[1]) if offsets is None else (offsets.shape[0] - 1, 0)
    return _cpu.Codes(acts.data_ptr(), indices.data_ptr(), address(offsets), n, k, d_sae, DTYPES[acts.dtype])


def latent_order(offsets: Tensor, tokens: Tensor, slots: Tensor) -> _cpu.LatentOrder:
    return _cpu.LatentOrder(offsets.data_ptr(), tokens.data_ptr(), slots.data_ptr())


def sort(code: _cpu.Codes, capacity: int, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """A code's latent order (offsets, tokens, slots); -1 past the last entry, so that reading on is noticed."""
    order = (
        torch.empty(d_sae + 1, dtype=int64),
        torch.full((capacity,), -1, dtype=int32),
        torch.full((capacity,), -1, dtype=int64),
    )
    _cpu.by_latent(code, latent_order(*order), torch.get_num_threads())
    return order


def address(t: Tensor | None) -> int:
    """0 stands for a tensor that is not there."""
    return 0 if t is None else t.data_ptr()
