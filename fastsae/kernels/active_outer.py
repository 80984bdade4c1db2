"""out[i] = Σ_e acts[e] · x[token of e] over the entries e of latent i: Aᵀ x, a dictionary's gradient.

One program computes one latent's row, BLOCK_D columns of it, from the code in latent order; where a latent has many
entries (pieces.py), one program adds a piece of them into a workspace row, and the latent's own adds those in order.
Every sum has one order, so there are no atomics and the bits never change.

Bytes: nnz·D·sizeof(x) + M·D·sizeof(x) + nnz·(4 + 8 + sizeof(act)) for each BLOCK_D columns.
Flops: 2·nnz·D.
Workspace: at most N/4 rows of D in float32, and what by_latent takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.backends import buffers
from fastsae.backends.gpu.stages import Pieces
from fastsae.kernels.decode import tile_of
from fastsae.kernels.gather import load_rows
from fastsae.kernels.pieces import bits_of, find_piece
from fastsae.kernels.variants import POINTERS, Variant


@dataclass(frozen=True)
class Config:
    BLOCK_D: int
    BLOCK_E: int  # entries whose rows are in flight together
    num_warps: int


def choose(D: int) -> Config:
    """8 columns a thread; 4 entries at once in a wide tile and 8 in a narrow one, whose loads are shorter."""
    width = tile_of(D)
    return Config(BLOCK_D=width, BLOCK_E=4 if width == 1024 else 8, num_warps=max(1, width // 256))


@triton.jit
def _sum_entries(
    tokens_ptr, slots_ptr, acts_ptr, x_ptr, begin, end, columns, D, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr
):
    total = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(begin, end, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        live = e < end
        token = tl.load(tokens_ptr + e, mask=live, other=0)
        act = tl.load(acts_ptr + tl.load(slots_ptr + e, mask=live, other=0), mask=live, other=0.0).to(tl.float32)
        rows = load_rows(x_ptr, None, token, 0, live, columns, columns < D, D)
        total += tl.sum(act[:, None] * rows, axis=0)
    return total


@triton.jit
def _outer_pieces_kernel(
    starts_ptr, tokens_ptr, slots_ptr, acts_ptr, x_ptr, pieces_ptr, sums_ptr, M, D, length,
    BITS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """sums[j] (D,) = what piece j adds to its latent's row."""
    j = tl.program_id(0)
    if j >= tl.load(pieces_ptr + M):
        return
    _, begin, end = find_piece(j, pieces_ptr, starts_ptr, M, length, BITS)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = _sum_entries(tokens_ptr, slots_ptr, acts_ptr, x_ptr, begin, end, columns, D, BLOCK_E, BLOCK_D)
    tl.store(sums_ptr + tl.cast(j, tl.int64) * D + columns, total, mask=columns < D)


@triton.jit
def _active_outer_kernel(
    starts_ptr, tokens_ptr, slots_ptr, acts_ptr, x_ptr, pieces_ptr, sums_ptr, out_ptr, D,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Shapes: one latent, some columns. A latent in pieces has no entries left to add here.
    i = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin, end = tl.load(starts_ptr + i).to(tl.int32), tl.load(starts_ptr + i + 1).to(tl.int32)
    if pieces_ptr is not None:
        first, last = tl.load(pieces_ptr + i), tl.load(pieces_ptr + i + 1)
        begin = tl.where(last > first, end, begin)

    # Compute.
    total = _sum_entries(tokens_ptr, slots_ptr, acts_ptr, x_ptr, begin, end, columns, D, BLOCK_E, BLOCK_D)
    if pieces_ptr is not None:
        for j in range(first, last):
            total += tl.load(sums_ptr + tl.cast(j, tl.int64) * D + columns, mask=columns < D, other=0.0)

    # Store.
    tl.store(out_ptr + tl.cast(i, tl.int64) * D + columns, total.to(out_ptr.dtype.element_ty), mask=columns < D)


def outer(starts: Tensor, tokens: Tensor, slots: Tensor, acts: Tensor, x: Tensor, pieces: Pieces, out: Tensor) -> None:
    """Fills out (M, D), not empty. starts, tokens, slots: the code in latent order, as by_latent gives it."""
    d_sae, D = out.shape
    c, sums = choose(D), None
    tiles = triton.cdiv(D, c.BLOCK_D)
    common = dict(BLOCK_E=c.BLOCK_E, BLOCK_D=c.BLOCK_D, num_warps=c.num_warps, enable_fp_fusion=True)
    if pieces.first is not None:
        sums = buffers.empty((pieces.capacity, D), torch.float32, x.device)
        _outer_pieces_kernel[(pieces.capacity, tiles)](
            starts, tokens, slots, acts, x, pieces.first, sums, d_sae, D, pieces.length,
            BITS=bits_of(pieces.first), **common,
        )  # fmt: skip
    _active_outer_kernel[(d_sae, tiles)](starts, tokens, slots, acts, x, pieces.first, sums, out, D, **common)


def variants() -> list[Variant]:
    """Both kernels, with and without pieces."""
    found = []
    code = {"starts_ptr": "*i64", "tokens_ptr": "*i32", "slots_ptr": "*i64"}
    for dtype in (torch.float32, torch.bfloat16):
        value = POINTERS[dtype]
        for D in (768, 4096, 16384, 1001):
            c, aligned = choose(D), ("D",) if D % 16 == 0 else ()
            blocks = {"BLOCK_E": c.BLOCK_E, "BLOCK_D": c.BLOCK_D}
            inputs = code | {"acts_ptr": value, "x_ptr": value, "D": "i32"}
            workspace = {"pieces_ptr": "*i32", "sums_ptr": "*fp32"}
            for name, kernel, signature, constants in (
                ("outer_pieces", _outer_pieces_kernel, workspace | {"M": "i32", "length": "i32"}, {"BITS": 17}),
                ("active_outer", _active_outer_kernel, workspace | {"out_ptr": value}, {}),
                ("active_outer/uncut", _active_outer_kernel, {"out_ptr": value}, dict.fromkeys(workspace)),
            ):
                title = f"{name}/{value[1:]}/D={D}"
                found.append(
                    Variant(kernel, title, inputs | signature, constants | blocks, c.num_warps, aligned=aligned)
                )
    return found
