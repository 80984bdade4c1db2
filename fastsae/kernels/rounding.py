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


@triton.jit
def from_fp8(codes):
    """float8_e4m3fn's value of each byte, float32: its exponent and mantissa moved to a float32's, then its bias."""
    bits = codes.to(tl.int32)
    size = bits & 0x7F
    value = (size << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2¹²⁰
    value = tl.where(size == 0x7F, float("nan"), value)
    return tl.where(bits >= 0x80, -value, value)


@triton.jit
def round_to_fp8(t, key, index, POSITIVE: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """t (BLOCKS · WIDTH,) float32 as bytes of float8_e4m3fn, rounded up or down at random, and the scales (BLOCKS,) of
    WIDTH numbers each. index: uint32, as in `round_to_bf16`. POSITIVE: a positive number never becomes 0."""
    sizes = t.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # as whole numbers, so that NaN is the largest
    largest = tl.max(tl.reshape(sizes, (BLOCKS, WIDTH)), axis=1).to(tl.float32, bitcast=True)
    scales = tl.div_rn(largest, tl.full((BLOCKS,), 448.0, tl.float32))
    by = tl.reshape(tl.broadcast_to(scales[:, None], (BLOCKS, WIDTH)), (BLOCKS * WIDTH,))
    usable = (by > 0) & (by < float("inf"))
    q = tl.where(usable, tl.div_rn(t, tl.where(usable, by, 1.0)), 0.0)

    size, sign = tl.abs(q), (q.to(tl.int32, bitcast=True) >> 24) & 0x80
    noise = (mix(key ^ index) & 0xFFFFF).to(tl.int32)
    normal = ((size.to(tl.int32, bitcast=True) + noise) >> 20) - 960  # 120 exponents of 8
    small = tl.floor(size * 512.0 + noise.to(tl.float32) * (2.0**-20)).to(tl.int32)
    codes = tl.where(size >= 2.0**-6, tl.minimum(normal, 0x7E), small)
    if POSITIVE:
        codes = tl.where((t > 0) & (codes == 0), 1, codes)
    return (codes | sign).to(tl.uint8), scales
