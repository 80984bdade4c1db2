"""Appends to each token's list the latents of a chunk whose screened score v ± e reaches the token's bar: v + e > τ.

One program takes BLOCK_N tokens and walks over the chunk BLOCK_C columns at a time: a score's bound needs four numbers
of its latent, and sharing them among tokens divides that traffic, which would otherwise be ten times the scores'. A
running count per token places the survivors, by a prefix sum inside the tile: in order, without atomics. What does not
fit the list is counted and not stored. NaN always survives.

Bytes: N·columns·2 + (N/BLOCK_N)·columns·16 + 8 a survivor, from and to L2 mostly.
Flops: about 12·N·columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.backends.gpu.bounds import roundoff
from fastsae.kernels.limits import register_limit
from fastsae.kernels.screening import bounded_score
from fastsae.kernels.variants import POINTERS, Variant

BLOCK_N = 8
BLOCK_C = 256
NUM_WARPS = 4
REGISTERS = 200


@triton.jit
def _survivors_kernel(
    scores_ptr, table_ptr, bounds_ptr, bars_ptr, limit_ptr, values_ptr, places_ptr, counts_ptr,
    N, row_stride, width, chunk, stride, base, capacity,
    ROUNDOFF: tl.constexpr, PER_LATENT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Shapes: the columns of this chunk that stand for positions below the limit.
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_token = n < N
    columns = tl.minimum(width, (tl.load(limit_ptr) - chunk + stride - 1) // stride)
    if columns <= 0:
        return

    # Load what belongs to the tokens.
    token_scale = tl.load(bounds_ptr + n, mask=is_token, other=0.0)[:, None]
    p = tl.load(bounds_ptr + N + n, mask=is_token, other=0.0)[:, None]
    q = tl.load(bounds_ptr + 2 * N + n, mask=is_token, other=0.0)[:, None]
    tiny = tl.load(bounds_ptr + 3 * N + n, mask=is_token, other=0.0)[:, None]
    if not PER_LATENT:
        bar = tl.load(bars_ptr + n, mask=is_token, other=float("inf"))[:, None]
    count = tl.load(counts_ptr + n, mask=is_token, other=0)
    row = n.to(tl.int64)[:, None]

    for start in range(0, columns, BLOCK_C):
        # Load and score a tile.
        c = start + tl.arange(0, BLOCK_C)
        inside = c < columns
        scale = tl.load(table_ptr + c, mask=inside, other=0.0)[None, :]
        bias = tl.load(table_ptr + width + c, mask=inside, other=0.0)[None, :]
        A = tl.load(table_ptr + 2 * width + c, mask=inside, other=0.0)[None, :]
        B = tl.load(table_ptr + 3 * width + c, mask=inside, other=0.0)[None, :]
        live = is_token[:, None] & inside[None, :]
        stored = tl.load(scores_ptr + row * row_stride + c[None, :], mask=live, other=0.0).to(tl.float32)
        v, e = bounded_score(stored, token_scale, p, q, tiny, scale, bias, A, B, ROUNDOFF)
        if PER_LATENT:
            keep = live & ~(v + e <= tl.load(table_ptr + 4 * width + c, mask=inside, other=0.0)[None, :])
        else:
            keep = live & ~(v + e <= bar)

        # Place and store: after those that are there, in the order of the columns.
        ones = keep.to(tl.int32)
        slot = count[:, None] + tl.cumsum(ones, axis=1) - 1
        place = row * capacity + slot
        tl.store(values_ptr + place, v, mask=keep & (slot < capacity))
        tl.store(places_ptr + place, base + c[None, :] + tl.zeros_like(slot), mask=keep & (slot < capacity))
        count += tl.sum(ones, axis=1)
    tl.store(counts_ptr + n, count, mask=is_token)


def append(
    scores: Tensor,
    table: Tensor,
    bounds: Tensor,
    bars: Tensor,
    limit: Tensor,
    values: Tensor,
    places: Tensor,
    counts: Tensor,
    chunk: int,
    stride: int,
    base: int,
    per_latent: bool = False,
) -> None:
    """Appends to values and places (N, capacity) and counts (N,) from scores (N, width).

    Column c is the position chunk + c · stride, which must be below limit (0-d int32); its place is base + c, under
    which the table of all chunks knows it. bars (N,): each token's bar; per_latent: the table's thresholds instead.
    """
    n, width = counts.shape[0], table.shape[1]
    _survivors_kernel[(triton.cdiv(n, BLOCK_N),)](
        scores, table, bounds, bars, limit, values, places, counts,
        n, scores.stride(0), width, chunk, stride, base, values.shape[1],
        ROUNDOFF=roundoff(scores.dtype), PER_LATENT=per_latent, BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_C, num_warps=NUM_WARPS,
        **register_limit(REGISTERS), enable_fp_fusion=True,
    )  # fmt: skip


def variants() -> list[Variant]:
    found = []
    for dtype, per_latent in ((torch.float16, False), (torch.float16, True), (torch.float32, False)):
        signature = {
            "scores_ptr": POINTERS[dtype], "table_ptr": "*fp32", "bounds_ptr": "*fp32", "bars_ptr": "*fp32",
            "limit_ptr": "*i32", "values_ptr": "*fp32", "places_ptr": "*i32", "counts_ptr": "*i32",
            **dict.fromkeys(("N", "row_stride", "width", "chunk", "stride", "base", "capacity"), "i32"),
        }  # fmt: skip
        constants = {
            "ROUNDOFF": roundoff(dtype), "PER_LATENT": per_latent, "BLOCK_N": BLOCK_N, "BLOCK_C": BLOCK_C,
        }  # fmt: skip
        name = f"survivors/{POINTERS[dtype][1:]}{'/threshold by latent' if per_latent else ''}"
        aligned = ("N", "row_stride", "width", "base")
        found.append(
            Variant(_survivors_kernel, name, signature, constants, NUM_WARPS, aligned=aligned, maxnreg=REGISTERS)
        )
    return found
