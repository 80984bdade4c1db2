"""The sizes of a screened product, of its sample and of its lists.

The product x̂ Ŵᵀ is computed in chunks that stay in L2, and (N, M) never is. Positions 0 ... P-1 number the latents
that are considered: all M, or the `rows` of AuxK. Chunk j of S holds every S-th position, j, j + S, ..., so that the
first few chunks are a fair sample of all (a dictionary may be sorted, or hot at its front), and need not be computed
twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt

CHUNK_BYTES = 32 << 20
"""Scores of one chunk: the next pass must read them before they leave an L2 of 40-50 MB."""
SAMPLE = 8192
"""Largest sample of a token, in positions: 64 keys to a thread."""
SAMPLE_SHARE = 16
LONG_LIST = 4096
"""A list of survivors that a program holds without spilling on every target; a longer one gives up two deviations."""
LIST_BYTES = 128 << 20
"""Memory of the lists of survivors; more tokens than fit are encoded slab by slab."""


def cdiv(n: int, size: int) -> int:
    """The number of blocks of `size` that cover n."""
    return (n + size - 1) // size


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n; n >= 1."""
    return 1 << (n - 1).bit_length()


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
    chunks = cdiv(positions, widest)
    return cdiv(cdiv(positions, chunks), 16) * 16


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
    chunks = cdiv(positions, width)
    sampled = min(max(1, chunks // SAMPLE_SHARE), 4)
    samples = min(SAMPLE, next_power_of_2(sampled * width))
    looked_at = cdiv(sampled * width, sample_step(sampled * width, samples))
    share = min(1.0, looked_at / positions)
    rank = ceil(k * share + 5 * sqrt(k * share) + 4)
    expected = rank / share
    survivors = ceil(expected * (1 + 6 / sqrt(rank)))
    if survivors > LONG_LIST >= expected * (1 + 4 / sqrt(rank)):
        survivors = LONG_LIST
    survivors = min(positions, max(64, survivors))
    candidates = min(next_power_of_2(ceil(1.5 * k) + 64), next_power_of_2(positions))
    slab = max(1, min(tokens, LIST_BYTES // (8 * survivors)))
    return Plan(slab, positions, chunks, width, sampled, samples, rank, survivors, candidates)


def sample_step(columns: int, samples: int) -> int:
    """The step between the sampled columns that are used; a power of two of samples seldom divides them."""
    return cdiv(columns, samples)
