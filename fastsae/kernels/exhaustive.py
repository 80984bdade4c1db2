"""The K largest of a few tokens by scoring every latent: for tokens that no screen could certify, listed on the device.

The host does not know how many there are, so the launches are fixed and return at once if there is nothing to do.
Tokens come in batches of SLOTS: all programs compute their scores together into rows of scratch memory, and one program
per token selects from its row. Two launches do so for the first batch; in a third all programs go through the others:
they draw tickets, for blocks of latents and then for tokens, and wait for what tickets before theirs have to finish,
which belong to programs that run. Scores are those of `rescore`, bit for bit. The K-th key is found bit by bit over the
whole row, then the row is walked through in order: ties go to the lower index.

Bytes: M·D·sizeof(W) for each token of the list, from L2 within a batch; 32·M·4 to select.
Flops: 2·M·D a token.
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

SLOTS = 64
PROGRAMS = 1024
STAYING_PROGRAMS = 512  # all that run at once, and few that find nothing left
TAKEN, SCORED, SELECTED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
BLOCK = 1024
REGISTERS = 160  # of rest
REST_BLOCK = 256  # of a program that also holds a block of dots, without spilling with any of Triton 3.6 to 3.9


@triton.jit
def score_blocks(
    x_row, w_ptr, b_ptr, gate_ptr, rows_ptr, out_row, D, count, first, step,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores of one token for the blocks first, first + step, ... of the positions below count, into out_row."""
    for start in range(first * BLOCK_L, count, step * BLOCK_L):
        position = start + tl.arange(0, BLOCK_L)
        live = position < count
        latent = position
        if rows_ptr is not None:
            latent = tl.load(rows_ptr + position, mask=live, other=0)
        score = exact_scores(x_row, w_ptr, b_ptr, gate_ptr, latent, live, D, BLOCK_L, BLOCK_D)
        tl.store(out_row + position, score, mask=live)


