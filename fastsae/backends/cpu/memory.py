"""How tensors are passed to the C++ extension: addresses, shapes and dtypes, nothing copied.

Every address that C++ gets is made here, and only here: from a tensor on the CPU, of the dtype that C++ expects, whose
storage holds every number that C++ will read or write there. csrc/cpu/bind.cpp checks that the sizes of a call fit
together. The raw op (fastsae.ops) checks the values that C++ uses as indices (codes, rows).

The caller keeps the tensors alive during the call. torch is imported before the extension, so that both use one OpenMP
runtime.
"""

from __future__ import annotations

import torch
from torch import Tensor, float32, float64, int32, int64
from torch import bfloat16 as bf16

from fastsae import _cpu
from fastsae.backends import buffers

CPU = torch.device("cpu")
DTYPES = {float32: _cpu.Dtype.f32, bf16: _cpu.Dtype.bf16, float64: _cpu.Dtype.f64}


def _place(name: str, t: Tensor, dtype: torch.dtype, span: int) -> int:
    """The address of `span` numbers of dtype, the first of t and those after it. A few microseconds.

    Raises TypeError for another dtype, ValueError if they do not lie in t's memory, or not on the CPU.
    """
    if t.dtype != dtype:
        raise TypeError(f"{name} is {t.dtype} where C++ expects {dtype}; cast with .to({dtype})")
    if t.device.type != "cpu" or t.layout != torch.strided:
        raise ValueError(f"{name} is a {t.layout} tensor on {t.device}, expected a dense one on the CPU")
    there = t.untyped_storage().nbytes() // t.itemsize - t.storage_offset()
    if span > there:
        raise ValueError(
            f"{name} of shape {tuple(t.shape)} has memory for {there} numbers where C++ expects {span}; was its "
            "storage resized, or was it made for other sizes?"
        )
    place = t.data_ptr()
    if span and (not place or place % t.itemsize):
        raise ValueError(
            f"{name} of shape {tuple(t.shape)} lies at address {place}, expected memory that begins at a multiple of "
            f"its element size, {t.itemsize}; pass .clone()"
        )
    return place


def address(name: str, t: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """The address of the numbers of a contiguous tensor of this shape; 0 for None.

    Raises TypeError for another dtype, ValueError for another shape or a tensor not contiguous in the CPU's memory.
    """
    if t is None:
        return 0
    if t.shape != shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)} where C++ expects {shape}")
    if not t.is_contiguous():
        raise ValueError(f"{name} of strides {t.stride()} is not contiguous, as C++ expects it; pass .contiguous()")
    return _place(name, t, dtype, t.numel())


def matrix(name: str, t: Tensor) -> _cpu.Matrix:
    """A (rows, cols) tensor whose rows are contiguous, at any distance from each other.

    Raises TypeError for a dtype that C++ has no kernel for, ValueError for another layout or device.
    """
    if t.dtype not in DTYPES:
        raise TypeError(f"{name} is {t.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if t.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(t.shape)} where C++ expects a matrix")
    (rows, cols), (apart, step) = t.shape, t.stride()
    if rows and cols > 1 and step != 1:
        raise ValueError(f"{name} has strides {t.stride()}, expected contiguous rows; pass .contiguous()")
    span = (rows - 1) * apart + cols if t.numel() else 0
    return _cpu.Matrix(_place(name, t, t.dtype, span), rows, cols, apart, DTYPES[t.dtype])


def codes(acts: Tensor, indices: Tensor, offsets: Tensor | None, d_sae: int) -> _cpu.Codes:
    """A fixed-K code (N, K), or a ragged one (capacity,) with offsets (N+1,). Raises as `address` and `matrix` do."""
    if acts.dtype not in DTYPES:
        raise TypeError(f"acts are {acts.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    shape = tuple(acts.shape)
    if len(shape) != (2 if offsets is None else 1):
        raise ValueError(f"acts have shape {shape}, expected (N, K), or (capacity,) where there are offsets")
    n, k = shape if offsets is None else (offsets.numel() - 1, 0)
    starts = address("offsets", offsets, int64, (n + 1,))
    if offsets is not None and (n < 0 or int(offsets[-1]) > shape[0]):
        raise ValueError(f"offsets end at {offsets[-1:].tolist()}, expected at most the capacity {shape[0]}")
    place = address("acts", acts, acts.dtype, shape)
    return _cpu.Codes(
        place, address("indices", indices, int32, shape), starts, n, k, acts.numel(), d_sae, DTYPES[acts.dtype]
    )


def latent_order(code: _cpu.Codes, offsets: Tensor, tokens: Tensor, slots: Tensor) -> _cpu.LatentOrder:
    """The order of this code: offsets (d_sae + 1,) int64, tokens int32 and slots int64 for as many slots as it has."""
    return _cpu.LatentOrder(
        address("by_latent's offsets", offsets, int64, (code.d_sae + 1,)),
        address("by_latent's tokens", tokens, int32, (code.slots,)),
        address("by_latent's slots", slots, int64, (code.slots,)),
    )


def sort(code: _cpu.Codes) -> tuple[Tensor, Tensor, Tensor]:
    """A code's latent order (offsets, tokens, slots); -1 past the last entry, so that a read past it shows."""
    order = (
        buffers.empty((code.d_sae + 1,), int64, CPU),
        buffers.full((code.slots,), -1, int32, CPU),
        buffers.full((code.slots,), -1, int64, CPU),
    )
    _cpu.by_latent(code, latent_order(code, *order), torch.get_num_threads())
    return order
