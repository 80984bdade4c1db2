"""The decoder's bias: sums of columns in a fixed order, then its step.

    db_dec = Σ_n grad_n over the terms that have the bias - Σ_i db_enc_i · W_enc_i (pre_bias)

`_column_sums_kernel` adds BLOCK_N rows, BLOCK_D columns of them, to one row of a workspace; `_update_bias_kernel` adds
the workspace's rows, subtracts those of the pre-bias term, and takes the step on BLOCK_D columns.

Bytes: N·D·sizeof(grad) for each term, R·D·4 for the pre-bias term, and twice a (BLOCK_N)th of both.
Flops: (N + R)·D.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.backends.gpu.stages import Moments, Step
from fastsae.kernels.optimizers import as_pointers, load_numbers, optimizer_step
from fastsae.kernels.variants import POINTERS, Variant


@dataclass(frozen=True)
class Config:
    BLOCK_N: int  # rows added by one program
    STEP_N: int  # rows added at once
    BLOCK_D: int
    num_warps: int


def choose() -> Config:
    """128 rows a program: at N = 8192 the second sum has 64 rows a term. 32 loads of a warp's width in flight."""
    return Config(BLOCK_N=128, STEP_N=32, BLOCK_D=64, num_warps=4)


@triton.jit
def _column_sums_kernel(t_ptr, sums_ptr, rows, D, BLOCK_N: tl.constexpr, STEP_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """sums[p] (D,) = Σ of the rows p·BLOCK_N .. (p+1)·BLOCK_N of t."""
    p = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for step in range(0, BLOCK_N, STEP_N):
        row = p * BLOCK_N + step + tl.arange(0, STEP_N)
        at = row.to(tl.int64)[:, None] * D + columns[None, :]
        tile = tl.load(t_ptr + at, mask=(row < rows)[:, None] & (columns < D)[None, :], other=0.0)
        total += tl.sum(tile.to(tl.float32), axis=0)
    tl.store(sums_ptr + p.to(tl.int64) * D + columns, total, mask=columns < D)


@triton.jit
def _update_bias_kernel(
    b_ptr, m_ptr, v_ptr, sums_ptr, stats_ptr, numbers_ptr, keys_ptr, eps, beta1, rest1, beta2, rest2, D, added, rows,
    RULE: tl.constexpr, STEP_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """b's step with the gradient Σ sums[:added] - Σ sums[added:rows]; stats[p] (4,) = (0, 0, 0, its squared norm).

    A step that is skipped changes nothing, and stats[p] is NaN. The rule "none" changes nothing either.
    """
    p = tl.program_id(0)
    lane = tl.arange(0, 4)
    if tl.load(numbers_ptr + 2) == 0:
        tl.store(stats_ptr + 4 * p + lane, tl.full((4,), float("nan"), tl.float64))
        return
    columns = p * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    gradient = tl.zeros((BLOCK_D,), tl.float32)
    for step in range(0, rows, STEP_N):
        row = step + tl.arange(0, STEP_N)
        at = row.to(tl.int64)[:, None] * D + columns[None, :]
        tile = tl.load(sums_ptr + at, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        gradient += tl.sum(tl.where((row < added)[:, None], tile, -tile), axis=0)

    if RULE != "none":
        b = tl.load(b_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        numbers, betas = load_numbers(numbers_ptr, eps), (beta1, rest1, beta2, rest2)
        b = optimizer_step(
            b, gradient * tl.load(numbers_ptr + 4), (m_ptr, v_ptr, None, None), tl.full((), 0, tl.int64), 0, columns,
            inside, D, numbers, betas, keys_ptr, RULE, BLOCK_D,
        )  # fmt: skip
        tl.store(b_ptr + columns, b.to(b_ptr.dtype.element_ty), mask=inside)

    square = tl.sum(gradient * gradient, axis=0).to(tl.float64)
    tl.store(stats_ptr + 4 * p + lane, tl.where(lane == 3, square, 0.0))


def bias_programs(D: int) -> int:
    """Rows of stats that `update_bias` writes."""
    return triton.cdiv(D, choose().BLOCK_D)


def bias_parts(rows: int) -> int:
    """Rows of the workspace that a matrix of so many rows takes: one for each program that adds up its columns."""
    return triton.cdiv(rows, choose().BLOCK_N)


def update_bias(
    b: Tensor, moments: Moments, grads: list[Tensor], pre_bias: Tensor | None, stats: Tensor, step: Step,
    stream: int, workspace: Tensor,
) -> None:  # fmt: skip
    """Steps b (D,): grads: (N, D) each; pre_bias (R, D) float32 is subtracted; stats (bias_programs(D), 4) float64."""
    c, D = choose(), b.shape[0]
    parts = [t for t in (*grads, pre_bias) if t is not None]
    counts = [bias_parts(t.shape[0]) for t in parts]
    added = sum(counts) if pre_bias is None else sum(counts[:-1])
    tiles = bias_programs(D)
    for t, out, count in zip(parts, workspace.split(counts), counts, strict=True):
        if count:
            _column_sums_kernel[(count, tiles)](
                t, out, t.shape[0], D, BLOCK_N=c.BLOCK_N, STEP_N=c.STEP_N, BLOCK_D=c.BLOCK_D, num_warps=c.num_warps,
                enable_fp_fusion=True,
            )  # fmt: skip
    _update_bias_kernel[(tiles,)](
        b, *as_pointers(moments)[:2], workspace, stats, step.numbers, step.keys[stream:], step.eps, *step.betas, D,
        added, sum(counts), RULE=step.rule, STEP_N=c.STEP_N, BLOCK_D=c.BLOCK_D,
        num_warps=c.num_warps, enable_fp_fusion=True,
    )  # fmt: skip


def variants() -> list[Variant]:
    c, found = choose(), []
    scalars = dict.fromkeys(("eps", "beta1", "rest1", "beta2", "rest2"), "fp32") | {"added": "i32", "rows": "i32"}
    for dtype in (torch.float32, torch.bfloat16):
        value = POINTERS[dtype]
        for D in (768, 16384, 1001):
            aligned = ("D",) if D % 16 == 0 else ()
            blocks = {"STEP_N": c.STEP_N, "BLOCK_D": c.BLOCK_D}
            found.append(
                Variant(
                    _column_sums_kernel,
                    f"column_sums/{value[1:]}/D={D}",
                    {"t_ptr": value, "sums_ptr": "*fp32", "rows": "i32", "D": "i32"},
                    blocks | {"BLOCK_N": c.BLOCK_N},
                    c.num_warps,
                    aligned=aligned,
                )
            )
            for moment in (torch.float32, torch.bfloat16):
                tensors = {"b_ptr": value, "m_ptr": POINTERS[moment], "v_ptr": POINTERS[moment], "sums_ptr": "*fp32"}
                tensors |= {"stats_ptr": "*fp64", "numbers_ptr": "*fp32", "keys_ptr": "*i32", "D": "i32"}
                found.append(
                    Variant(
                        _update_bias_kernel,
                        f"update_bias/{value[1:]}-{POINTERS[moment][1:]}/D={D}",
                        tensors | scalars,
                        blocks | {"RULE": "adam"},
                        c.num_warps,
                        aligned=aligned,
                    )
                )
    return found
