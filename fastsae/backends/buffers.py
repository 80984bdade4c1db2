"""Memory for native code: the one place that allocates what C++, CUDA and Triton read and write.

Native code gets a buffer as an address and does not check its dtype, device or size. torch has defaults for the
first two, and any part of a program may change them at any time (torch.set_default_dtype, torch.set_default_device,
`with torch.device(...)`). With bfloat16 as the default, torch.empty(N, K) is half as long as what C++ writes into it in
float32. So dtype and device are arguments here, and have no default.

Sizes are Python integers, which do not wrap. A size that does not fit native code's integers raises, with its name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MOST_BYTES = 2**63 - 1
MOST_INT32 = 2**31 - 1


def check_size(shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raises ValueError for a negative size, or for one whose bytes overflow int64."""
    if any(size < 0 for size in shape):
        raise ValueError(f"a buffer has shape {tuple(shape)}, expected sizes of 0 or more")
    if math.prod(shape) * dtype.itemsize > MOST_BYTES:
        raise ValueError(
            f"a buffer has shape {tuple(shape)} and dtype {dtype}, expected at most {MOST_BYTES} bytes, which "
            "int64 can count; pass fewer tokens at a time, or a smaller capacity"
        )


def count_int32(what: str, n: int) -> int:
    """n, a number that native code counts in int32. Raises ValueError if it does not fit."""
    if not 0 <= n <= MOST_INT32:
        raise ValueError(
            f"{what}: {n}, expected 0 to {MOST_INT32}, since they are counted in int32; pass fewer tokens at a time"
        )
    return n


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Not filled. Raises ValueError as `check_size` does."""
    check_size(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    check_size(shape, dtype)
    return torch.zeros(shape, dtype=dtype, device=device)


def full(shape: Sequence[int], value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    check_size(shape, dtype)
    return torch.full(shape, value, dtype=dtype, device=device)


def scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0-d."""
    return torch.full((), value, dtype=dtype, device=device)


def arange(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0, 1, ..., n - 1."""
    check_size((n,), dtype)
    return torch.arange(n, dtype=dtype, device=device)
