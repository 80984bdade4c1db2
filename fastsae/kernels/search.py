"""Binary search in ascending numbers, as a device function."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_up_to(sorted_ptr, size, value, BITS: tl.constexpr):
    """How many of the `size` ascending integers are <= value: int32, shaped like value (a block or a scalar).

    BITS = size.bit_length(). The count is found bit by bit, so every lane takes the same BITS steps. size < 2³¹.
    """
    found = (value * 0).to(tl.int32)
    for bit in tl.static_range(BITS):
        further = found + (1 << (BITS - 1 - bit))
        inside = further <= size
        number = tl.load(sorted_ptr + further - 1, mask=inside, other=0)
        found = tl.where(inside & (number <= value), further, found)
    return found
