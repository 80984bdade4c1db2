"""Gradient and Adam step of latents whose rows are too wide for registers: dots first, then rows tile by tile.

    1. dots: dact_e = ⟨grad_n, W_dec_i⟩ of every entry, db_enc_i and the step of b_enc; and how far the gradient of the
       decoder's row lies along it: Σ_e act_e · dact_e (tied: + dact_e · ⟨x_n, W_i⟩) over ‖W_dec_i‖², so that the
       projection is known before the gradient is
    2. rows: of either dictionary BLOCK_D columns of the gradient, projected, and their Adam step; then the new row is
       divided by its norm, from a float32 row of scratch that stays in L2 (unit_norm)

The formulas, which program has which latents, and the options are those of update_rows.py.

Bytes: nnz·(D_in·sizeof(x) + 2·D_out·sizeof(grad)) gathered; M·(D_in + D_out)·(2·sizeof(W) + 4·sizeof(moment)), and
M·D_out·sizeof(W) for the dots.
Flops: 6·nnz·D + 17·M·(D_in + D_out).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from fastsae.kernels.adam import adam_step, latents_to_update
from fastsae.kernels.gather import load_rows, weighted_rows
from fastsae.kernels.limits import register_limit
from fastsae.kernels.pieces import bits_of, find_piece
from fastsae.kernels.update_rows import DTYPES, ONE_TERM, UNCUT, arguments, variant
from fastsae.kernels.variants import Variant
from torch import Tensor

from fastsae.backends import buffers
from fastsae.backends.gpu.stages import Entries, Moments


@dataclass(frozen=True)
class Config:
    BLOCK_D: int
    BLOCK_E: int
    num_warps: int
    max_registers: int


def choose() -> Config:
    """8 columns a thread and 4 entries at once, as in update_rows for 1024 columns; aligned rows take 40 to 72
    registers of the 128.
    """
    return Config(BLOCK_D=1024, BLOCK_E=4, num_warps=4, max_registers=128)


@triton.jit
def _dots(
    w_row, rows_ptr, acts_ptr, dacts_ptr, begin, end, x_ptr, more_x_ptr, grad_ptr, more_grad_ptr, split, D,
    ALONG_X: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Fills dacts[begin:end]; returns their sum, and the gradient's dot with the row (ALONG_X: x's part too)."""
    bias, along = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    for first in range(begin, end, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        live = e < end
        row = tl.load(rows_ptr + e, mask=live, other=0)
        weight = tl.load(acts_ptr + e, mask=live, other=0.0)
        dact, pre = tl.zeros((BLOCK_E,), tl.float32), tl.zeros((BLOCK_E,), tl.float32)
        for start in range(0, D, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            inside = columns < D
            w = tl.load(w_row + columns, mask=inside, other=0.0).to(tl.float32)
            grad = load_rows(grad_ptr, more_grad_ptr, row, split, live, columns, inside, D)
            dact += tl.sum(grad * w[None, :], axis=1)
            if ALONG_X:
                x = load_rows(x_ptr, more_x_ptr, row, split, live, columns, inside, D)
                pre += tl.sum(x * w[None, :], axis=1)
        tl.store(dacts_ptr + e, dact, mask=live)
        bias += tl.sum(dact, axis=0)
        along += tl.sum(dact * (weight + pre), axis=0)
    return bias, along


@triton.jit
def _dot_pieces_kernel(
    W_dec_ptr, starts_ptr, rows_ptr, acts_ptr, x_ptr, more_x_ptr, grad_ptr, more_grad_ptr, split, dacts_ptr,
    pieces_ptr, bias_sums_ptr, M, D_OUT, length,
    ALONG_X: tl.constexpr, BITS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """bias_sums[j] (2,) = what _dots returns for piece j."""
    j = tl.program_id(0)
    if j >= tl.load(pieces_ptr + M):
        return
    i, begin, end = find_piece(j, pieces_ptr, starts_ptr, M, length, BITS)
    bias, along = _dots(
        W_dec_ptr + tl.cast(i, tl.int64) * D_OUT, rows_ptr, acts_ptr, dacts_ptr, begin, end,
        x_ptr, more_x_ptr, grad_ptr, more_grad_ptr, split, D_OUT, ALONG_X, BLOCK_D, BLOCK_E,
    )  # fmt: skip
    tl.store(bias_sums_ptr + 2 * j, bias)
    tl.store(bias_sums_ptr + 2 * j + 1, along)


@triton.jit
def _dots_kernel(
    W_dec_ptr, b_enc_ptr, m_bias_ptr, v_bias_ptr, starts_ptr, rows_ptr, acts_ptr, x_ptr, more_x_ptr, grad_ptr,
    more_grad_ptr, split, dacts_ptr, pieces_ptr, bias_sums_ptr, biases_ptr, alongs_ptr, stats_ptr,
    numbers_ptr, keys_ptr, eps, beta1, rest1, beta2, rest2, M, D_OUT,
    ALONG_X: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """biases[i] = db_enc_i, alongs[i] = ⟨dW_dec_i, W_dec_i⟩ / ‖W_dec_i‖²; b_enc's step; stats[p, 2]."""
    numbers = (tl.load(numbers_ptr), tl.load(numbers_ptr + 1), eps)
    square_bias = tl.full((), 0.0, tl.float64)
    for i in range(tl.program_id(0), latents_to_update(numbers_ptr, M), tl.num_programs(0)):
        at = tl.cast(i, tl.int64)
        w_row = W_dec_ptr + at * D_OUT
        begin, end = tl.load(starts_ptr + i).to(tl.int32), tl.load(starts_ptr + i + 1).to(tl.int32)
        first, last = begin, begin
        if pieces_ptr is not None:
            first, last = tl.load(pieces_ptr + i), tl.load(pieces_ptr + i + 1)
            begin = tl.where(last > first, end, begin)
        bias, along = _dots(
            w_row, rows_ptr, acts_ptr, dacts_ptr, begin, end, x_ptr, more_x_ptr, grad_ptr, more_grad_ptr, split, D_OUT,
            ALONG_X, BLOCK_D, BLOCK_E,
        )  # fmt: skip
        if pieces_ptr is not None:
            for j in range(first, last):
                bias += tl.load(bias_sums_ptr + 2 * j)
                along += tl.load(bias_sums_ptr + 2 * j + 1)
        tl.store(biases_ptr + at, bias)

        if alongs_ptr is not None:
            square = tl.zeros((BLOCK_D,), tl.float32)
            for start in range(0, D_OUT, BLOCK_D):
                columns = start + tl.arange(0, BLOCK_D)
                w = tl.load(w_row + columns, mask=columns < D_OUT, other=0.0).to(tl.float32)
                square += w * w
            squares = tl.sum(square, axis=0)
            tl.store(alongs_ptr + at, along / tl.where(squares > 0, squares, 1.0))

        square_bias += bias.to(tl.float64) * bias
        b = tl.load(b_enc_ptr + at).to(tl.float32)
        b = adam_step(
            b, bias, m_bias_ptr, v_bias_ptr, at, True, numbers, (beta1, rest1, beta2, rest2), keys_ptr, STOCHASTIC
        )
        tl.store(b_enc_ptr + at, b.to(b_enc_ptr.dtype.element_ty))
    tl.store(stats_ptr + 4 * tl.program_id(0) + 2, square_bias)


@triton.jit
def _sum_pieces_kernel(
    starts_ptr, rows_ptr, weights_ptr, source_ptr, more_source_ptr, weights2_ptr, source2_ptr, more_source2_ptr,
    split, pieces_ptr, sums_ptr, M, D, length, BITS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """sums[j] (D,) = Σ_e weights[e] · source[row of e] over piece j; tied: of both sources."""
    j = tl.program_id(0)
    if j >= tl.load(pieces_ptr + M):
        return
    _, begin, end = find_piece(j, pieces_ptr, starts_ptr, M, length, BITS)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    g = weighted_rows(
        weights_ptr, rows_ptr, begin, end, source_ptr, more_source_ptr, split, columns, D, BLOCK_E, BLOCK_D
    )
    if weights2_ptr is not None:
        g += weighted_rows(
            weights2_ptr, rows_ptr, begin, end, source2_ptr, more_source2_ptr, split, columns, D, BLOCK_E, BLOCK_D
        )
    tl.store(sums_ptr + tl.cast(j, tl.int64) * D + columns, g, mask=columns < D)


@triton.jit
def _update_wide_kernel(
    W_ptr, m_ptr, v_ptr, starts_ptr, rows_ptr, weights_ptr, source_ptr, more_source_ptr, weights2_ptr, source2_ptr,
    more_source2_ptr, split, pieces_ptr, sums_ptr, biases_ptr, alongs_ptr, scratch_ptr, pre_bias_ptr, stats_ptr,
    numbers_ptr, keys_ptr, eps, beta1, rest1, beta2, rest2, M, D,
    STOCHASTIC: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One dictionary's rows. Absent: weights2_ptr and its source (not tied), alongs_ptr and scratch_ptr (free norm),
    pieces_ptr (nothing is long), pre_bias_ptr (zeros before; then pre_bias[p] = Σ db_enc_i · W_i). stats[p, 0].
    """
    numbers, betas = (tl.load(numbers_ptr), tl.load(numbers_ptr + 1), eps), (beta1, rest1, beta2, rest2)
    p = tl.program_id(0).to(tl.int64)
    squares = tl.full((), 0.0, tl.float64)
    for i in range(tl.program_id(0), latents_to_update(numbers_ptr, M), tl.num_programs(0)):
        row = tl.cast(i, tl.int64) * D
        begin, end = tl.load(starts_ptr + i).to(tl.int32), tl.load(starts_ptr + i + 1).to(tl.int32)
        first, last = begin, begin
        if pieces_ptr is not None:
            first, last = tl.load(pieces_ptr + i), tl.load(pieces_ptr + i + 1)
            begin = tl.where(last > first, end, begin)

        new_square = tl.full((), 0.0, tl.float32)
        for start in range(0, D, BLOCK_D):
            # Gradient.
            columns = start + tl.arange(0, BLOCK_D)
            inside = columns < D
            g = weighted_rows(
                weights_ptr, rows_ptr, begin, end, source_ptr, more_source_ptr, split, columns, D, BLOCK_E, BLOCK_D
            )
            if weights2_ptr is not None:
                g += weighted_rows(
                    weights2_ptr, rows_ptr, begin, end, source2_ptr, more_source2_ptr, split, columns, D,
                    BLOCK_E, BLOCK_D,
                )  # fmt: skip
            if pieces_ptr is not None:
                for j in range(first, last):
                    g += tl.load(sums_ptr + tl.cast(j, tl.int64) * D + columns, mask=inside, other=0.0)
            squares += tl.sum(g * g, axis=0).to(tl.float64)

            # Step. Only this program writes its partial row of the pre-bias term, and one thread each column.
            w = tl.load(W_ptr + row + columns, mask=inside, other=0.0).to(tl.float32)
            if pre_bias_ptr is not None:
                at = pre_bias_ptr + p * D + columns
                tl.store(at, tl.load(at, mask=inside, other=0.0) + tl.load(biases_ptr + i) * w, mask=inside)
            if alongs_ptr is not None:
                g -= tl.load(alongs_ptr + i) * w
            w = adam_step(w, g, m_ptr, v_ptr, row + columns, inside, numbers, betas, keys_ptr, STOCHASTIC)
            if scratch_ptr is not None:
                new_square += tl.sum(w * w, axis=0)
                tl.store(scratch_ptr + p * D + columns, w, mask=inside)
            else:
                tl.store(W_ptr + row + columns, w.to(W_ptr.dtype.element_ty), mask=inside)

        # Norm. The compiler chooses layouts, so another thread than the one that wrote a number may read it back.
        if scratch_ptr is not None:
            norm = tl.sqrt(new_square)
            tl.debug_barrier()
            for start in range(0, D, BLOCK_D):
                columns = start + tl.arange(0, BLOCK_D)
                w = tl.load(scratch_ptr + p * D + columns, mask=columns < D, other=0.0)
                w *= 1.0 / tl.where(norm > 0, norm, 1.0)
                tl.store(W_ptr + row + columns, w.to(W_ptr.dtype.element_ty), mask=columns < D)
        tl.debug_barrier()
    tl.store(stats_ptr + 4 * p, squares)


def update(
    W_enc: Tensor | None, W_dec: Tensor, b_enc: Tensor, enc_moments: Moments, dec_moments: Moments,
    bias_moments: Moments, entries: Entries, pre_bias: Tensor | None, stats: Tensor, numbers: Tensor, keys: Tensor,
    eps: float, betas: tuple[float, float, float, float], unit_norm: bool, stochastic: bool, programs: int,
) -> None:  # fmt: skip
    """As update_rows.update."""
    tied, c = W_enc is None, choose()
    (d_sae, d_out), device = W_dec.shape, W_dec.device
    blocks = dict(BLOCK_D=c.BLOCK_D, BLOCK_E=c.BLOCK_E, num_warps=c.num_warps) | register_limit(c.max_registers)
    e, listed, pieces = entries, arguments(entries), entries.pieces
    bits = 0 if pieces.first is None else bits_of(pieces.first)

    def floats(*shape: int) -> Tensor:
        return buffers.empty(shape, torch.float32, device)

    dacts, biases, alongs = floats(e.rows.shape[0]), floats(d_sae), floats(d_sae) if unit_norm else None
    stats[:programs].zero_()
    if pre_bias is not None:
        pre_bias.zero_()

    # Dots.
    bias_sums, along_x = None, tied and unit_norm
    if pieces.first is not None:
        bias_sums = floats(pieces.capacity, 2)
        _dot_pieces_kernel[(pieces.capacity,)](
            W_dec, *listed, dacts, pieces.first, bias_sums, d_sae, d_out, pieces.length,
            ALONG_X=along_x, BITS=bits, **blocks,
        )  # fmt: skip
    _dots_kernel[(programs,)](
        W_dec, b_enc, *bias_moments, *listed, dacts, pieces.first, bias_sums, biases, alongs, stats, numbers,
        keys[2 if tied else 4 :], eps, *betas, d_sae, d_out, ALONG_X=along_x, STOCHASTIC=stochastic, **blocks,
    )  # fmt: skip

    # Rows.
    def step(
        W: Tensor, moments: Moments, sources: tuple, stats: Tensor, keys: Tensor, is_unit: bool, partial: Tensor | None
    ) -> None:
        D, sums = W.shape[1], None
        if pieces.first is not None:
            sums = floats(pieces.capacity, D)
            _sum_pieces_kernel[(pieces.capacity, triton.cdiv(D, c.BLOCK_D))](
                e.starts, e.rows, *sources, e.split, pieces.first, sums, d_sae, D, pieces.length, BITS=bits, **blocks
            )
        scratch = floats(programs, D) if is_unit else None
        _update_wide_kernel[(programs,)](
            W, *moments, e.starts, e.rows, *sources, e.split, pieces.first, sums, biases, alongs if is_unit else None,
            scratch, partial, stats, numbers, keys, eps, *betas, d_sae, D,
            STOCHASTIC=stochastic, **blocks,
        )  # fmt: skip

    inputs, outputs = (dacts, e.x, e.more_x), (e.acts, e.grad, e.more_grad)
    if W_enc is None:
        step(W_dec, dec_moments, outputs + inputs, stats.view(-1)[1:], keys, unit_norm, pre_bias)
    else:
        step(W_dec, dec_moments, (*outputs, None, None, None), stats.view(-1)[1:], keys[2:], unit_norm, None)
        step(W_enc, enc_moments, (*inputs, None, None, None), stats, keys, False, pre_bias)


def variants() -> list[Variant]:
    """Each kernel with all options, for untied and for tied dictionaries."""
    found, c = [], choose()
    blocks = {"BLOCK_D": c.BLOCK_D, "BLOCK_E": c.BLOCK_E}
    encoder = ("weights2_ptr", "source2_ptr", "more_source2_ptr", "more_source_ptr", "alongs_ptr", "scratch_ptr")
    decoder = (*encoder[:4], "pre_bias_ptr")
    for dtypes in DTYPES:
        step = blocks | {"STOCHASTIC": dtypes[1] == torch.bfloat16}
        for widths in ((16384, 16384), (4099, 4099)):
            for option, absent in (("encoder", encoder), ("decoder", decoder), ("tied-terms", ())):
                name = f"update_wide/{option}"
                found.append(
                    variant(_update_wide_kernel, name, dtypes, widths, absent, step, c.num_warps, c.max_registers)
                )
            if dtypes[0] != dtypes[1]:
                continue
            for option, absent in (("", ONE_TERM), ("/terms", ()), ("/uncut", ONE_TERM + UNCUT)):
                name, constants = f"wide_dots{option}", step | {"ALONG_X": option == "/terms"}
                found.append(
                    variant(_dots_kernel, name, dtypes, widths, absent, constants, c.num_warps, c.max_registers)
                )
            cut = blocks | {"BITS": 17}
            dots = cut | {"ALONG_X": False}
            found.append(
                variant(
                    _sum_pieces_kernel, "sum_pieces", dtypes, widths, encoder[:4], cut, c.num_warps, c.max_registers
                )
            )
            found.append(
                variant(_dot_pieces_kernel, "dot_pieces", dtypes, widths, ONE_TERM, dots, c.num_warps, c.max_registers)
            )
    return found
