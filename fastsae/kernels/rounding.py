"""Stochastic rounding to bfloat16 by a counter: the same bits as reference.round_to_bf16, as device functions.

key = mix(mix(mix(seed) + step) + stream);  bf16 = high half of (bits of t + low half of mix(key ^ index))
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix(h):
    """A permutation of uint32 that scatters neighbours (lowbias32 by C. Wellons)."""
    h = h ^ (h >> 16)
    h = tl.mul(h, 0x7FEB352D, sanitize_overflow=False)
    h = h ^ (h >> 15)
    h = tl.mul(h, 0x846CA68B, sanitize_overflow=False)
    return h ^ (h >> 16)


@triton.jit
def stream_key(seed, step, stream):
    """uint32 key of one tensor in one step; seed and step are taken mod 2³²."""
    key = tl.add(mix(seed.to(tl.uint32)), step.to(tl.uint32), sanitize_overflow=False)
    return mix(tl.add(mix(key), stream.to(tl.uint32), sanitize_overflow=False))


@triton.jit
def round_to_bf16(t, key, index):
    """t (float32) rounded up or down at random; index: uint32, the flat place of each number in its tensor."""
    bits = t.to(tl.uint32, bitcast=True)
    # bfloat16's largest number stays, which would become infinite, and so do infinities and NaN.
    small = (bits & 0x7FFFFFFF) < 0x7F7F0000
    noise = tl.where(small, mix(key ^ index) & 0xFFFF, 0).to(tl.uint32)
    bits = tl.add(bits, noise, sanitize_overflow=False)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
