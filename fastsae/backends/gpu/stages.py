"""What a GPU backend computes itself: every stage of every op, as protocols that a module of functions implements.

A stage is a part of an op: a few launches on the current stream. No stage reads a number back. A stage allocates what
it returns, and its caller the rest. Grids, workspaces and sizes follow from shapes, so a captured graph can replay
them. Matrices are contiguous, (N, D) and (M, D), in float32, bfloat16 or float16, unless stated otherwise.
Sums are fp32, each in one fixed order: equal inputs give equal bits. "Exact scores" are those of `rescore`, the same
bits from every stage of a backend, and the dots in them are its `active_dot`'s. NaN ranks above every number; ties go
to the lower index.

low, scale, norm, residual: `narrow.Narrow`; table and bounds: `bounds.tables` and `bounds.token_bounds`; v and e: a
screened score and the bound on its error, as in `bounds`; positions, chunks, plan: `plan`. 0-d numbers on the device:
count, limit (int32: how many positions there are), listed, needed, prefix, least (int32), lr (float64), step (int64),
skip (bool).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastsae.backends.gpu.plan import Plan
from fastsae.reference import Parts as Parts  # for kernels too


class Moments(NamedTuple):
    """m and v of one parameter as they are stored, and the scales of those in 8 bits; None where there is none."""

    m: Tensor | None = None
    v: Tensor | None = None
    m_scales: Tensor | None = None
    v_scales: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """What the steps of all parameters in one update have in common.

    rule: "adam", "lion", "signsgd"; "none" steps nothing and computes norms only. numbers, keys: `step_numbers`.
    betas: β₁, 1-β₁, β₂, 1-β₂. Moments in bfloat16 and in 8 bits are rounded at random; a latent's rows as those of
    latent first_latent + i of a larger SAE.
    """

    rule: str
    numbers: Tensor
    keys: Tensor
    eps: float
    betas: tuple[float, float, float, float]
    first_latent: int


@dataclass(frozen=True)
class Pieces:
    """first (M+1,) int32: the first piece of each latent, ascending; first[M] is how many there are. None where no
    latent can be long. length: entries of a piece; capacity: the most pieces that there can be."""

    first: Tensor | None
    length: int
    capacity: int


@dataclass(frozen=True)
class Entries:
    """The occupied slots of all terms in latent order, and the matrices their rows are in.

    starts (M+1,) int64; rows (slots,) int32 and acts (slots,) float32; row r is row r of x and grad, or from `split` on
    row r - split of more_x and more_grad (None with one term). dacts (slots,) float32: the gradients of the pre-acts;
    None where update_rows computes them.
    """

    starts: Tensor
    rows: Tensor
    acts: Tensor
    dacts: Tensor | None
    x: Tensor
    more_x: Tensor | None
    grad: Tensor
    more_grad: Tensor | None
    split: int
    pieces: Pieces


class ScreenStages(Protocol):
    """Screening, and the K largest of what it leaves."""

    def narrow_rows(self, t: Tensor, low: Tensor, scale: Tensor, norm: Tensor, residual: Tensor) -> None:
        """Fills the four from t (rows, D): low (rows, padded D) = t · 2ᵉ rounded, 0 past D; the others (rows,) fp32.

        low fp16: 2ᵉ brings the row's largest magnitude into [1/2, 1), scale = 2⁻ᵉ; of a row of zeros, or with inf or
        NaN in it, any finite numbers. low fp32: a plain copy, scale = 1.
        norm >= ‖low · scale‖ and residual >= ‖t - low · scale‖, by at most a few 2⁻¹⁶ of themselves. rows may be 0.
        """

    def product(
        self, x: Tensor, W: Tensor, rows: Tensor | None, count: Tensor, out: Tensor, chunk: int, stride: int
    ) -> None:
        """out[n, c] = ⟨x[n], W[r]⟩ where position chunk + c · stride is below count; other columns are left alone.

        r: rows[position], rows (P,) int32, or the position itself. x (N, D), W (M, D) and out (N, columns) fp16 or all
        fp32, D padded; rows of out may lie apart. Added up in fp32 (IEEE products, no TF32), rounded once.
        """

    def bars(self, scores: Tensor, table: Tensor, bounds: Tensor, count: Tensor, out: Tensor, plan: Plan) -> None:
        """Fills out (N,) fp32 with a guess of a bar: the rank-th largest v of the token's sample, or 0 if that is more.

        scores (N, sampled_chunks · width): the first chunks side by side. The sample: every sample_step-th of their
        columns, as far as its position is below count. The guess may lie below by a few bits; no result depends on it.
        """

    def append(
        self, scores: Tensor, table: Tensor, bounds: Tensor, bars: Tensor, limit: Tensor, values: Tensor,
        places: Tensor, counts: Tensor, chunk: int, stride: int, base: int, per_latent: bool = False,
    ) -> None:  # fmt: skip
        """Appends to each token's list what may be above its bar: not v + e <= bar, so NaN always.

        scores (N, at least width), rows may lie apart; table (TABLE_ROWS, width) of this chunk. Column c is the
        position chunk + c · stride, which must be below limit; its place is base + c, under which the table of all
        chunks knows it. values fp32 and places int32 (N, capacity) get v and place, in the order of the columns, after
        the counts (N,) int32 that are there; counts grow also by what does not fit and is not stored. bars (N,) fp32;
        per_latent: the table's thresholds instead, and bars is not read. r is that of scores' dtype.
        """

    def select(
        self, values: Tensor, places: Tensor, counts: Tensor, table: Tensor, bounds: Tensor, bars: Tensor,
        rows: Tensor | None, k: int, plan: Plan, dtype: torch.dtype, exact: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Of the survivors those that may be among the k largest: latents int32 and v fp32 (N, candidates), in the
        list's order; how many of each token, and certified (N,), both int32: all allocated here.

        With L the k-th largest v - e (0 where fewer are positive; NaN is left out): where v + e >= L and v + e > 0, and
        NaN. Certified, as 1: the list was long enough, there are at most plan.candidates, and L > bar or bar = 0. A
        token that is not certified has 0 candidates. dtype: of the scores that were stored; not exact: as if e = 0.
        """

    def rescore(
        self, x: Tensor, W: Tensor, b: Tensor, gate: Tensor | None, latents: Tensor, counts: Tensor, scores: Tensor
    ) -> None:
        """scores[n, r] = (⟨x[n], W[i]⟩ + b[i]) · gate[i] in fp32, i = latents[n, r], for the first counts[n] of a row
        or as many as there are slots. latents int32, scores fp32 (N, slots)."""

    def top_k(
        self, latents: Tensor, scores: Tensor, counts: Tensor, certified: Tensor, acts: Tensor, indices: Tensor,
        offset: int, last: int,
    ) -> None:  # fmt: skip
        """Fills acts and indices int32 (N, K) of certified tokens with the K largest positive scores of their first
        counts[n] latents, indices + offset ascending; others' are left alone.

        A score that acts' dtype rounds to 0 is left out. Empty slots come last: act 0, index `last`. latents and scores
        (N, candidates), a power of two; latents may be used up.
        """

    def exhaustive_top_k(
        self, x: Tensor, W: Tensor, b: Tensor, gate: Tensor | None, rows: Tensor | None, count: Tensor, tokens: Tensor,
        listed: Tensor, acts: Tensor, indices: Tensor, offset: int, last: int,
    ) -> None:  # fmt: skip
        """As top_k, for the first `listed` of tokens int32, from the exact scores of the first `count` positions: all
        latents, or the ascending rows (P,) int32."""