@triton.jit
def select_row(score_row, rows_ptr, count, acts_row, indices_row, K, index_offset, last, BLOCK: tl.constexpr):
    """The K largest positive of a row of `count` scores, in order, as one token of a fixed code."""
    # The K-th largest key.
    least = tl.full((), 0, tl.int32)
    for bit in range(0, 31):
        trial = least | (1 << (30 - bit))
        reached = tl.full((), 0, tl.int32)
        for start in range(0, count, BLOCK):
            i = start + tl.arange(0, BLOCK)
            keys = key_of(tl.load(score_row + i, mask=i < count, other=-1.0))
            reached += tl.sum((keys >= trial).to(tl.int32), axis=0)
        least = tl.where(reached >= K, trial, least)

    # How many lie above it, which says how many of those that share it are taken.
    above = tl.full((), 0, tl.int32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        keys = key_of(tl.load(score_row + i, mask=i < count, other=-1.0))
        above += tl.sum(((keys > least) & (keys > 0)).to(tl.int32), axis=0)
    free = tl.where(least > 0, K - above, 0)

    # Walk through the row in order, and store.
    ties, filled = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        score = tl.load(score_row + i, mask=i < count, other=-1.0)
        keys = key_of(score)
        tie = (keys == least).to(tl.int32)
        taken = (keys > 0) & ((keys > least) | ((tie == 1) & (ties + tl.cumsum(tie, axis=0) <= free)))
        ties += tl.sum(tie, axis=0)
        act = score.to(acts_row.dtype.element_ty)
        taken &= act.to(tl.float32) != 0
        slot = filled + tl.cumsum(taken.to(tl.int32), axis=0) - 1
        latent = i
        if rows_ptr is not None:
            latent = tl.load(rows_ptr + i, mask=taken, other=0)
        tl.store(acts_row + slot, act, mask=taken)
        tl.store(indices_row + slot, latent + index_offset, mask=taken)
        filled += tl.sum(taken.to(tl.int32), axis=0)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        empty = (k >= filled) & (k < K)
        tl.store(acts_row + k, tl.zeros((BLOCK,), dtype=acts_row.dtype.element_ty), mask=empty)
        tl.store(indices_row + k, tl.zeros((BLOCK,), dtype=tl.int32) + last, mask=empty)


@triton.jit
def _scores_kernel(
    x_ptr, w_ptr, b_ptr, gate_ptr, rows_ptr, count_ptr, list_ptr, listed_ptr, scratch_ptr, progress_ptr,
    D, positions, programs, SLOTS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    listed, count = tl.load(listed_ptr), tl.load(count_ptr)
    if tl.program_id(0) == 0:
        for counter in tl.static_range(3):
            tl.store(progress_ptr + counter, 0)
    for t in range(0, tl.minimum(listed, SLOTS)):
        n = tl.load(list_ptr + t).to(tl.int64)
        score_blocks(
            x_ptr + n * D, w_ptr, b_ptr, gate_ptr, rows_ptr, scratch_ptr + (tl.full((), 0, tl.int64) + t) * positions,
            D, count, tl.program_id(0), programs, BLOCK_L, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _select_kernel(
    rows_ptr, count_ptr, list_ptr, listed_ptr, scratch_ptr, acts_ptr, indices_ptr, positions, K, index_offset, last,
    BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    if t >= tl.load(listed_ptr):
        return
    n = tl.load(list_ptr + t).to(tl.int64)
    select_row(
        scratch_ptr + t * positions, rows_ptr, tl.load(count_ptr), acts_ptr + n * K, indices_ptr + n * K, K,
        index_offset, last, BLOCK,
    )  # fmt: skip


@triton.jit
def finish(counter_ptr):
    """Says that this program has finished a part, whose writes are then visible to programs that wait for the count."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="acq_rel")


@triton.jit
def wait_for(counter_ptr, least):
    while tl.atomic_add(counter_ptr, 0, sem="acq_rel") < least:
        pass
    tl.debug_barrier()


@triton.jit
def _rest_kernel(
    x_ptr, w_ptr, b_ptr, gate_ptr, rows_ptr, count_ptr, list_ptr, listed_ptr, scratch_ptr, acts_ptr, indices_ptr,
    progress_ptr, D, positions, K, index_offset, last,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    listed, count = tl.load(listed_ptr), tl.load(count_ptr)
    blocks = tl.cdiv(count, BLOCK_L)
    # The tickets of all batches after the first; the last batch may have fewer tokens than slots.
    tickets = tl.maximum(tl.cdiv(listed, SLOTS) - 1, 0) * (blocks + SLOTS)
    ticket = tl.full((), 0, tl.int32)
    if tickets > 0:
        ticket = tl.atomic_add(progress_ptr + TAKEN, 1)
    while ticket < tickets:
        batch, part = ticket // (blocks + SLOTS) + 1, ticket % (blocks + SLOTS)
        many = tl.minimum(listed - batch * SLOTS, SLOTS)
        if part < blocks:
            wait_for(progress_ptr + SELECTED, (batch - 1) * SLOTS)  # the rows have been read
            for t in range(0, many):
                n = tl.load(list_ptr + batch * SLOTS + t).to(tl.int64)
                row = scratch_ptr + (tl.full((), 0, tl.int64) + t) * positions
                score_blocks(
                    x_ptr + n * D, w_ptr, b_ptr, gate_ptr, rows_ptr, row, D, count, part, blocks, BLOCK_L, BLOCK_D
                )
            finish(progress_ptr + SCORED)
        elif part - blocks < many:
            wait_for(progress_ptr + SCORED, batch * blocks)
            t = part - blocks
            n = tl.load(list_ptr + batch * SLOTS + t).to(tl.int64)
            row = scratch_ptr + t.to(tl.int64) * positions
            select_row(row, rows_ptr, count, acts_ptr + n * K, indices_ptr + n * K, K, index_offset, last, BLOCK)
            finish(progress_ptr + SELECTED)
        ticket = tl.atomic_add(progress_ptr + TAKEN, 1)


def exhaustive_top_k(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    gate: Tensor | None,
    rows: Tensor | None,
    count: Tensor,
    tokens: Tensor,
    listed: Tensor,
    acts: Tensor,
    indices: Tensor,
    offset: int,
    last: int,
) -> None:
    """Writes acts and indices (N, K) of the listed tokens, over the first `count` (0-d int32) of the positions."""
    n, D = x.shape
    k, positions = acts.shape[1], W.shape[0] if rows is None else rows.shape[0]
    slots = min(SLOTS, n)
    scratch = buffers.empty((slots, positions), torch.float32, x.device)
    progress = buffers.empty((3,), torch.int32, x.device)
    programs = min(PROGRAMS, triton.cdiv(positions, BLOCK_L))
    block = min(BLOCK, max(64, triton.next_power_of_2(positions)))
    blocks = {"BLOCK_L": BLOCK_L, "BLOCK_D": BLOCK_D}
    _scores_kernel[(programs,)](
        x, W, b, gate, rows, count, tokens, listed, scratch, progress, D, positions, programs,
        SLOTS=slots, **blocks, num_warps=NUM_WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    _select_kernel[(slots,)](
        rows, count, tokens, listed, scratch, acts, indices, positions, k, offset, last, BLOCK=block, num_warps=8,
        enable_fp_fusion=True,
    )  # fmt: skip
    if n > slots:
        _rest_kernel[(STAYING_PROGRAMS,)](
            x, W, b, gate, rows, count, tokens, listed, scratch, acts, indices, progress, D, positions, k, offset, last,
            SLOTS=slots, BLOCK=min(REST_BLOCK, block), **blocks, num_warps=NUM_WARPS, **register_limit(REGISTERS),
            enable_fp_fusion=True,
        )  # fmt: skip


def variants() -> list[Variant]:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        value = POINTERS[dtype]
        inputs = {"x_ptr": value, "w_ptr": value, "b_ptr": value}
        lists = {"count_ptr": "*i32", "list_ptr": "*i32", "listed_ptr": "*i32", "scratch_ptr": "*fp32"}
        outputs = {"acts_ptr": value, "indices_ptr": "*i32"}
        progress = {"progress_ptr": "*i32"}
        blocks = {"BLOCK_L": BLOCK_L, "BLOCK_D": BLOCK_D}
        for kernel, name, signature, sizes, constants, warps in (
            (_scores_kernel, "scores", inputs | lists | progress, ("D", "positions", "programs"),
             {"gate_ptr": None, "SLOTS": SLOTS, **blocks}, NUM_WARPS),
            (_select_kernel, "select", lists | outputs, ("positions", "K", "index_offset", "last"),
             {"BLOCK": BLOCK}, 8),
            (_rest_kernel, "rest", inputs | lists | outputs | progress, ("D", "positions", "K", "index_offset", "last"),
             {"gate_ptr": None, "SLOTS": SLOTS, "BLOCK": REST_BLOCK, **blocks}, NUM_WARPS),
        ):  # fmt: skip
            found.append(
                Variant(
                    kernel, f"exhaustive {name}/{value[1:]}", signature | dict.fromkeys(sizes, "i32"),
                    constants | {"rows_ptr": None}, warps, aligned=tuple({"D", "positions"} & set(sizes)),
                    maxnreg=REGISTERS if name == "rest" else None,
                )
            )  # fmt: skip
    return found
