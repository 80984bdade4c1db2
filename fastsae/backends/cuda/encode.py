"""The encoders' stages (fastsae.backends.gpu.stages) in CUDA: what they allocate, and csrc/cuda's ops on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fastsae.backends import buffers
from fastsae.backends.cuda.library import library, where
from fastsae.backends.gpu.bounds import roundoff
from fastsae.backends.gpu.plan import Plan, sample_step

SLOTS = 64
"""Tokens that are scored exhaustively at the same time: the rows of scores in scratch memory."""


def narrow_rows(t: Tensor, low: Tensor, scale: Tensor, norm: Tensor, residual: Tensor) -> None:
    library.narrow_rows(where(t), t, low, scale, norm, residual)


@contextlib.contextmanager
def ieee_products() -> Iterator[None]:
    """cuBLAS multiplies in fp32, not with the 10 bits of TF32, which no bound here allows for.

    torch has an old and a new setting for it, and raises RuntimeError, in a product too, if they contradict each other.
    So this resets the one that chose TF32, and restores it afterwards.
    """
    settings = torch.backends.cuda.matmul
    if settings.fp32_precision != "tf32":
        yield
        return
    try:
        old = settings.allow_tf32 and torch.get_float32_matmul_precision()
    except RuntimeError:  # the new setting alone says TF32
        old = False
    if old:
        settings.allow_tf32 = False  # sets both
    else:
        settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        if old == "medium":
            torch.set_float32_matmul_precision(old)
        elif old:
            settings.allow_tf32 = True
        else:
            settings.fp32_precision = "tf32"


def product(x: Tensor, W: Tensor, rows: Tensor | None, count: Tensor, out: Tensor, chunk: int, stride: int) -> None:
    """cuBLAS on a copy of the chunk's rows. It also writes columns past count, which no stage reads."""
    if rows is None:
        part = W[chunk::stride][: out.shape[1]]
    else:
        part = W.index_select(0, rows[chunk::stride][: out.shape[1]].clamp(0, W.shape[0] - 1))
    with ieee_products():
        torch.mm(x, part.mT, out=out[:, : part.shape[0]])


def bars(scores: Tensor, table: Tensor, bounds: Tensor, count: Tensor, out: Tensor, plan: Plan) -> None:
    limit = plan.sampled_chunks * plan.width
    step = sample_step(limit, plan.samples)
    library.bars(
        where(scores), scores, table.view(-1, plan.width), bounds, count, out, plan.chunks, step, limit, plan.rank
    )


def append(
    scores: Tensor, table: Tensor, bounds: Tensor, bars: Tensor, limit: Tensor, values: Tensor,
    places: Tensor, counts: Tensor, chunk: int, stride: int, base: int, per_latent: bool = False,
) -> None:  # fmt: skip
    n, apart = counts.shape[0], scores.stride(0)
    if not n:
        return
    flat = scores.as_strided(((n - 1) * apart + scores.shape[1],), (1,))  # from the first row to the end of the last
    library.append(
        where(scores), flat, apart, table, bounds, bars, limit, values, places, counts, chunk, stride, base,
        per_latent, roundoff(scores.dtype),
    )  # fmt: skip


def select(
    values: Tensor, places: Tensor, counts: Tensor, table: Tensor, bounds: Tensor, bars: Tensor,
    rows: Tensor | None, k: int, plan: Plan, dtype: torch.dtype, exact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n, device = counts.shape[0], values.device
    latents = buffers.empty((n, plan.candidates), torch.int32, device)
    scores = buffers.empty((n, plan.candidates), torch.float32, device)
    found, certified = torch.empty_like(counts), torch.empty_like(counts)
    library.select(
        where(values), values, places, counts, table.view(-1, plan.width), bounds, bars, rows, latents, scores, found,
        certified, k, plan.chunks, exact, roundoff(dtype),
    )  # fmt: skip
    return latents, scores, found, certified


def rescore(
    x: Tensor, W: Tensor, b: Tensor, gate: Tensor | None, latents: Tensor, counts: Tensor, scores: Tensor
) -> None:
    library.rescore(where(x), x, W, b, gate, latents, counts, scores)


def top_k(
    latents: Tensor, scores: Tensor, counts: Tensor, certified: Tensor, acts: Tensor, indices: Tensor,
    offset: int, last: int,
) -> None:  # fmt: skip
    library.top_k(where(scores), latents, scores, counts, certified, acts, indices, offset, last)


def exhaustive_top_k(
    x: Tensor, W: Tensor, b: Tensor, gate: Tensor | None, rows: Tensor | None, count: Tensor, tokens: Tensor,
    listed: Tensor, acts: Tensor, indices: Tensor, offset: int, last: int,
) -> None:  # fmt: skip
    positions = W.shape[0] if rows is None else rows.shape[0]
    scratch = buffers.empty((min(SLOTS, x.shape[0]), positions), torch.float32, x.device)
    library.exhaustive_top_k(
        where(x), x, W, b, gate, rows, count, tokens, listed, acts, indices, offset, last, scratch
    )  # fmt: skip


def count_listed(
    latents: Tensor, scores: Tensor, found: Tensor, thresholds: Tensor, per_latent: bool, totals: Tensor
) -> None:
    library.count_listed(where(scores), latents, scores, found, thresholds, per_latent, totals)


def emit_listed(
    latents: Tensor, scores: Tensor, found: Tensor, thresholds: Tensor, per_latent: bool, offsets: Tensor,
    acts: Tensor, indices: Tensor,
) -> None:  # fmt: skip
    library.emit_listed(where(scores), latents, scores, found, thresholds, per_latent, offsets, acts, indices)


def every_latent(
    x: Tensor, W: Tensor, b: Tensor, tokens: Tensor, listed: Tensor, acts: Tensor, indices: Tensor, *,
    totals: Tensor | None = None, offsets: Tensor | None = None, thresholds: Tensor | None = None,
    per_latent: bool = False, least: Tensor | None = None, ties: Tensor | None = None,
) -> None:  # fmt: skip
    library.every_latent(
        where(x), x, W, b, tokens, listed, acts, indices, totals, offsets, thresholds, per_latent, least, ties
    )


def histogram(x: Tensor, W: Tensor, b: Tensor, needed: Tensor, prefix: Tensor | None) -> Tensor:
    bins = buffers.zeros((1 << 16,), torch.int64, x.device)
    library.histogram(where(x), x, W, b, needed, prefix, bins)
    return bins
