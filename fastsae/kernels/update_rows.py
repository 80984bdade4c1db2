"""Gradient and optimizer step of one latent's rows, kept in registers from the first gather to the last store.

    dact_e = ⟨grad_n, W_dec_i⟩, or given    dW_dec_i = Σ act_e · grad_n    dW_enc_i = Σ dact_e · x_n
    db_enc_i = Σ dact_e;  then what other paths add to them (parts);  then W_dec's gradient loses its part along
    W_dec_i (unit_norm), each row is clipped and scaled, stepped, and W_dec_i is divided by its norm (unit_norm)

over the entries e = (token n, act_e) of latent i. One program takes every R-th latent: neighbours, which
often have similar numbers of entries, go to different programs. It adds the pre-bias term Σ db_enc_i · W_enc_i of its
latents in registers, so that W_enc is read once. A program of `_row_pieces_kernel` sums a piece of a long latent
(pieces.py).

Bytes: nnz·(D_in·sizeof(x) + D_out·sizeof(grad)) gathered; M·(D_in + D_out)·(2·sizeof(W) + 4·sizeof(moment)).
Flops: 6·nnz·D + 15·M·(D_in + D_out).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.backends import buffers
from fastsae.backends.gpu.stages import Entries, Moments, Parts, Step
from fastsae.kernels.gather import load_rows
from fastsae.kernels.limits import register_limit
from fastsae.kernels.optimizers import as_int32, as_pointers, latents_to_update, load_numbers, optimizer_step
from fastsae.kernels.pieces import bits_of, find_piece
from fastsae.kernels.variants import POINTERS, Variant

ROW_LIMIT = 4096
"""Columns that fit in registers. Rows beyond it have no kernel here: their gradients are stored."""


@dataclass(frozen=True)
class Config:
    BLOCK_IN: int
    BLOCK_OUT: int
    BLOCK_E: int  # entries whose rows are in flight together
    num_warps: int
    max_registers: int


def choose(d_in: int, d_out: int, eight_bit: bool = False) -> Config:
    """8 columns of a row to a thread, 16 for 4096 columns. Four rows stay in registers (W_dec's, both gradients, the
    pre-bias sum); the rows of BLOCK_E entries, and later two moments, pass through.

    Entries at once trade against registers. 4 and 168: three programs of four warps on a multiprocessor. 2048 columns
    take 2 and 128, or only one program of eight warps would fit; with 4096 columns only one ever fits. Odd widths load
    number by number and pay for their addresses in registers; rounding to 8 bits takes all there, 168 at 2048.
    """
    block_in, block_out = (max(16, triton.next_power_of_2(d)) for d in (d_in, d_out))
    widest, warps = max(block_in, block_out), min(8, max(1, max(block_in, block_out) // 256))
    if widest > 2048:
        return Config(block_in, block_out, BLOCK_E=2, num_warps=warps, max_registers=255)
    if d_in % 16 or d_out % 16:
        return Config(block_in, block_out, BLOCK_E=2, num_warps=warps, max_registers=255 if eight_bit else 168)
    if widest > 1024:
        return Config(block_in, block_out, BLOCK_E=2, num_warps=warps, max_registers=168 if eight_bit else 128)
    return Config(block_in, block_out, BLOCK_E=4, num_warps=warps, max_registers=168)


@triton.jit
def _add_entries(
    w, rows_ptr, acts_ptr, dacts_ptr, begin, end, x_ptr, more_x_ptr, grad_ptr, more_grad_ptr, split, D_IN, D_OUT,
    BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dW_dec_i, dW_enc_i and db_enc_i, summed over the entries begin .. end; w: W_dec_i in float32, 0 past D_OUT.
    dacts_ptr: given gradients of the pre-acts, or None."""
    c_in, c_out = tl.arange(0, BLOCK_IN), tl.arange(0, BLOCK_OUT)
    dec, enc = tl.zeros((BLOCK_OUT,), tl.float32), tl.zeros((BLOCK_IN,), tl.float32)
    bias = tl.full((), 0.0, tl.float32)
    for first in range(begin, end, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        live = e < end
        row = tl.load(rows_ptr + e, mask=live, other=0)
        act = tl.load(acts_ptr + e, mask=live, other=0.0)
        grad = load_rows(grad_ptr, more_grad_ptr, row, split, live, c_out, c_out < D_OUT, D_OUT)
        dact = tl.sum(grad * w[None, :], axis=1) if dacts_ptr is None else tl.load(dacts_ptr + e, mask=live, other=0.0)
        dec += tl.sum(act[:, None] * grad, axis=0)
        x = load_rows(x_ptr, more_x_ptr, row, split, live, c_in, c_in < D_IN, D_IN)
        enc += tl.sum(dact[:, None] * x, axis=0)
        bias += tl.sum(dact, axis=0)
    return dec, enc, bias


@triton.jit
def _row_pieces_kernel(
    W_dec_ptr, starts_ptr, rows_ptr, acts_ptr, dacts_ptr, x_ptr, more_x_ptr, grad_ptr, more_grad_ptr, split,
    pieces_ptr, sums_ptr, bias_sums_ptr, M, D_IN, D_OUT, length,
    BITS: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """sums[j] (D_OUT + D_IN,), bias_sums[j] = what piece j adds to dW_dec_i, dW_enc_i and db_enc_i of its latent."""
    j = tl.program_id(0)
    if j >= tl.load(pieces_ptr + M):
        return
    i, begin, end = find_piece(j, pieces_ptr, starts_ptr, M, length, BITS)
    c_in, c_out = tl.arange(0, BLOCK_IN), tl.arange(0, BLOCK_OUT)
    w = tl.load(W_dec_ptr + tl.cast(i, tl.int64) * D_OUT + c_out, mask=c_out < D_OUT, other=0.0).to(tl.float32)

    dec, enc, bias = _add_entries(
        w, rows_ptr, acts_ptr, dacts_ptr, begin, end, x_ptr, more_x_ptr, grad_ptr, more_grad_ptr, split, D_IN, D_OUT,
        BLOCK_IN, BLOCK_OUT, BLOCK_E,
    )  # fmt: skip

    sums = sums_ptr + tl.cast(j, tl.int64) * (D_OUT + D_IN)
    tl.store(sums + c_out, dec, mask=c_out < D_OUT)
    tl.store(sums + D_OUT + c_in, enc, mask=c_in < D_IN)
    tl.store(bias_sums_ptr + j, bias)


@triton.jit
def _clipped(g, CLIP: tl.constexpr, most):
    """g · min(1, most / ‖g‖)."""
    if CLIP:
        norm = tl.sqrt_rn(tl.sum(g * g, axis=0))
        g *= tl.where(norm > most, most / norm, 1.0)
    return g


@triton.jit(do_not_specialize=["first_latent"])
def _update_rows_kernel(
    W_enc_ptr, W_dec_ptr, b_enc_ptr, m_enc_ptr, v_enc_ptr, m_enc_scales_ptr, v_enc_scales_ptr,
    m_dec_ptr, v_dec_ptr, m_dec_scales_ptr, v_dec_scales_ptr, m_bias_ptr, v_bias_ptr,
    starts_ptr, rows_ptr, acts_ptr, dacts_ptr, x_ptr, more_x_ptr, grad_ptr, more_grad_ptr, split,
    pieces_ptr, sums_ptr, bias_sums_ptr, pull_ptr, segment, db_enc_ptr, more_enc_ptr, more_dec_ptr, more_bias_ptr,
    pre_bias_ptr, stats_ptr, numbers_ptr, keys_ptr, eps, beta1, rest1, beta2, rest2, most, first_latent,
    M, D_IN, D_OUT, RULE: tl.constexpr, UNIT_NORM: tl.constexpr, CLIP: tl.constexpr,
    BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Absent, and so not done: W_enc_ptr and its moments (tied), what the rule or the storage of moments does not keep,
    dacts_ptr (they are computed), pieces_ptr (nothing is long), every part (pull_ptr to more_bias_ptr), pre_bias_ptr.

    pre_bias[p] (D_IN,) = Σ db_enc_i · W_enc_i, stats[p] (4,) = squared norms, both over the latents of program p; of a
    step that is skipped, 0. first_latent: mod 2³², as a signed number.
    """
    TIED: tl.constexpr = W_enc_ptr is None
    dec_keys, bias_keys = keys_ptr + (0 if TIED else 2), keys_ptr + (2 if TIED else 4)
    numbers, betas = load_numbers(numbers_ptr, eps), (beta1, rest1, beta2, rest2)
    scale = tl.load(numbers_ptr + 4)
    enc_moments = (m_enc_ptr, v_enc_ptr, m_enc_scales_ptr, v_enc_scales_ptr)
    dec_moments = (m_dec_ptr, v_dec_ptr, m_dec_scales_ptr, v_dec_scales_ptr)
    c_in, c_out = tl.arange(0, BLOCK_IN), tl.arange(0, BLOCK_OUT)
    in_enc, in_dec = c_in < D_IN, c_out < D_OUT
    pre_bias = tl.zeros((BLOCK_IN,), tl.float32)
    square_enc = tl.full((), 0.0, tl.float64)
    square_dec = tl.full((), 0.0, tl.float64)
    square_bias = tl.full((), 0.0, tl.float64)

    for i in range(tl.program_id(0), latents_to_update(numbers_ptr, M), tl.num_programs(0)):
        # Load the row; a latent in pieces has no entries left to add here.
        latent = tl.cast(i, tl.int64)
        at_dec = latent * D_OUT + c_out
        w_dec = tl.load(W_dec_ptr + at_dec, mask=in_dec, other=0.0, eviction_policy="evict_first").to(tl.float32)
        begin, end = tl.load(starts_ptr + i).to(tl.int32), tl.load(starts_ptr + i + 1).to(tl.int32)
        if pieces_ptr is not None:
            first, last = tl.load(pieces_ptr + i), tl.load(pieces_ptr + i + 1)
            begin = tl.where(last > first, end, begin)

        # Gradients.
        dec, enc, bias = _add_entries(
            w_dec, rows_ptr, acts_ptr, dacts_ptr, begin, end, x_ptr, more_x_ptr, grad_ptr, more_grad_ptr, split,
            D_IN, D_OUT, BLOCK_IN, BLOCK_OUT, BLOCK_E,
        )  # fmt: skip
        if pieces_ptr is not None:
            for j in range(first, last):
                sums = sums_ptr + tl.cast(j, tl.int64) * (D_OUT + D_IN)
                dec += tl.load(sums + c_out, mask=in_dec, other=0.0)
                enc += tl.load(sums + D_OUT + c_in, mask=in_enc, other=0.0)
                bias += tl.load(bias_sums_ptr + j)
        if more_dec_ptr is not None:
            dec += tl.load(more_dec_ptr + at_dec, mask=in_dec, other=0.0)
        if more_enc_ptr is not None:
            enc += tl.load(more_enc_ptr + (latent * D_IN + c_in), mask=in_enc, other=0.0)
        if more_bias_ptr is not None:
            bias += tl.load(more_bias_ptr + i)
        if pull_ptr is not None:
            pull = tl.load(pull_ptr + (latent * (D_OUT // segment) + c_out // segment), mask=in_dec, other=0.0)
            dec += pull * w_dec

        # The decoder's row, with w_dec as before the step. A row of 0 keeps its gradient and its norm.
        if TIED:
            dec += enc
            if pre_bias_ptr is not None:
                pre_bias += bias * w_dec
        if RULE != "none":
            square_dec += tl.sum(dec * dec, axis=0).to(tl.float64)
        if UNIT_NORM:
            square = tl.sum(w_dec * w_dec, axis=0)
            dec -= tl.sum(dec * w_dec, axis=0) / tl.where(square > 0, square, 1.0) * w_dec
        dec = _clipped(dec, CLIP, most)
        if RULE == "none":
            square_dec += tl.sum(dec * dec, axis=0).to(tl.float64)
        else:
            w_dec = optimizer_step(
                w_dec, dec * scale, dec_moments, latent, first_latent, c_out, in_dec, D_OUT, numbers, betas, dec_keys,
                RULE, BLOCK_OUT,
            )  # fmt: skip
            if UNIT_NORM:
                norm = tl.sqrt(tl.sum(w_dec * w_dec, axis=0))
                w_dec *= 1.0 / tl.where(norm > 0, norm, 1.0)
            tl.store(W_dec_ptr + at_dec, w_dec.to(W_dec_ptr.dtype.element_ty), mask=in_dec)

        # The encoder's row, unless tied.
        if not TIED:
            if RULE != "none" or pre_bias_ptr is not None:
                at_enc = latent * D_IN + c_in
                w_enc = tl.load(W_enc_ptr + at_enc, mask=in_enc, other=0.0, eviction_policy="evict_first").to(
                    tl.float32
                )
            if pre_bias_ptr is not None:
                pre_bias += bias * w_enc
            if RULE != "none":
                square_enc += tl.sum(enc * enc, axis=0).to(tl.float64)
            enc = _clipped(enc, CLIP, most)
            if RULE == "none":
                square_enc += tl.sum(enc * enc, axis=0).to(tl.float64)
            else:
                w_enc = optimizer_step(
                    w_enc, enc * scale, enc_moments, latent, first_latent, c_in, in_enc, D_IN, numbers, betas,
                    keys_ptr, RULE, BLOCK_IN,
                )  # fmt: skip
                tl.store(W_enc_ptr + at_enc, w_enc.to(W_enc_ptr.dtype.element_ty), mask=in_enc)

        # The bias.
        if db_enc_ptr is not None:
            bias += tl.load(db_enc_ptr + i)
        square_bias += bias.to(tl.float64) * bias
        if RULE != "none":
            one = tl.zeros((1,), tl.int32)
            b = tl.load(b_enc_ptr + latent + one).to(tl.float32)
            b = optimizer_step(
                b, one + bias * scale, (m_bias_ptr, v_bias_ptr, None, None), latent, first_latent, one, one == 0, 1,
                numbers, betas, bias_keys, RULE, 1,
            )  # fmt: skip
            tl.store(b_enc_ptr + latent + one, b.to(b_enc_ptr.dtype.element_ty))

    # Sums over this program's latents.
    p = tl.program_id(0).to(tl.int64)
    if pre_bias_ptr is not None:
        tl.store(pre_bias_ptr + p * D_IN + c_in, pre_bias, mask=in_enc)
    tl.store(stats_ptr + 4 * p, square_enc)
    tl.store(stats_ptr + 4 * p + 1, square_dec)
    tl.store(stats_ptr + 4 * p + 2, square_bias)
    tl.store(stats_ptr + 4 * p + 3, 0.0)


def update_rows(
    W_enc: Tensor | None, W_dec: Tensor, b_enc: Tensor, enc_moments: Moments, dec_moments: Moments,
    bias_moments: Moments, entries: Entries, parts: Parts, pre_bias: Tensor | None, stats: Tensor, step: Step,
    unit_norm: bool, clip_rows: float | None, programs: int,
) -> None:  # fmt: skip
    """Steps W_enc, W_dec and b_enc, and fills pre_bias (programs, D_in) float32 and stats[:programs]."""
    (d_sae, d_out), d_in = W_dec.shape, (W_dec if W_enc is None else W_enc).shape[1]
    c = choose(d_in, d_out, dec_moments.m_scales is not None)
    blocks = dict(BLOCK_IN=c.BLOCK_IN, BLOCK_OUT=c.BLOCK_OUT, BLOCK_E=c.BLOCK_E, num_warps=c.num_warps)
    blocks |= register_limit(c.max_registers)
    e, pieces = entries, entries.pieces
    listed = (e.starts, e.rows, e.acts, e.dacts, e.x, e.more_x, e.grad, e.more_grad, e.split)
    sums = bias_sums = None
    if pieces.first is not None:
        sums = buffers.empty((pieces.capacity, d_out + d_in), torch.float32, W_dec.device)
        bias_sums = buffers.empty((pieces.capacity,), torch.float32, W_dec.device)
        _row_pieces_kernel[(pieces.capacity,)](
            W_dec, *listed, pieces.first, sums, bias_sums, d_sae, d_in, d_out, pieces.length,
            BITS=bits_of(pieces.first), **blocks, enable_fp_fusion=True,
        )  # fmt: skip
    pull = parts.decoder_pull
    segment = d_out if pull is None else d_out // pull.shape[1]
    _update_rows_kernel[(programs,)](
        W_enc, W_dec, b_enc, *as_pointers(enc_moments), *as_pointers(dec_moments), *as_pointers(bias_moments)[:2],
        *listed, pieces.first, sums, bias_sums, pull, segment, parts.db_enc, parts.W_enc, parts.W_dec, parts.pre,
        pre_bias, stats, step.numbers, step.keys, step.eps, *step.betas, clip_rows or 0.0,
        as_int32(step.first_latent), d_sae, d_in, d_out, RULE=step.rule, UNIT_NORM=unit_norm,
        CLIP=clip_rows is not None, **blocks, enable_fp_fusion=True,
    )  # fmt: skip


SCALARS = dict.fromkeys(("eps", "beta1", "rest1", "beta2", "rest2", "most"), "fp32") | dict.fromkeys(
    ("M", "D_IN", "D_OUT", "split", "length", "segment", "first_latent"), "i32"
)
PARTS = ("dacts_ptr", "pull_ptr", "db_enc_ptr", "more_enc_ptr", "more_dec_ptr", "more_bias_ptr")
SCALES = ("m_enc_scales_ptr", "v_enc_scales_ptr", "m_dec_scales_ptr", "v_dec_scales_ptr")
WORKSPACES = {
    "starts_ptr": "*i64", "rows_ptr": "*i32", "acts_ptr": "*fp32", "pieces_ptr": "*i32", "sums_ptr": "*fp32",
    "bias_sums_ptr": "*fp32", "pre_bias_ptr": "*fp32", "stats_ptr": "*fp64", "numbers_ptr": "*fp32", "keys_ptr": "*i32",
} | dict.fromkeys(PARTS + SCALES, "*fp32")  # fmt: skip
WEIGHTS = ("W_enc_ptr", "W_dec_ptr", "b_enc_ptr", "x_ptr", "more_x_ptr", "grad_ptr", "more_grad_ptr")
FIRST = ("m_enc_ptr", "m_dec_ptr", "m_bias_ptr")
SECOND = ("v_enc_ptr", "v_dec_ptr", "v_bias_ptr")


def variant(
    kernel: Any, name: str, dtypes: tuple[torch.dtype, torch.dtype], widths: tuple[int, int],
    absent: tuple[str, ...], constants: dict[str, Any], num_warps: int, maxnreg: int,
) -> Variant:  # fmt: skip
    """A compilation of one of the two kernels, which share argument names. dtypes: of weights and moments."""
    weight, moment = dtypes
    types = SCALARS | WORKSPACES | dict.fromkeys(WEIGHTS, POINTERS[weight])
    types |= dict.fromkeys(FIRST + SECOND, POINTERS[moment])
    if moment == torch.float8_e4m3fn:
        types |= dict.fromkeys(("m_bias_ptr", "v_bias_ptr"), "*fp32")
    else:
        absent += SCALES
    used = [argument for argument in kernel.arg_names if argument in types]
    sizes = {"D_IN": widths[0], "D_OUT": widths[1]}
    return Variant(
        kernel,
        f"{name}/{POINTERS[weight][1:]}-{POINTERS[moment][1:]}/D={widths[0]}x{widths[1]}",
        {argument: types[argument] for argument in used if argument not in absent},
        constants | {argument: None for argument in used if argument in absent},
        num_warps,
        aligned=tuple(name for name, width in sizes.items() if name in used and width % 16 == 0),
        maxnreg=maxnreg,
    )


ONE_TERM = ("more_x_ptr", "more_grad_ptr")
TIED = ("W_enc_ptr", "m_enc_ptr", "v_enc_ptr", "m_enc_scales_ptr", "v_enc_scales_ptr")
UNCUT = ("pieces_ptr", "sums_ptr", "bias_sums_ptr")
DTYPES = tuple((w, m) for w in (torch.float32, torch.bfloat16) for m in (torch.float32, torch.bfloat16))
WIDTHS = ((768, 768), (2048, 2048), (4096, 4096), (577, 577), (768, 4096))


def variants() -> list[Variant]:
    """Rows of every class in all dtypes; with each option too if weights and moments have one dtype; every rule, 8-bit
    moments, and all parts with clipping, of float32 weights."""
    found = []
    for dtypes in (*DTYPES, (torch.float32, torch.float8_e4m3fn)):
        for widths in WIDTHS:
            c = choose(*widths, dtypes[1] == torch.float8_e4m3fn)
            blocks = {"BLOCK_IN": c.BLOCK_IN, "BLOCK_OUT": c.BLOCK_OUT, "BLOCK_E": c.BLOCK_E}
            flags = {"RULE": "adam", "UNIT_NORM": True, "CLIP": False}
            plain = (*ONE_TERM, *PARTS) if widths[0] == widths[1] else (*ONE_TERM, *PARTS, "pre_bias_ptr")
            rows: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {"": (plain, {})}
            if dtypes[0] == dtypes[1] and widths[0] == widths[1]:
                rows |= {"/terms": (PARTS, {}), "/tied": (TIED + PARTS, {}), "/uncut": (plain + UNCUT, {})}
            if dtypes == (torch.float32, torch.float32):
                rows |= {
                    "/lion": (plain + SECOND, {"RULE": "lion"}),
                    "/signsgd": (plain + FIRST + SECOND, {"RULE": "signsgd"}),
                    "/norms": (plain + FIRST + SECOND, {"RULE": "none", "CLIP": True}),
                    "/parts": (tuple(name for name in plain if name not in PARTS), {"CLIP": True}),
                }
            for option, (absent, other) in rows.items():
                name, constants = f"update_rows{option}", blocks | flags | other
                found.append(
                    variant(_update_rows_kernel, name, dtypes, widths, absent, constants, c.num_warps, c.max_registers)
                )
            if dtypes[0] == dtypes[1]:
                given = ("dacts_ptr",)
                pieces: dict[str, tuple[str, ...]] = {"": (*ONE_TERM, *given), "/terms": given}
                if dtypes[0] == torch.float32:
                    pieces["/dacts"] = ONE_TERM
                for option, absent in pieces.items():
                    name, constants = f"row_pieces{option}", {**blocks, "BITS": 17}
                    found.append(
                        variant(
                            _row_pieces_kernel, name, dtypes, widths, absent, constants, c.num_warps, c.max_registers
                        )
                    )
    return found
