"""Ragged codes on the device: how many scores of each token are above its threshold, and then those, packed.

Two passes with a prefix sum between them: count, then emit. One program takes one token. A token's scores come from its
list of exactly scored survivors; where that list was too short, every latent is scored again, in both passes, because
only the device knows which tokens those are. Entries ascend by latent because lists and walks do.

Bytes: 8 a listed score in each pass, 8 an entry written; M·D·sizeof(W) in each for a token whose list was too short.
Flops: 2·M·D in each pass for such a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.backends import buffers
from fastsae.kernels.dots import BLOCK_D, BLOCK_L, NUM_WARPS
from fastsae.kernels.keys import key_of
from fastsae.kernels.limits import register_limit
from fastsae.kernels.rescore import exact_scores
from fastsae.kernels.variants import POINTERS, Variant

BLOCK = 256
PROGRAMS = 1024
REGISTERS = 160


@triton.jit
def is_above(score, thresholds_ptr, n, latent, live, PER_LATENT: tl.constexpr):
    """Which live scores of token n are above their latent's threshold, or their token's. NaN is."""
    if PER_LATENT:
        return live & ~(score <= tl.load(thresholds_ptr + latent, mask=live, other=0.0))
    else:
        return live & ~(score <= tl.load(thresholds_ptr + n))


@triton.jit
def put(score, latent, keep, filled, room, acts_row, indices_row):
    """Stores the kept scores from slot `filled` of a row on, as far as there is room; returns their count."""
    slot = filled + tl.cumsum(keep.to(tl.int32), axis=0) - 1
    stored = keep & (slot < room)
    tl.store(acts_row + slot, score.to(acts_row.dtype.element_ty), mask=stored)
    tl.store(indices_row + slot, latent, mask=stored)
    return filled + tl.sum(keep.to(tl.int32), axis=0)


@triton.jit
def row_of(offsets_ptr, n, capacity):
    """Where a token's entries begin, and how many slots there are from there on, as int32."""
    first = tl.load(offsets_ptr + n)
    return first, tl.maximum(tl.minimum(capacity - first, 0x7FFFFFFF), 0).to(tl.int32)


