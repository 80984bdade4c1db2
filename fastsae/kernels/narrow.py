"""t̂ = fp16(t · 2ᵉ) row by row, with ‖t̂‖ and ‖t - t̂‖ measured at the cast: the copy that a product screens with.

One program narrows a few rows: a pass for the largest magnitude, which puts the row's largest element in [1/2, 1),
and a pass that rounds and measures. fp16 has three more bits than bf16 and the tensor cores multiply both at the same
rate; the scale by row keeps its short exponent from mattering. Norms are of the unscaled row and rounded up, so a
bound built on them holds: with x = x̂ + r, w = ŵ + q, |⟨x, w⟩ - ⟨x̂, ŵ⟩| <= ‖r‖‖ŵ‖ + ‖x‖‖q‖.

Bytes: D·(sizeof(t) + 2) a row, the second pass reads L1 or L2.
Flops: 8·D a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.variants import POINTERS, Variant


@triton.jit
def power_of_two(largest):
    """2ᵉ that brings `largest` > 0 into [1/2, 1), and 2⁻ᵉ; for 0, inf and NaN any finite numbers."""
    exponent = tl.minimum(tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 0xFF, 1), 252)
    up = ((253 - exponent) << 23).to(tl.float32, bitcast=True)
    down = ((exponent + 1) << 23).to(tl.float32, bitcast=True)
    return up, down


@triton.jit
def _narrow_kernel(
    t_ptr, low_ptr, scale_ptr, norm_ptr, residual_ptr, rows, D, padded,
    NARROW: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Shapes.
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = row < rows
    source = t_ptr + row.to(tl.int64)[:, None] * D
    target = low_ptr + row.to(tl.int64)[:, None] * padded

    # The largest magnitude decides the scale; it does not depend on the order of a sum.
    up = tl.full((BLOCK_R,), 1.0, tl.float32)
    down = up
    if NARROW:
        most = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            value = tl.load(source + d[None, :], mask=is_row[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
            most = tl.maximum(most, tl.abs(value))
        up, down = power_of_two(tl.max(most, axis=1))

    # Round, and measure what was kept and what was lost.
    kept = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    lost = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for start in range(0, padded, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        value = tl.load(source + d[None, :], mask=is_row[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        value *= up[:, None]
        low = value.to(low_ptr.dtype.element_ty)
        rest = value - low.to(tl.float32)
        kept += low.to(tl.float32) * low.to(tl.float32)
        lost += rest * rest
        tl.store(target + d[None, :], low, mask=is_row[:, None] & (d < padded)[None, :])

    # Store. 2⁻¹⁶ is more than the sums and roots can have lost.
    tl.store(scale_ptr + row, down, mask=is_row)
    tl.store(norm_ptr + row, tl.sqrt(tl.sum(kept, axis=1)) * down * (1 + 2**-16), mask=is_row)
    tl.store(residual_ptr + row, tl.sqrt(tl.sum(lost, axis=1)) * down * (1 + 2**-16), mask=is_row)


def narrow_rows(t: Tensor, low: Tensor, scale: Tensor, norm: Tensor, residual: Tensor) -> None:
    """Fills the four from t (rows, D). low in float32 is a plain copy, padded: then nothing is lost and scale is 1."""
    rows, D = t.shape
    if rows:
        c = choose(D)
        _narrow_kernel[(triton.cdiv(rows, c.BLOCK_R),)](
            t, low, scale, norm, residual, rows, D, low.shape[1],
            NARROW=low.dtype == torch.float16, BLOCK_R=c.BLOCK_R, BLOCK_D=c.BLOCK_D, num_warps=c.num_warps,
            enable_fp_fusion=True,
        )  # fmt: skip


@dataclass(frozen=True)
class Config:
    BLOCK_R: int
    BLOCK_D: int
    num_warps: int


def choose(D: int) -> Config:
    """Tiles of 2048 numbers, 16 to a thread; whole rows where they fit, several where they are short."""
    width = min(2048, max(64, triton.next_power_of_2(D)))
    return Config(2048 // width, width, num_warps=4)


def variants() -> list[Variant]:
    found = []
    for dtype, low in ((torch.float32, torch.float16), (torch.bfloat16, torch.float16), (torch.float32, torch.float32)):
        for D in (768, 4096, 1000):
            signature = {
                "t_ptr": POINTERS[dtype], "low_ptr": POINTERS[low], "scale_ptr": "*fp32", "norm_ptr": "*fp32",
                "residual_ptr": "*fp32", "rows": "i32", "D": "i32", "padded": "i32",
            }  # fmt: skip
            c = choose(D)
            constants = {"NARROW": low == torch.float16, "BLOCK_R": c.BLOCK_R, "BLOCK_D": c.BLOCK_D}
            name = f"narrow/{POINTERS[dtype][1:]}-{POINTERS[low][1:]}/D={D}"
            aligned = ("D", "padded") if D % 16 == 0 else ("padded",)
            found.append(Variant(_narrow_kernel, name, signature, constants, c.num_warps, aligned=aligned))
    return found
