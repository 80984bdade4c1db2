"""The stages of fastsae.backends.gpu.stages in CUDA: what they allocate, and csrc/cuda's ops on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fastsae.backends import buffers
from fastsae.backends.cuda.library import library, where
from fastsae.backends.gpu.bounds import roundoff
from fastsae.backends.gpu.pieces import cut
from fastsae.backends.gpu.plan import Plan, sample_step
from fastsae.backends.gpu.stages import Entries, Moments, Pieces, Step
from fastsae.reference import Parts

__all__ = [
    "ROW_LIMIT", "active_dot", "append", "bars", "bias_parts", "bias_programs", "count_listed", "decode",
    "decode_error", "emit_listed", "every_latent", "exhaustive_top_k", "histogram", "list_slots", "narrow_rows",
    "outer", "piece_starts", "product", "rescore", "select", "sort_slots", "step_numbers", "top_k", "update_bias",
    "update_rows",
]  # fmt: skip

ROW_LIMIT = None
"""update_rows takes rows of any width (csrc/cuda/update_wide.cu)."""
SLOTS = 64
"""Tokens that are scored exhaustively in a batch: the rows of scores in scratch memory."""
RULES = ("adam", "lion", "signsgd", "none")
"""As csrc/cuda/optimizers.h numbers them."""
STREAMS = 8
"""Streams of random bits in a step: 2i is the i-th parameter's m, 2i + 1 its v."""


def _floats(like: Tensor, *shape: int) -> Tensor:
    return buffers.empty(shape, torch.float32, like.device)


