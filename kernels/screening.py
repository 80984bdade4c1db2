"""What every screened encoder shares: the sizes of a screened product, its tables, and the bound on a screened score.

The product x̂ Ŵᵀ is computed in chunks that stay in L2, and (N, M) never is. Positions 0 ... P-1 number the latents
that are considered: all M, or the `rows` of AuxK. Chunk j of S holds every S-th position, j, j + S, ..., so that the
first few chunks are a fair sample of all (a dictionary may be sorted, or hot at its front), and need not be computed
twice.

A screened score v of the exact score s obeys |v - s| <= e with
    v = ŝ · 2^(..) · g + b·g,      e = p_n · A_i + q_n · B_i + (|v| + |b_i·g|) · r + t_n
    A_i = |g_i| ‖ŵ_i‖,  B_i = |g_i| ‖w_i - ŵ_i‖,  p_n = ‖x_n - x̂_n‖ + c ‖x_n‖,  q_n = ‖x_n‖
where g is the gate of a latent (1 without), c bounds the accumulation in fp32 of both scores, whatever the order, r the
rounding of ŝ to its storage and of the last operations, and t_n keeps underflow from hiding a positive score.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

from .narrow import Narrow

CHUNK_BYTES = 32 << 20
"""Scores of one chunk: what is written must be read again before it leaves an L2 of 40-50 MB."""
SAMPLE = 8192
"""Largest sample of a token, in positions: 64 keys to a thread."""
SAMPLE_SHARE = 16
LONG_LIST = 4096
"""A list of survivors that a program holds without spilling on every target; a longer one gives up two deviations."""
LIST_BYTES = 128 << 20
"""Memory of the lists of survivors; more tokens than fit are encoded slab by slab."""

TABLE_ROWS = 5
"""scale·gate, bias·gate, A, B, threshold: by chunk, then by row of the table, then by column of the chunk."""


@dataclass(frozen=True)
class Plan:
    """Sizes of a screened product; they depend on shapes only, so a captured graph can replay it."""

    tokens: int  # of a slab
    positions: int  # P
    chunks: int  # S
    width: int  # positions of a chunk
    sampled_chunks: int
    samples: int  # positions looked at for a guess, a power of two
    rank: int  # the guess is the rank-th largest of the sample
    survivors: int  # slots of a token's list of survivors
    candidates: int  # slots of a token's list of candidates, a power of two


def chunk_width(tokens: int, positions: int, element_size: int) -> int:
    """As many columns as CHUNK_BYTES hold, in whole tiles of 128, and of equal chunks."""
    widest = max(128, CHUNK_BYTES // max(1, tokens * element_size) // 128 * 128)
    chunks = triton.cdiv(positions, widest)
    return triton.cdiv(triton.cdiv(positions, chunks), 16) * 16


def plan(tokens: int, positions: int, k: int, element_size: int = 2) -> Plan:
    """The sizes for the k largest of `positions` latents.

    Of the sample, K·share are expected to belong to the K largest, with the spread of a Poisson count; five standard
    deviations and four more make a guess that is too high for one token in millions. The list of survivors holds six
    standard deviations more than are expected to reach the guess. Candidates: the bound lets in 1.03 K on a trained
    SAE, 1.25 K on Gaussian scores of a wide one; 1.5 K + 64 fit.
    """
    first = _plan(tokens, positions, k, element_size)
    # Fewer tokens at a time leave room for wider chunks.
    return first if first.tokens == tokens else _plan(first.tokens, positions, k, element_size)


def _plan(tokens: int, positions: int, k: int, element_size: int) -> Plan:
    width = chunk_width(tokens, positions, element_size)
    chunks = triton.cdiv(positions, width)
    sampled = min(max(1, chunks // SAMPLE_SHARE), 4)
    samples = min(SAMPLE, triton.next_power_of_2(sampled * width))
    looked_at = triton.cdiv(sampled * width, sample_step(sampled * width, samples))
    share = min(1.0, looked_at / positions)
    rank = ceil(k * share + 5 * sqrt(k * share) + 4)
    expected = rank / share
    survivors = ceil(expected * (1 + 6 / sqrt(rank)))
    if survivors > LONG_LIST >= expected * (1 + 4 / sqrt(rank)):
        survivors = LONG_LIST
    survivors = min(positions, max(64, survivors))
    candidates = min(triton.next_power_of_2(ceil(1.5 * k) + 64), triton.next_power_of_2(positions))
    slab = max(1, min(tokens, LIST_BYTES // (8 * survivors)))
    return Plan(slab, positions, chunks, width, sampled, samples, rank, survivors, candidates)


def sample_step(columns: int, samples: int) -> int:
    """Every which of the sampled columns is looked at; a power of two of samples seldom divides them."""
    return triton.cdiv(columns, samples)


def bound_of_sums(D: int) -> float:
    """c: D roundings of a product in any order, tensor cores that truncate included, and the exact score's own few."""
    return (1.25 * D + 64) * 2.0**-24


def tables(
    narrow: Narrow,
    b: Tensor,
    scale: Tensor | None,
    threshold: Tensor | None,
    rows: Tensor | None,
    chunks: int,
    width: int,
    strided: bool,
) -> Tensor:
    """(chunks, TABLE_ROWS, width) fp32: what a score's bound needs of each latent, in the order of the product."""
    gate = None if scale is None else scale.float()
    columns = [narrow.scale, b.float(), narrow.norm, narrow.residual]
    if gate is not None:
        columns = [columns[0] * gate, columns[1] * gate, columns[2] * gate.abs(), columns[3] * gate.abs()]
    columns.append(torch.zeros_like(narrow.scale) if threshold is None else threshold)
    table = torch.stack(columns)
    if rows is not None:
        table = table.index_select(1, rows.clamp(min=0))
    table = torch.nn.functional.pad(table, (0, chunks * width - table.shape[1]))
    if strided:
        return table.view(TABLE_ROWS, width, chunks).permute(2, 0, 1).contiguous()
    return table.view(TABLE_ROWS, chunks, width).transpose(0, 1).contiguous()


def token_bounds(x: Narrow, D: int) -> Tensor:
    """(4, N) fp32: the scale of each token's narrow row, p, q and t."""
    full = x.norm + x.residual
    p = (x.residual + bound_of_sums(D) * full) * (1 + 2.0**-16)
    return torch.stack([x.scale, p, full * (1 + 2.0**-16), torch.where(full > 0, 1e-37, 0.0)])


@triton.jit
def bounded_score(stored, token_scale, p, q, tiny, scale, bias, A, B, ROUNDOFF: tl.constexpr):
    """A stored product as score v and the bound e on its error, both in fp32."""
    v = stored * (token_scale * scale) + bias
    return v, error_of(v, p, q, tiny, bias, A, B, ROUNDOFF)


@triton.jit
def error_of(v, p, q, tiny, bias, A, B, ROUNDOFF: tl.constexpr):
    """e of a score v. A latent of zeros has no error, so that nothing of it survives a bar of 0."""
    slack = tl.where(A + B > 0, tiny, 0.0)
    return p * A + q * B + (tl.abs(v) + tl.abs(bias)) * ROUNDOFF + slack


def roundoff(dtype: torch.dtype) -> float:
    """r: ŝ is stored with unit roundoff 2⁻¹¹ (fp16), or 2⁻²⁴; each side's last multiply-adds cost 2⁻²² together."""
    return (2.0**-11 if dtype == torch.float16 else 0.0) * 1.01 + 2.0**-21
