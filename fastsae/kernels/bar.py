"""τ[n] = the rank-th largest screened score of token n's sample, or 0: a guess of a bar that a few K latents clear.

One program takes one token: its sample in registers, as keys, and one count for each of 23 bits. A wrong
guess costs speed only: the encoder certifies what it returns.

Bytes: N·samples·2.
Flops: 23·2·N·samples, integer.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastsae.backends.gpu.bounds import TABLE_ROWS
from fastsae.backends.gpu.plan import SAMPLE, Plan, sample_step
from fastsae.kernels.keys import key_of, kth_key
from fastsae.kernels.variants import Variant

LAST_BIT = 8  # of float32's 23: a relative precision of 2⁻¹⁵ is plenty for a guess


@triton.jit
def _bar_kernel(
    scores_ptr, table_ptr, bounds_ptr, count_ptr, bars_ptr, N, row_stride, width, chunks, step, limit, rank,
    TABLE_ROWS: tl.constexpr, SAMPLES: tl.constexpr, LAST_BIT: tl.constexpr,
):  # fmt: skip
    # Shapes: every step-th column of the sampled chunks, which lie side by side.
    n = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SAMPLES) * step
    chunk, c = column // width, column % width
    inside = (column < limit) & (chunk + c * chunks < tl.load(count_ptr))

    # Load and score.
    table = table_ptr + chunk * (TABLE_ROWS * width) + c
    stored = tl.load(scores_ptr + n * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale, bias = tl.load(table, mask=inside, other=0.0), tl.load(table + width, mask=inside, other=0.0)
    v = stored * (tl.load(bounds_ptr + n) * scale) + bias

    # Compute and store: key 0 is the score +0, the lowest bar there is.
    found = kth_key(tl.where(inside, key_of(v), -1), rank, LAST_BIT)
    tl.store(bars_ptr + n, found.to(tl.float32, bitcast=True))


def bars(scores: Tensor, table: Tensor, bounds: Tensor, count: Tensor, out: Tensor, plan: Plan) -> None:
    """Fills out (N,) fp32 from the sampled chunks' scores (N, sampled_chunks · width)."""
    n, limit = out.shape[0], plan.sampled_chunks * plan.width
    _bar_kernel[(n,)](
        scores, table, bounds, count, out, n, scores.stride(0), plan.width, plan.chunks,
        sample_step(limit, plan.samples), limit, plan.rank,
        TABLE_ROWS=TABLE_ROWS, SAMPLES=plan.samples, LAST_BIT=LAST_BIT, num_warps=warps_of(plan.samples),
        enable_fp_fusion=True,
    )  # fmt: skip


def warps_of(samples: int) -> int:
    """At most 32 keys to a thread."""
    return max(4, min(8, samples // 1024))


def variants() -> list[Variant]:
    signature = {
        "scores_ptr": "*fp16", "table_ptr": "*fp32", "bounds_ptr": "*fp32", "count_ptr": "*i32", "bars_ptr": "*fp32",
        "N": "i32", "row_stride": "i32", "width": "i32", "chunks": "i32", "step": "i32", "limit": "i32", "rank": "i32",
    }  # fmt: skip
    return [
        Variant(
            _bar_kernel, f"bar/samples={samples}", signature,
            {"TABLE_ROWS": TABLE_ROWS, "SAMPLES": samples, "LAST_BIT": LAST_BIT}, warps_of(samples),
            aligned=("row_stride", "width", "limit"),
        )
        for samples in (2048, SAMPLE)
    ]  # fmt: skip