@triton.jit
def _listed_kernel(
    latents_ptr, scores_ptr, found_ptr, thresholds_ptr, offsets_ptr, totals_ptr, acts_ptr, indices_ptr,
    slots, capacity, EMIT: tl.constexpr, PER_LATENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    found = tl.load(found_ptr + n)
    if found > slots:  # its list was too short
        return
    if EMIT:
        first, room = row_of(offsets_ptr, n, capacity)
    filled = tl.full((), 0, tl.int32)
    for start in range(0, found, BLOCK):
        i = start + tl.arange(0, BLOCK)
        live = i < found
        score = tl.load(scores_ptr + n * slots + i, mask=live, other=0.0)
        latent = tl.load(latents_ptr + n * slots + i, mask=live, other=0)
        keep = is_above(score, thresholds_ptr, n, latent, live, PER_LATENT)
        if EMIT:
            filled = put(score, latent, keep, filled, room, acts_ptr + first, indices_ptr + first)
        else:
            filled += tl.sum(keep.to(tl.int32), axis=0)
    if not EMIT:
        tl.store(totals_ptr + n, filled.to(tl.int64))


@triton.jit
def _every_kernel(
    x_ptr, w_ptr, b_ptr, list_ptr, listed_ptr, thresholds_ptr, least_ptr, ties_ptr, offsets_ptr, totals_ptr, acts_ptr,
    indices_ptr, M, D, capacity, programs,
    EMIT: tl.constexpr, BY_KEY: tl.constexpr, PER_LATENT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    for t in range(tl.program_id(0), tl.load(listed_ptr), programs):
        # Shapes and thresholds: a key with the number of its ties that this token may take, or scores.
        n = tl.load(list_ptr + t).to(tl.int64)
        if EMIT:
            first, room = row_of(offsets_ptr, n, capacity)
        filled, ties = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
        least, free = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
        if BY_KEY:
            least = tl.load(least_ptr)
            if EMIT:
                free = tl.load(ties_ptr + n).to(tl.int32)
        for start in range(0, M, BLOCK_L):
            # Score a block and keep what is above.
            latent = start + tl.arange(0, BLOCK_L)
            live = latent < M
            score = exact_scores(x_ptr + n * D, w_ptr, b_ptr, None, latent, live, D, BLOCK_L, BLOCK_D)
            if BY_KEY:
                key = key_of(score)
                seen = live & (key > 0) & (score.to(acts_ptr.dtype.element_ty).to(tl.float32) != 0)
                keep = seen & (key > least)
                tie = seen & (key == least)
                if EMIT:
                    keep = keep | (tie & (ties + tl.cumsum(tie.to(tl.int32), axis=0) <= free))
                ties += tl.sum(tie.to(tl.int32), axis=0)
            else:
                keep = is_above(score, thresholds_ptr, n, latent, live, PER_LATENT)
            if EMIT:
                filled = put(score, latent, keep, filled, room, acts_ptr + first, indices_ptr + first)
            else:
                filled += tl.sum(keep.to(tl.int32), axis=0)
        if not EMIT:
            tl.store(totals_ptr + n, filled.to(tl.int64))
            if BY_KEY:
                tl.store(ties_ptr + n, ties.to(tl.int64))


@triton.jit
def _histogram_kernel(
    x_ptr, w_ptr, b_ptr, needed_ptr, prefix_ptr, bins_ptr, M, D,
    SHIFT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Counts positive keys by their upper 15 bits, or by their lower 16 among those that share the upper ones."""
    if tl.load(needed_ptr) == 0:
        return
    n = tl.program_id(0).to(tl.int64)
    for start in range(0, M, BLOCK_L):
        latent = start + tl.arange(0, BLOCK_L)
        live = latent < M
        key = key_of(exact_scores(x_ptr + n * D, w_ptr, b_ptr, None, latent, live, D, BLOCK_L, BLOCK_D))
        counted = live & (key > 0)
        if SHIFT == 0:
            counted &= (key >> 16) == tl.load(prefix_ptr)
        # Counts of integers: whatever the order of the additions, the sum is the same.
        tl.atomic_add(bins_ptr + ((key >> SHIFT) & 0xFFFF), counted.to(tl.int64), mask=counted)


def count_listed(
    latents: Tensor, scores: Tensor, found: Tensor, thresholds: Tensor, per_latent: bool, totals: Tensor
) -> None:
    """Fills totals (N,) int64 of the tokens whose list (N, slots) was long enough."""
    _listed_kernel[(found.shape[0],)](
        latents, scores, found, thresholds, None, totals, None, None, latents.shape[1], 0,
        EMIT=False, PER_LATENT=per_latent, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True,
    )  # fmt: skip


def emit_listed(
    latents: Tensor,
    scores: Tensor,
    found: Tensor,
    thresholds: Tensor,
    per_latent: bool,
    offsets: Tensor,
    acts: Tensor,
    indices: Tensor,
) -> None:
    """Writes those tokens' entries at their offsets (N+1,) into acts and indices (capacity,)."""
    _listed_kernel[(found.shape[0],)](
        latents, scores, found, thresholds, offsets, None, acts, indices, latents.shape[1], acts.shape[0],
        EMIT=True, PER_LATENT=per_latent, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True,
    )  # fmt: skip


def every_latent(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    tokens: Tensor,
    listed: Tensor,
    acts: Tensor,
    indices: Tensor,
    *,
    totals: Tensor | None = None,
    offsets: Tensor | None = None,
    thresholds: Tensor | None = None,
    per_latent: bool = False,
    least: Tensor | None = None,
    ties: Tensor | None = None,
) -> None:
    """Counts into totals (and ties), or with offsets emits, the listed tokens' scores above thresholds, or above a key.

    least (0-d int32): entries with a larger key, and of those with that key the first ties[n] of a token.
    """
    programs = min(PROGRAMS, x.shape[0])
    if programs:
        _every_kernel[(programs,)](
            x, W, b, tokens, listed, thresholds, least, ties, offsets, totals, acts, indices,
            W.shape[0], W.shape[1], acts.shape[0], programs,
            EMIT=offsets is not None, BY_KEY=least is not None, PER_LATENT=per_latent,
            BLOCK_L=BLOCK_L, BLOCK_D=BLOCK_D, num_warps=NUM_WARPS,
            **register_limit(REGISTERS), enable_fp_fusion=True,
        )  # fmt: skip


def histogram(x: Tensor, W: Tensor, b: Tensor, needed: Tensor, prefix: Tensor | None) -> Tensor:
    """int64 (65536,): positive keys by their upper bits, or by their lower 16 where the upper are `prefix`."""
    bins = buffers.zeros((1 << 16,), torch.int64, x.device)
    if x.shape[0]:
        _histogram_kernel[(x.shape[0],)](
            x, W, b, needed, prefix, bins, W.shape[0], W.shape[1],
            SHIFT=16 if prefix is None else 0, BLOCK_L=BLOCK_L, BLOCK_D=BLOCK_D, num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip
    return bins


def variants() -> list[Variant]:
    value = POINTERS[torch.float32]
    inputs = {"x_ptr": value, "w_ptr": value, "b_ptr": value, "M": "i32", "D": "i32"}
    blocks = {"BLOCK_L": BLOCK_L, "BLOCK_D": BLOCK_D}
    found = []
    for emit in (False, True):
        out = {"acts_ptr": value, "indices_ptr": "*i32"}
        where = {"offsets_ptr": "*i64"} if emit else {"totals_ptr": "*i64"}
        absent = {"totals_ptr": None} if emit else {"offsets_ptr": None}
        what = "emit" if emit else "count"
        lists = {"latents_ptr": "*i32", "scores_ptr": value, "found_ptr": "*i32", "thresholds_ptr": value}
        sizes = {"slots": "i32", "capacity": "i32"}
        found.append(
            Variant(
                _listed_kernel, f"ragged listed/{what}", lists | where | sizes | (out if emit else {}),
                {"EMIT": emit, "PER_LATENT": False, "BLOCK": BLOCK, **absent}
                | ({} if emit else dict.fromkeys(out)), NUM_WARPS,
            )
        )  # fmt: skip
        tokens = {"list_ptr": "*i32", "listed_ptr": "*i32", "capacity": "i32", "programs": "i32"}
        flags = {"EMIT": emit, "PER_LATENT": False, **blocks, **absent}
        found.append(
            Variant(
                _every_kernel, f"ragged every/{what}/threshold",
                inputs | tokens | where | out | {"thresholds_ptr": value},
                flags | {"BY_KEY": False, "least_ptr": None, "ties_ptr": None},
                NUM_WARPS, aligned=("D",), maxnreg=REGISTERS,
            )
        )  # fmt: skip
        found.append(
            Variant(
                _every_kernel, f"ragged every/{what}/key",
                inputs | tokens | where | out | {"least_ptr": "*i32", "ties_ptr": "*i64"},
                flags | {"BY_KEY": True, "thresholds_ptr": None}, NUM_WARPS, aligned=("D",), maxnreg=REGISTERS,
            )
        )  # fmt: skip
    for shift in (16, 0):
        found.append(
            Variant(
                _histogram_kernel, f"ragged histogram/shift={shift}",
                inputs | {"needed_ptr": "*i32", "bins_ptr": "*i64"} | ({} if shift else {"prefix_ptr": "*i32"}),
                {"SHIFT": shift, **blocks} | ({"prefix_ptr": None} if shift else {}),
                NUM_WARPS, aligned=("D",),
            )
        )  # fmt: skip
    return found
