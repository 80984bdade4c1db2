"""S[n, c] = ⟨x̂[n], Ŵ[row of column c]⟩: one chunk of the screening product, over a list of rows of unknown length.

One program computes BLOCK_N tokens × BLOCK_C columns on the tensor cores. It gathers the rows as it loads them, so a
subset of a dictionary costs no copy. Programs past the end of the list, whose length is on the device, return at once.
If all latents are considered, the chunk is a strided view and cuBLAS computes it instead.

Bytes: N·D·2 + columns·D·2 + N·columns·2 a chunk.
Flops: 2·N·columns·D a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.variants import POINTERS, Variant


@dataclass(frozen=True)
class Config:
    BLOCK_N: int
    BLOCK_C: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


def choose(dtype: torch.dtype, tokens: int) -> Config:
    """128 × 128 and 8 warps are two warp groups of wgmma on sm_90; fp32 products have no tensor cores to fill."""
    if dtype == torch.float32:
        return Config(32, 64, 32, num_warps=4, num_stages=2)
    return Config(128 if tokens > 64 else 64, 128, 64, num_warps=8 if tokens > 64 else 4, num_stages=3)


@triton.jit
def _product_kernel(
    x_ptr, w_ptr, rows_ptr, count_ptr, out_ptr, N, D, width, out_stride, chunk, stride,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Shapes: positions chunk, chunk + stride, ... of the list; nothing to do past its end.
    first = tl.program_id(1) * BLOCK_C
    count = tl.load(count_ptr)
    if chunk + first * stride >= count:
        return
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = first + tl.arange(0, BLOCK_C)
    position = chunk + column * stride
    inside = (column < width) & (position < count)
    row = position.to(tl.int64)
    if rows_ptr is not None:
        row = tl.load(rows_ptr + position, mask=inside, other=0).to(tl.int64)
    x_rows = x_ptr + n.to(tl.int64)[:, None] * D
    w_rows = w_ptr + row[None, :] * D

    # Compute. D is padded to a multiple of 16, and BLOCK_D may still reach past it.
    acc = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_rows + d[None, :], mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)
        w = tl.load(w_rows + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")

    # Store.
    out = out_ptr + n.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & inside[None, :])


def product(x: Tensor, W: Tensor, rows: Tensor | None, count: Tensor, out: Tensor, chunk: int, stride: int) -> None:
    """Fills out (N, columns) for the positions chunk, chunk + stride, ... below count, of rows (P,) int32 or of W."""
    n, D = x.shape
    c = choose(x.dtype, n)
    grid = (triton.cdiv(n, c.BLOCK_N), triton.cdiv(out.shape[1], c.BLOCK_C))
    _product_kernel[grid](
        x, W, rows, count, out, n, D, out.shape[1], out.stride(0), chunk, stride,
        BLOCK_N=c.BLOCK_N, BLOCK_C=c.BLOCK_C, BLOCK_D=c.BLOCK_D, num_warps=c.num_warps, num_stages=c.num_stages,
        enable_fp_fusion=True,
    )  # fmt: skip


def variants() -> list[Variant]:
    found = []
    narrow, wide = torch.float16, torch.float32
    for dtype, tokens, listed in ((narrow, 8192, True), (narrow, 64, True), (wide, 8192, True), (wide, 8192, False)):
        c = choose(dtype, tokens)
        value = POINTERS[dtype]
        signature = {
            "x_ptr": value, "w_ptr": value, "count_ptr": "*i32", "out_ptr": value, "N": "i32",
            "D": "i32", "width": "i32", "out_stride": "i32", "chunk": "i32", "stride": "i32",
        }  # fmt: skip
        constants: dict[str, Any] = {"BLOCK_N": c.BLOCK_N, "BLOCK_C": c.BLOCK_C, "BLOCK_D": c.BLOCK_D}
        if listed:
            signature["rows_ptr"] = "*i32"
        else:
            constants["rows_ptr"] = None
        name = f"product/{value[1:]}/N={tokens}{'' if listed else '/every row'}"
        found.append(
            Variant(
                _product_kernel, name, signature, constants, c.num_warps, c.num_stages,
                aligned=("D", "width", "out_stride"), product=dtype == torch.float16,
            )
        )  # fmt: skip
    return found
