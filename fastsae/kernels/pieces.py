"""The pieces of long latents (backends.gpu.pieces) on the device: where each latent's begin, and what a piece covers.

One program counts the pieces of BLOCK latents; torch's prefix sum gives the first piece of each. A piece's
program finds its latent by a search in those.

Bytes: 28·M.
Flops: negligible.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.backends import buffers
from fastsae.kernels.search import count_up_to
from fastsae.kernels.variants import Variant


@dataclass(frozen=True)
class Config:
    BLOCK: int
    num_warps: int


def choose() -> Config:
    """4 latents a thread."""
    return Config(BLOCK=512, num_warps=4)


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


def piece_starts(starts: Tensor, length: int) -> Tensor:
    """(M+1,) int32: the first piece of each latent, ascending; the last is how many there are. starts (M+1,) int64."""
    counts = buffers.empty(starts.shape[:1], torch.int32, starts.device)
    config = choose()
    _count_pieces_kernel[(triton.cdiv(starts.shape[0], config.BLOCK),)](
        starts, counts, starts.shape[0] - 1, length, BLOCK=config.BLOCK, num_warps=config.num_warps,
        enable_fp_fusion=True,
    )  # fmt: skip
    return torch.cumsum(counts, 0, dtype=torch.int32)


def bits_of(first: Tensor) -> int:
    """BITS of a search in the pieces' starts (M+1,)."""
    return first.shape[0].bit_length()


def variants() -> list[Variant]:
    config = choose()
    signature = {"starts_ptr": "*i64", "counts_ptr": "*i32", "M": "i32", "length": "i32"}
    return [Variant(_count_pieces_kernel, "count_pieces", signature, {"BLOCK": config.BLOCK}, config.num_warps)]
