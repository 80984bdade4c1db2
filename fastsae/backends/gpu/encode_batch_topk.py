"""The N·K largest of relu(x Wᵀ + b) over the whole batch, as a ragged code; nothing of size (N, M) is stored or sorted.

A sample of tokens and latents gives a bar τ that about 1.25 N·K scores exceed; `encode_above` finds those, exactly, and
a stable sort of at most 3 N·K numbers keeps the largest. The result is certainly right if at least N·K were above τ (or
τ = 0) and all of them fit. If not, two histograms over every score give the N·K-th largest key, and two walks over all
latents count and emit. That is many times slower than a product, since W is read again for each token or for a few, but
it needs no host sync and works for any input.

Bytes: (N + M)·D·2 a chunk's product and 4·N·M through L2; 1.25 N·K·D·sizeof(W) to score; about 150·N·K to sort.
Flops: 2·N·M·D on tensor cores.
"""

from __future__ import annotations

from math import ceil, sqrt

import torch
from torch import Tensor

from fastsae.backends import buffers
from fastsae.backends.blank import blank_tokens, with_blank
from fastsae.backends.gpu.encode_above import list_slots, pack, survivors_above
from fastsae.backends.gpu.narrow import Narrow, narrowed, screening_copy
from fastsae.backends.gpu.product import chunk_product, fp32_sums
from fastsae.backends.gpu.stages import EncodeStages

SAMPLE_SHARE = 16
LEAST_SAMPLE = 1024
SAMPLE = 1 << 21
LEAST_ROOM = 1 << 16
NAN_BIN = 0x7FFF
"""The upper bits of NaN's key."""


