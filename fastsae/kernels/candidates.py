"""From a token's survivors those that can be among its K largest, and whether it is certain that they all are there.

One program takes one token. With L the K-th largest lower end v - e of the survivors, K latents score at least L; so
only v + e >= L can belong to the K largest. A latent that did not survive scores at most the bar τ. So if L > τ no
latent is missing, and if τ = 0 only latents whose act would be 0, an empty slot. Such a token is certified, unless a
list was too short.

Bytes: 24 a survivor, 8 a candidate.
Flops: 31·2 a survivor, integer.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.backends import buffers
from fastsae.backends.gpu.bounds import TABLE_ROWS, roundoff
from fastsae.backends.gpu.plan import Plan
from fastsae.kernels.keys import key_of, kth_key
from fastsae.kernels.limits import register_limit
from fastsae.kernels.screening import error_of
from fastsae.kernels.variants import Variant

REGISTERS = 224


@triton.jit
def _candidates_kernel(
    values_ptr, places_ptr, counts_ptr, table_ptr, bounds_ptr, bars_ptr, rows_ptr,
    latents_ptr, scores_ptr, found_ptr, certified_ptr, N, K, width, chunks, survivors, candidates,
    ROUNDOFF: tl.constexpr, EXACT: tl.constexpr, TABLE_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Shapes: this token's list.
    n = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + n)
    bar = tl.load(bars_ptr + n)
    i = tl.arange(0, BLOCK)
    live = i < tl.minimum(count, survivors)

    # Load the scores, and from the tables what bounds them.
    v = tl.load(values_ptr + n * survivors + i, mask=live, other=0.0)
    place = tl.load(places_ptr + n * survivors + i, mask=live, other=0)
    chunk, c = place // width, place % width
    e = 0.0
    if EXACT:
        p, q = tl.load(bounds_ptr + N + n), tl.load(bounds_ptr + 2 * N + n)
        tiny = tl.load(bounds_ptr + 3 * N + n)
        entry = table_ptr + chunk * (TABLE_ROWS * width) + c
        bias = tl.load(entry + width, mask=live, other=0.0)
        A = tl.load(entry + 2 * width, mask=live, other=0.0)
        B = tl.load(entry + 3 * width, mask=live, other=0.0)
        e = error_of(v, p, q, tiny, bias, A, B, ROUNDOFF)

    # The K-th largest lower end. NaN has none, and its upper end passes every test.
    lower, upper = v - e, v + e
    least = kth_key(tl.where(live & (lower == lower), key_of(lower), -1), K, 0).to(tl.float32, bitcast=True)
    keep = live & ~((upper < least) | (upper <= 0))
    total = tl.sum(keep.to(tl.int32), axis=0)
    certified = (count <= survivors) & (total <= candidates) & ((least > bar) | (bar == 0))

    # Store, in the order of the list.
    position = chunk + c * chunks
    latent = position
    if rows_ptr is not None:
        latent = tl.load(rows_ptr + position, mask=keep, other=0)
    slot = tl.cumsum(keep.to(tl.int32), axis=0) - 1
    keep &= slot < candidates
    tl.store(latents_ptr + n * candidates + slot, latent, mask=keep)
    tl.store(scores_ptr + n * candidates + slot, v, mask=keep)
    tl.store(found_ptr + n, tl.where(certified, total, 0))
    tl.store(certified_ptr + n, certified.to(tl.int32))


def select(
    values: Tensor,
    places: Tensor,
    counts: Tensor,
    table: Tensor,
    bounds: Tensor,
    bars: Tensor,
    rows: Tensor | None,
    k: int,
    plan: Plan,
    dtype: torch.dtype,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """latents int32 and screened scores fp32 (N, candidates), how many of each token, and certified (N,), both int32.

    A token that is not certified has none. dtype: of the stored scores; exact: by the bound, else by the scores alone.
    """
    n = counts.shape[0]
    latents = buffers.empty((n, plan.candidates), torch.int32, values.device)
    scores = buffers.empty((n, plan.candidates), torch.float32, values.device)
    found, certified = torch.empty_like(counts), torch.empty_like(counts)
    block = triton.next_power_of_2(plan.survivors)
    _candidates_kernel[(n,)](
        values, places, counts, table, bounds, bars, rows, latents, scores, found, certified,
        n, k, plan.width, plan.chunks, plan.survivors, plan.candidates,
        ROUNDOFF=roundoff(dtype), EXACT=exact, TABLE_ROWS=TABLE_ROWS, BLOCK=block, num_warps=warps_of(block),
        **register_limit(REGISTERS), enable_fp_fusion=True,
    )  # fmt: skip
    return latents, scores, found, certified


def warps_of(block: int) -> int:
    """Eight survivors to a thread; 32 in the longest lists, where half the warps have twice the registers."""
    return max(1, min(8, block // 256))


def variants() -> list[Variant]:
    found = []
    for block, rows in ((512, False), (1024, False), (2048, True), (4096, True)):
        signature = {
            "values_ptr": "*fp32", "places_ptr": "*i32", "counts_ptr": "*i32", "table_ptr": "*fp32",
            "bounds_ptr": "*fp32", "bars_ptr": "*fp32", "latents_ptr": "*i32", "scores_ptr": "*fp32",
            "found_ptr": "*i32", "certified_ptr": "*i32",
            **dict.fromkeys(("N", "K", "width", "chunks", "survivors", "candidates"), "i32"),
        }  # fmt: skip
        constants: dict[str, Any] = {
            "ROUNDOFF": roundoff(torch.float16),
            "EXACT": True,
            "TABLE_ROWS": TABLE_ROWS,
            "BLOCK": block,
        }
        if rows:
            signature["rows_ptr"] = "*i32"
        else:
            constants["rows_ptr"] = None
        name = f"candidates/survivors={block}{'/rows' if rows else ''}"
        aligned = ("N", "width", "candidates")
        found.append(
            Variant(_candidates_kernel, name, signature, constants, warps_of(block), aligned=aligned, maxnreg=REGISTERS)
        )  # fmt: skip
    return found
