"""Floats as integers that order the same way, and the k-th largest of them bit by bit: device code for every selection.

A key is the bits of a float32, flipped for negative numbers, so that integers compare as the floats do. NaN gets the
largest key. Only positive floats are ever selected here, so a search starts from key 0, the float +0.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_of(value):
    """int32 key of float32 values."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(value == value, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def kth_key(keys, k, LAST_BIT: tl.constexpr):
    """The k-th largest of `keys` (1D), cut below LAST_BIT, so never more than it; 0 where fewer than k are positive.

    One count of the whole list per bit: 31 - LAST_BIT rounds, no sort, no memory.
    """
    found = tl.full((), 0, tl.int32)
    for i in range(0, 31 - LAST_BIT):
        trial = found | (1 << (30 - i))
        enough = tl.sum((keys >= trial).to(tl.int32), axis=0) >= k
        found = tl.where(enough, trial, found)
    return found
