"""Long latents cut into pieces of equal length, so that no program has much more to add up than another.

A latent with more than `length` entries is summed by pieces: one program adds the entries of one piece into a row of a
workspace, and whoever owns the latent adds those rows in order. Short latents have no piece. How many pieces there are
is known on the device only, so the launch grid is the most there can be, and a program past the last one returns:

    Σ over long latents of ceil(count/length) <= nnz/length + (long latents) <= nnz/length + nnz/(length + 1)

pieces (M+1,) int32: the first piece of each latent, ascending; pieces[M] is how many there are.

Bytes: 28·M.
Flops: none to speak of.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .search import count_up_to
from .variants import Variant

SHORTEST = 64
"""Entries below which cutting costs more than it evens out."""


@dataclass(frozen=True)
class Config:
    BLOCK: int
    num_warps: int


def choose() -> Config:
    """4 latents a thread."""
    return Config(BLOCK=512, num_warps=4)


@dataclass(frozen=True)
class Pieces:
    """pieces (M+1,) int32, or None where no latent can be long; length and capacity as above; BITS to search them."""

    first: Tensor | None
    length: int
    capacity: int
    BITS: int


@triton.jit
def _count_pieces_kernel(starts_ptr, counts_ptr, M, length, BLOCK: tl.constexpr):
    """counts[i + 1] = the pieces of latent i, counts[0] = 0."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(starts_ptr + i, mask=i < M, other=0)
    entries = tl.load(starts_ptr + i + 1, mask=i < M, other=0) - start
    pieces = tl.where(entries > length, (entries + length - 1) // length, 0)
    tl.store(counts_ptr + tl.where(i < M, i + 1, 0), pieces.to(tl.int32), mask=i <= M)


@triton.jit
def find_piece(j, pieces_ptr, starts_ptr, M, length, BITS: tl.constexpr):
    """The latent of piece j (int32) and the entries begin .. end (int32) that it covers. j < pieces[M]."""
    latent = count_up_to(pieces_ptr, M + 1, j, BITS) - 1
    begin = tl.load(starts_ptr + latent).to(tl.int32) + (j - tl.load(pieces_ptr + latent)) * length
    end = tl.minimum(tl.load(starts_ptr + latent + 1).to(tl.int32), begin + length)
    return latent, begin, end


def cut(starts: Tensor, slots: int, tokens: int) -> Pieces:
    """The pieces of a code in latent order: starts (M+1,) int64, over at most `slots` entries of `tokens` tokens.

    The length is eight tokens' worth of slots: then a quarter as many workspace rows as tokens always suffice (1.03 at
    SHORTEST), and at N = 8192 a piece is a hundredth of what each of a hundred multiprocessors has to add.
    """
    latents = starts.shape[0] - 1
    length = max(SHORTEST, 8 * triton.cdiv(slots, max(tokens, 1)))
    length = triton.cdiv(length, 16) * 16
    capacity = slots // length + slots // (length + 1)
    if slots <= length:
        return Pieces(None, length, 0, 0)
    counts = torch.empty(latents + 1, dtype=torch.int32, device=starts.device)
    config = choose()
    _count_pieces_kernel[(triton.cdiv(latents + 1, config.BLOCK),)](
        starts, counts, latents, length, BLOCK=config.BLOCK, num_warps=config.num_warps
    )
    first = torch.cumsum(counts, 0, dtype=torch.int32)
    return Pieces(first, length, capacity, (latents + 1).bit_length())


def variants() -> list[Variant]:
    config = choose()
    signature = {"starts_ptr": "*i64", "counts_ptr": "*i32", "M": "i32", "length": "i32"}
    return [Variant(_count_pieces_kernel, "count_pieces", signature, {"BLOCK": config.BLOCK}, config.num_warps)]
