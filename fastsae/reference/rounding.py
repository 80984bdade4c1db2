"""Narrow storage of moments: bfloat16, and 8 bits under a scale for each block; both rounded at random.

Rounding to nearest would stall: with β₂ = 0.999 a step moves v by at most a thousandth of itself towards g², far below
half a unit in the last place of bfloat16 (2⁻⁹ of the number) or of 3 mantissa bits (2⁻⁵), so v would never
change. Rounded up or down at random with the mean kept, it moves a whole unit now and then and is right on average.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
"""Numbers of a row that share the scale of an 8-bit moment."""
LARGEST = 448.0
"""Of float8_e4m3fn, which has 3 mantissa bits, a smallest normal number of 2⁻⁶ and steps of 2⁻⁹ below that."""


@dataclass(frozen=True, eq=False)
class EightBit:
    """A moment in 8 bits: number d of row i is codes[i, d] · scales[i, d // 128].

    codes (rows, D) float8_e4m3fn; scales (rows, ceil(D / 128)) float32.
    """

    codes: Tensor
    scales: Tensor

    def widened(self) -> Tensor:
        """(rows, D) float32."""
        return self.codes.float() * _spread(self.scales, self.codes.shape[1])


def scales_shape(p: Tensor) -> tuple[int, int]:
    """The shape of the scales of an 8-bit moment of a dictionary p (M, D)."""
    return p.shape[0], -(-p.shape[1] // BLOCK)


def _spread(scales: Tensor, width: int) -> Tensor:
    return scales.repeat_interleave(BLOCK, 1)[:, :width]


def _mix(h: Tensor) -> Tensor:
    """A permutation of 32-bit integers held in int64 that scatters neighbours (lowbias32 by C. Wellons)."""
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D) & 0xFFFFFFFF
    h = h ^ (h >> 15)
    h = (h * 0x846CA68B) & 0xFFFFFFFF
    return h ^ (h >> 16)


def _random_bits(t: Tensor, seed: int, step: Tensor, stream: int, before: int) -> Tensor:
    """32 bits for each number of t, as int64: a hash of (seed, step, stream, flat index) and of nothing else.

    The flat index counts from `before`, where t is rows of a larger tensor.

    With key = mix(mix(mix(seed) + step) + stream), all mod 2³², they are mix(key ^ index).
    """
    key = _mix(torch.full((), seed & 0xFFFFFFFF, dtype=torch.int64, device=t.device))
    key = _mix((_mix((key + step) & 0xFFFFFFFF) + stream) & 0xFFFFFFFF)
    index = (torch.arange(t.numel(), dtype=torch.int64, device=t.device).view(t.shape) + before) & 0xFFFFFFFF
    return _mix(key ^ index)


def _bits(t: Tensor) -> Tensor:
    """float32's bits as int64."""
    return t.contiguous().view(torch.int32).long() & 0xFFFFFFFF


def _from_bits(bits: Tensor) -> Tensor:
    return torch.where(bits >= 2**31, bits - 2**32, bits).int().view(torch.float32)


def mixed(numbers: Tensor, seed: int) -> Tensor:
    """32 random-looking bits for each of the whole numbers, int64: a function of (seed, number) and nothing else."""
    key = _mix(torch.full((), seed & 0xFFFFFFFF, dtype=torch.int64, device=numbers.device))
    return _mix(key ^ (numbers & 0xFFFFFFFF))


def round_to_bf16(t: Tensor, seed: int, step: Tensor, stream: int, before: int = 0) -> Tensor:
    """t (float32) as bfloat16, rounded up or down at random so that the mean is t.

    The 16 random bits of an element are the low half of `_random_bits`. Adding them to float32's bits before dropping
    the low half carries with probability equal to the dropped fraction. A number beyond bfloat16's largest becomes
    that one, not infinity.
    """
    noise, bits = _random_bits(t, seed, step, stream, before) & 0xFFFF, _bits(t)
    bits = torch.where((bits & 0x7FFFFFFF) < 0x7F7F0000, bits + noise, bits) & 0xFFFF0000
    return _from_bits(bits).bfloat16()


def round_to_fp8(
    t: Tensor, seed: int, step: Tensor, stream: int, keep_positive: bool, before: int = 0
) -> EightBit:  # fmt: skip
    """t (rows, D) float32 in 8 bits, q = t / scale rounded up or down at random so that the mean is q.

    scale = absmax / 448 of the block; of a block of zeros it is 0, and so are its codes. With the low 20 of the
    element's random bits: |q| >= 2⁻⁶ gets them added below the 3 mantissa bits that stay; a smaller one becomes
    ⌊|q| · 2⁹ + bits / 2²⁰⌋ · 2⁻⁹. Never more than 448.

    keep_positive (for v): a positive number never becomes 0, but at least 2⁻⁹: a second moment of 0 under a first that
    is not would make a step of m / eps. A block with a number that is not finite decodes to no finite numbers.
    """
    width = t.shape[1]
    blocks = torch.nn.functional.pad(t, (0, -width % BLOCK)).view(t.shape[0], -1, BLOCK)
    largest = blocks.abs().amax(-1)
    scales = largest / torch.full_like(largest, LARGEST)  # with a Python number CUDA multiplies by 1/448 instead
    by = _spread(scales, width)
    usable = (by > 0) & by.isfinite()
    q = torch.where(usable, t / torch.where(usable, by, 1), 0)
    noise, size = _random_bits(t, seed, step, stream, before) & 0xFFFFF, q.abs()
    normal = _from_bits((_bits(size) + noise) & 0xFFF00000).clamp(max=LARGEST)
    small = (size * 2**9 + noise.float() * 2**-20).floor() * 2**-9
    rounded = torch.where(size >= 2**-6, normal, small)
    if keep_positive:
        rounded = torch.where((t > 0) & (rounded == 0), 2**-9, rounded)
    return EightBit(rounded.copysign(q).to(torch.float8_e4m3fn), scales)
