"""How tensors are passed to the C++ extension: addresses, sizes and dtypes, nothing copied.

Every address that C++ gets is made here, and only here, as _cpu.Numbers: the address of a tensor on the CPU, how many
numbers lie there and of which dtype. This module checks that the tensor's storage holds them all. csrc/cpu/given.h
checks that they are as many, and of the dtype, as a kernel reads or writes, and that values used as indices lie inside.

Numbers keep their tensor alive, and what is made of them keeps them. No other thread writes the tensor meanwhile.
torch is imported before the extension, so that both use one OpenMP runtime.
"""

from __future__ import annotations

import torch
from torch import Tensor, float32, float64, int32, int64
from torch import bfloat16 as bf16

from fastsae import _cpu
from fastsae.backends import buffers

CPU = torch.device("cpu")
DTYPES = {float32: _cpu.Dtype.f32, bf16: _cpu.Dtype.bf16, float64: _cpu.Dtype.f64}
KINDS = DTYPES | {int32: _cpu.Dtype.i32, int64: _cpu.Dtype.i64, torch.float8_e4m3fn: _cpu.Dtype.fp8}


def _place(name: str, t: Tensor, dtype: torch.dtype, span: int) -> _cpu.Numbers:
    """`span` numbers of dtype, the first of t and those after it. A few microseconds.

    Raises TypeError for another dtype, ValueError if they do not lie in t's memory, or not on the CPU.
    """
    if t.dtype != dtype:
        raise TypeError(f"{name} is {t.dtype} where C++ expects {dtype}; cast with .to({dtype})")
    if t.device.type != "cpu" or t.layout != torch.strided:
        raise ValueError(f"{name} is a {t.layout} tensor on {t.device}, expected a dense one on the CPU")
    there = t.untyped_storage().nbytes() // t.itemsize - t.storage_offset()
    if span and span > there:  # nothing lies anywhere: an empty slice may begin past the end of its storage
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
    return _cpu.Numbers(place, span, KINDS[dtype], t)


def numbers(name: str, t: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> _cpu.Numbers | None:
    """The numbers of a contiguous tensor of this shape; None for None.

    Raises TypeError for another dtype, ValueError for another shape or a tensor not contiguous in the CPU's memory.
    """
    if t is None:
        return None
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
    return _cpu.Matrix(_place(name, t, t.dtype, span), rows, cols, apart if rows > 1 else cols)


def codes(acts: Tensor, indices: Tensor, offsets: Tensor | None, d_sae: int) -> _cpu.Codes:
    """A fixed-K code (N, K), or a ragged one (capacity,) with offsets (N+1,). Raises as `address` and `matrix` do."""
    if acts.dtype not in DTYPES:
        raise TypeError(f"acts are {acts.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    shape = tuple(acts.shape)
    if len(shape) != (2 if offsets is None else 1):
        raise ValueError(f"acts have shape {shape}, expected (N, K), or (capacity,) where there are offsets")
    n, k = shape if offsets is None else (offsets.numel() - 1, 0)
    if n < 0:
        raise ValueError("offsets are empty, expected one number more than there are tokens")
    return _cpu.Codes(
        numbers("acts", acts, acts.dtype, shape),
        numbers("indices", indices, int32, shape),
        numbers("offsets", offsets, int64, (n + 1,)),
        n,
        k,
        d_sae,
    )


def latent_order(code: _cpu.Codes, offsets: Tensor, tokens: Tensor, slots: Tensor) -> _cpu.LatentOrder:
    """The order of this code: offsets (d_sae + 1,) int64, tokens int32 and slots int64 for as many slots as it has."""
    return _cpu.LatentOrder(
        numbers("by_latent's offsets", offsets, int64, (code.d_sae + 1,)),
        numbers("by_latent's tokens", tokens, int32, (code.slots,)),
        numbers("by_latent's slots", slots, int64, (code.slots,)),
    )


def sort(code: _cpu.Codes) -> tuple[_cpu.LatentOrder, list[Tensor]]:
    """A code's latent order, and the tensors that hold it: offsets, tokens, slots; -1 past the last entry, so that a
    read past it shows."""
    held = [
        buffers.empty((code.d_sae + 1,), int64, CPU),
        buffers.full((code.slots,), -1, int32, CPU),
        buffers.full((code.slots,), -1, int64, CPU),
    ]
    order = latent_order(code, *held)
    _cpu.by_latent(code, order, torch.get_num_threads())
    return order, held