def _bytes(like: Tensor, size: int) -> Tensor:
    return buffers.empty((-(-size // 8),), torch.int64, like.device)


# -- the encoders ------------------------------------------------------------------------------------------------------


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
    progress = buffers.empty((3,), torch.int32, x.device)
    library.exhaustive_top_k(
        where(x), x, W, b, gate, rows, count, tokens, listed, acts, indices, offset, last, scratch, progress
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


# -- codes regrouped by latent, and the update -------------------------------------------------------------------------


def list_slots(
    acts: Tensor, indices: Tensor, offsets: Tensor | None, d_sae: int,
    keys: Tensor, rows: Tensor, values: Tensor | None, first_row: int = 0, zeros: bool = False,
) -> None:  # fmt: skip
    library.list_slots(where(acts), acts, indices, offsets, d_sae, keys, rows, values, first_row, zeros)


def sort_slots(
    keys: Tensor, rows: Tensor, values: Tensor | None, d_sae: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Raises ValueError for 2³¹ slots or more, which are numbered in int32."""
    slots = buffers.count_int32("the slots of the codes", keys.numel())
    starts = buffers.empty((d_sae + 1,), torch.int64, keys.device)
    sorted_rows, sorted_slots = torch.empty_like(rows), buffers.empty((slots,), torch.int64, keys.device)
    sorted_values = None if values is None else torch.empty_like(values)
    numbers = buffers.arange(slots, torch.int32, keys.device)
    workspace = _bytes(keys, library.sort_workspace(where(keys), slots, d_sae))
    library.sort_slots(
        where(keys), keys, rows, values, d_sae, numbers, torch.empty_like(keys), torch.empty_like(keys), workspace,
        starts, sorted_rows, sorted_slots, sorted_values,
    )  # fmt: skip
    return starts, sorted_rows, sorted_slots, sorted_values


def piece_starts(starts: Tensor, length: int) -> Tensor:
    first = buffers.empty(starts.shape, torch.int32, starts.device)
    workspace = _bytes(starts, library.piece_workspace(where(starts), starts.shape[0] - 1))
    library.piece_starts(where(starts), starts, length, workspace, first)
    return first


def outer(starts: Tensor, tokens: Tensor, slots: Tensor, acts: Tensor, x: Tensor, pieces: Pieces, out: Tensor) -> None:
    sums = None if pieces.first is None else _floats(x, pieces.capacity, x.shape[1])
    library.active_outer(where(x), starts, tokens, slots, acts, x, out, pieces.first, pieces.length, sums)


def step_numbers(
    lr: Tensor, step: Tensor, skip: Tensor | None, grad_scale: Tensor | None, rule: str, beta1: float,
    beta2: float, weight_decay: float, seed: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    numbers, keys = _floats(lr, 5), buffers.empty((STREAMS,), torch.int32, lr.device)
    library.step_numbers(
        where(lr), lr, step, skip, grad_scale, RULES.index(rule), beta1, beta2, weight_decay, (seed or 0) % 2**32,
        numbers, keys,
    )  # fmt: skip
    return numbers, keys


def update_rows(
    W_enc: Tensor | None, W_dec: Tensor, b_enc: Tensor, enc_moments: Moments, dec_moments: Moments,
    bias_moments: Moments, entries: Entries, parts: Parts, pre_bias: Tensor | None, stats: Tensor, step: Step,
    unit_norm: bool, clip_rows: float | None, programs: int,
) -> None:  # fmt: skip
    """Before it changes anything, it also checks that `update_bias` can be launched afterwards."""
    at, pieces = where(W_dec), entries.pieces
    d_out, d_in = W_dec.shape[1], (W_dec if W_enc is None else W_enc).shape[1]
    sources = _in_one_dtype([entries.x, entries.more_x, entries.grad, entries.more_grad], W_dec.dtype)
    moments = [t for of in (enc_moments, dec_moments, bias_moments) for t in (of.m, of.v)]
    scales = [t for of in (enc_moments, dec_moments) for t in (of.m_scales, of.v_scales)]
    added = [parts.decoder_pull, parts.db_enc, parts.W_enc, parts.W_dec, parts.pre]
    piece_rows = piece_biases = dacts = scratch = None
    if pieces.first is not None:
        piece_rows, piece_biases = _floats(W_dec, pieces.capacity, d_out + d_in), _floats(W_dec, pieces.capacity)
    if not library.rows_are_staged(at, W_enc, W_dec, moments, sources, added):
        dacts, scratch = torch.empty_like(entries.acts), _floats(W_dec, programs, d_out + d_in)
    library.update_rows(
        at, [W_enc, W_dec, b_enc], moments, scales,
        [entries.starts, entries.rows, entries.acts, entries.dacts, *sources], entries.split, added, pieces.first,
        pieces.length, [piece_rows, piece_biases, dacts, scratch], pre_bias, stats,
        RULES.index(step.rule), step.numbers, step.keys, step.eps, *step.betas, unit_norm,
        clip_rows or 0.0, step.first_latent % 2**32, programs,
    )  # fmt: skip


def _in_one_dtype(matrices: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Unchanged if all have the weights' dtype; else in float32, which holds every narrower number exactly."""
    if all(t is None or t.dtype == dtype for t in matrices):
        return matrices
    return [None if t is None else t.float() for t in matrices]


def update_bias(
    b: Tensor, moments: Moments, grads: list[Tensor], pre_bias: Tensor | None, stats: Tensor, step: Step,
    stream: int, workspace: Tensor,
) -> None:  # fmt: skip
    library.update_bias(
        where(b), b, moments.m, moments.v, grads, pre_bias, workspace, stats, RULES.index(step.rule), step.numbers,
        step.keys[stream:], step.eps, *step.betas,
    )  # fmt: skip


def bias_parts(rows: int) -> int:
    parts: int = library.bias_parts(rows)
    return parts


def bias_programs(D: int) -> int:
    programs: int = library.bias_programs(D)
    return programs


# -- ops that are one stage --------------------------------------------------------------------------------------------


def _long_tokens(offsets: Tensor | None, slots: int, W: Tensor) -> tuple[Tensor | None, int, Tensor | None]:
    """The pieces of a ragged code's long tokens, their length, and rows to add them up in; a fixed code has none."""
    if offsets is None:
        return None, 0, None
    pieces = cut(piece_starts, offsets, slots, offsets.shape[0] - 1)
    if pieces.first is None:
        return None, 0, None
    sums = buffers.empty((pieces.capacity, W.shape[1]), torch.float32, W.device)
    return pieces.first, pieces.length, sums


def decode(acts: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor) -> Tensor:
    tokens = acts.shape[0] if offsets is None else offsets.shape[0] - 1
    out = buffers.empty((tokens, W.shape[1]), W.dtype, W.device)
    if out.numel():
        library.decode(where(W), acts, indices, offsets, W, out, *_long_tokens(offsets, acts.numel(), W))
    return out


def decode_error(
    acts: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor, target: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    error = torch.empty_like(target)
    tiles = library.decode_tiles(W, W.shape[1])
    squares = buffers.empty((tiles, target.shape[0]), torch.float32, W.device)
    if error.numel():
        pieces = _long_tokens(offsets, acts.numel(), W)
        library.decode_error(where(W), acts, indices, offsets, W, target, bias, error, squares, *pieces)
    return error, squares.double().sum(0)


def active_dot(x: Tensor, acts: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor) -> Tensor:
    out = torch.empty_like(acts)
    if out.numel():
        library.active_dot(where(W), x, acts, indices, offsets, W, out)
    return out
