"""The raw pre-acts x Wᵀ + b, sign kept, of every latent above its threshold, as a ragged code; (N, M) is never stored.

The bar is given, so there is no guess and no certificate: chunks of latents in order, survivors of each, their exact
scores, and from those what is above. A token with more survivors than its list holds is scored in full, on the device.
See `encode_topk` for the parts.

Bytes: (N + M)·D·2 a chunk's product and 4·N·M through L2; about nnz·D·sizeof(W) to score.
Flops: 2·N·M·D on tensor cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastsae.backends import buffers
from fastsae.backends.gpu.bounds import tables, token_bounds
from fastsae.backends.gpu.encode_topk import listed_tokens
from fastsae.backends.gpu.narrow import Narrow, narrowed, screening_copy
from fastsae.backends.gpu.plan import cdiv, chunk_width
from fastsae.backends.gpu.product import chunk_product, fp32_sums
from fastsae.backends.gpu.stages import EncodeStages

LIST_BYTES = 256 << 20


@dataclass(frozen=True)
class Lists:
    """Each token's survivors (N, slots), ascending: latents int32, exact scores fp32; found (N,), more than slots where
    a list was too short; tokens, listed: those tokens, as `listed_tokens` gives them."""

    latents: Tensor
    scores: Tensor
    found: Tensor
    tokens: Tensor
    listed: Tensor


def list_slots(tokens: int, latents: int, expected: int) -> int:
    """Four times what a token is expected to have: few have more, and those are scored in full."""
    return min(latents, max(256, 4 * expected), max(64, LIST_BYTES // (8 * max(1, tokens))))


def survivors_above(
    stages: EncodeStages,
    x: Tensor,
    W: Tensor,
    b: Tensor,
    thresholds: Tensor,
    per_latent: bool,
    slots: int,
    screen: Narrow,
    exact: bool,
) -> Lists:
    """Every latent that may be above its threshold, scored exactly. thresholds fp32: (M,) if per_latent, else (N,).

    exact=False: with their screened scores.
    """
    n, latents, dtype = x.shape[0], W.shape[0], screen.low.dtype
    width = chunk_width(n, latents, dtype.itemsize)
    chunks = cdiv(latents, width)
    table = tables(screen, b, None, thresholds if per_latent else None, None, chunks, width, strided=False)
    narrow = narrowed(stages, x, dtype)
    bounds = token_bounds(narrow, x.shape[1])
    out = buffers.empty((n, width), dtype, x.device)
    scores = buffers.empty((n, slots), torch.float32, x.device)
    found_latents = buffers.empty((n, slots), torch.int32, x.device)
    found = buffers.zeros((n,), torch.int32, x.device)
    end = buffers.scalar(buffers.count_int32("latents", latents), torch.int32, x.device)
    with fp32_sums():
        for j in range(chunks):
            first = j * width
            chunk_product(stages, narrow, screen, None, end, out, first, 1)
            stages.append(
                out, table[j], bounds, thresholds, end, scores, found_latents, found, first, 1, first, per_latent
            )
    if exact:
        stages.rescore(x, W, b, None, found_latents, found, scores)
    return Lists(found_latents, scores, found, *listed_tokens(found > slots))


def pack(
    stages: EncodeStages,
    x: Tensor,
    W: Tensor,
    b: Tensor,
    thresholds: Tensor,
    per_latent: bool,
    lists: Lists,
    capacity: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """acts, indices (capacity,), offsets (N+1,) cut at the capacity, and how many entries there are without the cut."""
    totals = buffers.zeros((x.shape[0],), torch.int64, x.device)
    acts = buffers.zeros((capacity,), dtype, x.device)
    indices = buffers.zeros((capacity,), torch.int32, x.device)
    every = partial(
        stages.every_latent, x, W, b, lists.tokens, lists.listed, acts, indices,
        thresholds=thresholds, per_latent=per_latent,
    )  # fmt: skip
    stages.count_listed(lists.latents, lists.scores, lists.found, thresholds, per_latent, totals)
    every(totals=totals)
    offsets = torch.cat([totals.new_zeros(1), totals.cumsum(0)])
    stages.emit_listed(lists.latents, lists.scores, lists.found, thresholds, per_latent, offsets, acts, indices)
    every(offsets=offsets)
    return acts, indices, offsets.clamp(max=capacity), offsets[-1]


def encode_above(
    stages: EncodeStages,
    x: Tensor,
    W: Tensor,
    b: Tensor,
    threshold: Tensor,
    capacity: int,
    screen: Narrow | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """acts (capacity,) in x's dtype, indices, offsets (N+1,), and 0-d: overflow, tokens scored in full."""
    n = x.shape[0]
    if n == 0:
        none = buffers.scalar(0, torch.int64, x.device)
        indices = buffers.zeros((capacity,), torch.int32, x.device)
        return buffers.zeros((capacity,), x.dtype, x.device), indices, none.new_zeros(1), none > 0, none
    per_latent = threshold.ndim == 1
    thresholds = threshold.float().contiguous() if per_latent else threshold.float().reshape(-1).expand(n).contiguous()
    slots = list_slots(n, W.shape[0], capacity // n)
    screen, exact = screening_copy(stages, W, screen, precision), precision != "screened"
    lists = survivors_above(stages, x, W, b, thresholds, per_latent, slots, screen, exact)
    acts, indices, offsets, total = pack(stages, x, W, b, thresholds, per_latent, lists, capacity, x.dtype)
    return acts, indices, offsets, total > capacity, lists.listed.long()
