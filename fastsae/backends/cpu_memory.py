"""How tensors are shown to the C++ extension: addresses, shapes and dtypes.

The caller keeps every tensor alive for the length of the call; `rows` and `packed` copy what the extension cannot read
in place. torch is imported before the extension, so that both use one OpenMP runtime.
"""

from __future__ import annotations

from torch import Tensor, float32, float64, int32, int64
from torch import bfloat16 as bf16

from fastsae import _cpu

DTYPES = {float32: _cpu.Dtype.f32, bf16: _cpu.Dtype.bf16, float64: _cpu.Dtype.f64}


def rows(t: Tensor) -> Tensor:
    """t (rows, cols) itself where each row is contiguous, however far apart the rows lie; else a copy."""
    return t if t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous()


def packed(acts: Tensor, indices: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """A code in contiguous memory. Raises TypeError or ValueError for one that C++ would misread."""
    if indices.dtype != int32 or indices.shape != acts.shape:
        raise TypeError(
            f"indices are {indices.dtype} of shape {tuple(indices.shape)}, expected torch.int32 of acts' shape "
            f"{tuple(acts.shape)}"
        )
    if offsets is None:
        if acts.ndim != 2:
            raise ValueError(f"acts have shape {tuple(acts.shape)}, expected (N, K); a ragged code needs its offsets")
        return acts.contiguous(), indices.contiguous(), None
    if offsets.dtype != int64 or offsets.ndim != 1 or offsets.shape[0] < 1:
        raise TypeError(f"offsets are {offsets.dtype} of shape {tuple(offsets.shape)}, expected torch.int64 (N+1,)")
    return acts.contiguous(), indices.contiguous(), offsets.contiguous()


def matrix(t: Tensor) -> _cpu.Matrix:
    """A (rows, cols) tensor whose rows are contiguous."""
    return _cpu.Matrix(t.data_ptr(), t.shape[0], t.shape[1], t.stride(0), DTYPES[t.dtype])


def codes(acts: Tensor, indices: Tensor, offsets: Tensor | None, d_sae: int) -> _cpu.Codes:
    """A fixed-K code (N, K), or a ragged one with offsets (N+1,)."""
    n, k = (acts.shape[0], acts.shape[1]) if offsets is None else (offsets.shape[0] - 1, 0)
    return _cpu.Codes(acts.data_ptr(), indices.data_ptr(), address(offsets), n, k, d_sae, DTYPES[acts.dtype])


def latent_order(offsets: Tensor, tokens: Tensor, slots: Tensor) -> _cpu.LatentOrder:
    return _cpu.LatentOrder(offsets.data_ptr(), tokens.data_ptr(), slots.data_ptr())


def address(t: Tensor | None) -> int:
    """0 stands for a tensor that is not there."""
    return 0 if t is None else t.data_ptr()