def sampled_bar(stages: EncodeStages, x: Tensor, b: Tensor, k: int, screen: Narrow) -> Tensor:
    """τ, 0-d fp32, at least 0: a screened score that about 1.25 N·k of all exceed, from a strided sample."""
    latents, dtype = b.shape[0], screen.low.dtype
    width = min(latents, max(LEAST_SAMPLE, latents // SAMPLE_SHARE))
    stride = latents // width
    few = x[:: max(1, x.shape[0] * width // SAMPLE)].contiguous()
    narrow = narrowed(stages, few, dtype)
    scores = buffers.empty((few.shape[0], width), dtype, x.device)
    count = buffers.scalar(buffers.count_int32("latents", latents), torch.int32, x.device)
    with fp32_sums():
        chunk_product(stages, narrow, screen, None, count, scores, 0, stride)
    scale, bias = (t[::stride][:width] for t in (screen.scale, b.float()))
    v = torch.addcmul(bias, scores.float(), narrow.scale[:, None] * scale)
    expected = k * v.numel() / latents
    rank = min(v.numel(), ceil(1.25 * expected + 5 * sqrt(expected) + 4))
    best = torch.topk(torch.where(v.isnan(), float("-inf"), v).flatten(), rank).values
    return best[-1].clamp(min=0)


def encode_batch_topk(
    stages: EncodeStages, x: Tensor, W: Tensor, b: Tensor, k: int, screen: Narrow | None, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """acts (N·k,) in x's dtype, indices, offsets (N+1,), and 0-d int64: the tokens that were scored in full."""
    n, latents = x.shape[0], W.shape[0]
    wanted = n * k
    if n == 0:
        none = buffers.scalar(0, torch.int64, x.device)
        acts, indices = (buffers.zeros((0,), dtype, x.device) for dtype in (x.dtype, torch.int32))
        return acts, indices, none.new_zeros(1), none
    screen, exact = screening_copy(stages, W, screen, precision), precision != "screened"
    blank = blank_tokens(x)
    owed = (n - blank.sum()) * k  # to the others
    # Zeros stand in for a blank token, and its bar is above all of their scores.
    numbered = torch.where(blank[:, None], 0, x)
    bar = sampled_bar(stages, numbered, b, k, screen)
    bars = torch.where(blank, float("inf"), bar)
    lists = survivors_above(stages, numbered, W, b, bars, False, list_slots(n, latents, 4 * k), screen, exact)
    room = min(n * latents, max(3 * wanted, LEAST_ROOM))
    scores, found, offsets, total = pack(stages, numbered, W, b, bars, False, lists, room, torch.float32)
    acts, indices, offsets = _largest(scores, found, offsets, wanted, owed, x.dtype)
    failed = (total > room) | ((total < owed) & (bar > 0))
    offsets = _redo(stages, x, W, b, blank, owed, failed, acts, indices, offsets)
    return *with_blank(acts, indices, offsets, blank, k), torch.where(failed, n, lists.listed.long())


def _largest(
    scores: Tensor, latents: Tensor, offsets: Tensor, capacity: int, wanted: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The `wanted` (0-d, at most capacity) largest entries of a ragged code, in order; of equal ones the first, as a
    stable sort keeps them.
    """
    room = scores.shape[0]
    there = buffers.arange(room, torch.int64, scores.device) < offsets[-1]
    order = torch.sort(torch.where(there, scores, float("-inf")), descending=True, stable=True).indices
    kept = torch.zeros_like(there).scatter_(0, order, buffers.arange(room, torch.int64, scores.device) < wanted)
    kept &= there & (scores.to(dtype) != 0)  # a narrow dtype can round a score to 0
    rank = kept.cumsum(0)
    place = torch.where(kept, rank - 1, capacity)
    acts = buffers.zeros((capacity + 1,), dtype, scores.device).scatter_(0, place, scores.to(dtype))
    indices = buffers.zeros((capacity + 1,), torch.int32, scores.device).scatter_(0, place, latents)
    return acts[:capacity], indices[:capacity], torch.cat([rank.new_zeros(1), rank])[offsets]


def _digit(bins: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The bin, 0-d int32, in which the wanted-th largest lies, -1 where there are fewer; and how many lie above it."""
    reached = bins.flip(0).cumsum(0)
    below = (reached < wanted).sum()
    above = torch.where(below > 0, reached.gather(0, (below - 1).clamp(min=0)[None])[0], 0)
    return (bins.shape[0] - 1 - below).int(), above


def _redo(
    stages: EncodeStages,
    x: Tensor,
    W: Tensor,
    b: Tensor,
    blank: Tensor,
    wanted: Tensor,
    failed: Tensor,
    acts: Tensor,
    indices: Tensor,
    offsets: Tensor,
) -> Tensor:
    """Where `failed` (0-d bool) writes acts and indices anew, from every score of the tokens that are not blank;
    returns the offsets that hold then.
    """
    n = x.shape[0]
    needed = failed.int()
    x = torch.where(blank[:, None], float("nan"), x)
    # All M scores of a blank token have NaN's key 0x7FFFFFFF, the last one in both histograms.
    blanks = blank.sum() * (b.shape[0] * needed)
    bins = stages.histogram(x, W, b, needed, None)
    bins[NAN_BIN] -= blanks
    upper, above = _digit(bins, wanted)
    bins = stages.histogram(x, W, b, needed, upper)
    bins[-1] -= torch.where(upper == NAN_BIN, blanks, 0)
    lower, above_too = _digit(bins, wanted - above)
    # Fewer positive scores than wanted: all of them are above key 0.
    least = torch.where(upper < 0, 0, (upper << 16) | lower.clamp(min=0)).int()
    quota = torch.where(upper < 0, 0, wanted - above - above_too)
    everyone, listed = blank.int().argsort(stable=True).int(), needed * (n - blank.sum()).int()
    totals, ties = buffers.zeros((2, n), torch.int64, x.device)
    stages.every_latent(x, W, b, everyone, listed, acts, indices, totals=totals, least=least, ties=ties)
    admitted = (quota - (ties.cumsum(0) - ties)).clamp(min=0).minimum(ties)
    anew = torch.cat([totals.new_zeros(1), (totals + admitted).cumsum(0)])
    stages.every_latent(x, W, b, everyone, listed, acts, indices, offsets=anew, least=least, ties=admitted)
    return torch.where(failed, anew, offsets)