class RaggedStages(Protocol):
    """Ragged codes. A score is above its threshold unless it is <= that: NaN is. thresholds fp32: (M,) if per_latent,
    else (N,). acts (capacity,) in any dtype, indices (capacity,) int32: what does not fit is not stored."""

    def count_listed(
        self, latents: Tensor, scores: Tensor, found: Tensor, thresholds: Tensor, per_latent: bool, totals: Tensor
    ) -> None:
        """Fills totals (N,) int64 of the tokens whose list was long enough, found[n] <= slots: how many of the first
        found[n] scores of its row are above. latents int32, scores fp32 (N, slots); found (N,) int32."""

    def emit_listed(
        self, latents: Tensor, scores: Tensor, found: Tensor, thresholds: Tensor, per_latent: bool, offsets: Tensor,
        acts: Tensor, indices: Tensor,
    ) -> None:  # fmt: skip
        """Writes those tokens' entries, in the list's order, from offsets[n] on; offsets (N+1,) int64, uncut."""

    def every_latent(
        self, x: Tensor, W: Tensor, b: Tensor, tokens: Tensor, listed: Tensor, acts: Tensor, indices: Tensor, *,
        totals: Tensor | None = None, offsets: Tensor | None = None, thresholds: Tensor | None = None,
        per_latent: bool = False, least: Tensor | None = None, ties: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Counts into totals (and ties), or with offsets emits, those exact scores of all latents that are above
        thresholds, or above a key; for the first `listed` of tokens int32. Other tokens' totals are left alone.

        A key: a positive float32's bits as int32, 0x7FFFFFFF for NaN. With least instead of thresholds: the positive
        scores with a larger key, and of those with that key the first ties[n] of a token, but none that acts' dtype
        rounds to 0. Without offsets totals counts the former, and ties all with that key. totals, ties (N,) int64.
        """

    def histogram(self, x: Tensor, W: Tensor, b: Tensor, needed: Tensor, prefix: Tensor | None) -> Tensor:
        """int64 (65536,): how many positive keys of all exact scores have these upper bits (key >> 16), or these lower
        16 where the upper ones are `prefix`. All 0 where needed is 0."""


class EncodeStages(ScreenStages, RaggedStages, Protocol):
    """What the encoders are made of."""


class LatentStages(Protocol):
    """The latent-major half: a code regrouped by latent, and what is summed and stepped latent by latent."""

    @property
    def ROW_LIMIT(self) -> int | None:
        """Columns of the widest rows that update_rows takes, or None: wider ones' gradients are stored instead."""

    def list_slots(
        self, acts: Tensor, indices: Tensor, offsets: Tensor | None, d_sae: int, keys: Tensor, rows: Tensor,
        values: Tensor | None, first_row: int = 0, zeros: bool = False,
    ) -> None:  # fmt: skip
        """Fills keys and rows (int32) and values (float32), one number a slot of the code: fixed acts (N, K), or ragged
        acts (capacity,) with offsets (N+1,) int64.

        keys: the slot's latent, d_sae where it is empty or its latent is outside the dictionary. rows: first_row + its
        token. values: its act. Empty: act 0 in a fixed code; past offsets[N] in a ragged one; with values, act 0 too,
        unless zeros.
        """

    def sort_slots(
        self, keys: Tensor, rows: Tensor, values: Tensor | None, d_sae: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The listed slots latent by latent, stably: starts (M+1,) int64, rows int32, slots int64, values float32, the
        last three (slots,), all allocated here. starts[i]: how many keys are below i.

        Past starts[M] rows and slots are -1 and values 0; with values the slots may hold anything there.
        """

    def piece_starts(self, starts: Tensor, length: int) -> Tensor:
        """(M+1,) int32, allocated here: the first piece of each latent, the last how many there are. A latent with more
        than `length` entries has ceil(entries/length), others none."""

    def outer(
        self, starts: Tensor, tokens: Tensor, slots: Tensor, acts: Tensor, x: Tensor, pieces: Pieces, out: Tensor
    ) -> None:
        """out[i] = Σ acts[slots[e]] · x[tokens[e]] over e = starts[i] .. starts[i+1]; out (M, D) in x's dtype, not
        empty. Latents in pieces are added up piece by piece in rows of fp32, which are allocated here."""

    def step_numbers(
        self, lr: Tensor, step: Tensor, skip: Tensor | None, grad_scale: Tensor | None, rule: str, beta1: float,
        beta2: float, weight_decay: float, seed: int | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """numbers (5,) float32, each in float64 and rounded once: the step size, lr / (1-β₁ᵗ) for adam, else lr;
        1 / √(1-β₂ᵗ); 1, or 0 where skip is True; 1 - lr · weight_decay; grad_scale (0-d float64), or 1. And keys (8,)
        int32, of the streams of random bits (reference.rounding): 2i of the i-th parameter's m, 2i + 1 of its v.
        Allocated here.
        """

    def update_rows(
        self, W_enc: Tensor | None, W_dec: Tensor, b_enc: Tensor, enc_moments: Moments, dec_moments: Moments,
        bias_moments: Moments, entries: Entries, parts: Parts, pre_bias: Tensor | None, stats: Tensor, step: Step,
        unit_norm: bool, clip_rows: float | None, programs: int,
    ) -> None:  # fmt: skip
        """Gradient and step of every latent's rows (formulas: `update_latents`), in place: W_enc (M, D_in), W_dec
        (M, D_out), b_enc (M,) and their moments. W_enc None: tied, and enc_moments are none. parts: float32.

        Program p of `programs` owns the latents p, p + programs, ..., and fills pre_bias[p] (D_in,) float32 with their
        Σ db_enc_i · W_enc_i, without parts.db_enc and W_enc before its step (None: not needed), and stats[p] (4,)
        float64 with the squared gradient norms of W_enc (0 where tied), W_dec before projection, b_enc, and 0; stats
        may have more rows. With the rule "none" nothing else is written, and the norms are those of the gradients
        after projection and clipping. Streams 0, 1 are W_enc's, then W_dec's and b_enc's; tied, W_dec's come first.
        Workspaces are allocated here. If numbers[2] is 0 there are no latents for it: no parameter and no moment
        changes, and pre_bias and stats[:programs] are 0.
        """

    def update_bias(
        self, b: Tensor, moments: Moments, grads: list[Tensor], pre_bias: Tensor | None, stats: Tensor, step: Step,
        stream: int, workspace: Tensor,
    ) -> None:  # fmt: skip
        """Step of b (D,) in place, with the gradient Σ of the rows of grads, (N, D) each, - Σ of pre_bias (R, D)
        float32. stats (bias_programs(D), 4) float64: (0, 0, 0, its squared norm) in parts. stream: m's, v's is next.
        workspace (Σ bias_parts, D) float32, for grads and pre_bias in turn: the caller allocates it before it lets
        update_rows change anything, since the allocation may fail. If numbers[2] is 0, b and its moments stay as they
        are and stats are NaN, unknown.
        """

    def bias_parts(self, rows: int) -> int:
        """Rows of update_bias' workspace that a matrix of so many rows takes."""

    def bias_programs(self, D: int) -> int:
        """Rows of stats that update_bias fills."""


class Stages(EncodeStages, LatentStages, Protocol):
    """A whole backend: the above, and the ops that are one kernel."""

    def decode(self, acts: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor) -> Tensor:
        """(N, D) in W's dtype, allocated here: A W of a fixed (N, K) code, or of a ragged one with offsets (N+1,). An
        act of 0 adds nothing, and the row that it names is not read."""

    def decode_error(
        self, acts: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor, target: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """A W (+ bias) - target (N, D) in target's dtype, and its squares summed by token before rounding, float64
        (N,); both allocated here."""

    def active_dot(self, x: Tensor, acts: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor) -> Tensor:
        """⟨x[n], W[i]⟩ at the active latents, like acts, allocated here; 0 in empty and in spare slots."""
