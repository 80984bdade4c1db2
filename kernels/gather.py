"""The rows of a matrix that a latent's entries name, several at a time, as device functions.

BLOCK_E rows are loaded at once, so that as many loads are in flight, and summed in a fixed order in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(ptr, more_ptr, rows, split, live, columns, inside, width):
    """(BLOCK_E, BLOCK_D) float32: the rows `rows` of two matrices of `width` columns, the second stacked on the first.

    more_ptr: the second, whose row 0 is row `split`; None where there is one matrix. 0 where not live or not inside.
    """
    if more_ptr is None:
        base = ptr + rows.to(tl.int64)[:, None] * width
    else:
        second = rows >= split
        local = tl.where(second, rows - split, rows).to(tl.int64)
        base = tl.where(second, more_ptr, ptr)[:, None] + local[:, None] * width
    return tl.load(base + columns[None, :], mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def weighted_rows(
    weights_ptr, rows_ptr, begin, end, ptr, more_ptr, split, columns, width,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(BLOCK_D,) float32: Σ over the entries begin .. end of weights[e] · row rows[e] at `columns`."""
    total = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(begin, end, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        live = e < end
        row = tl.load(rows_ptr + e, mask=live, other=0)
        weight = tl.load(weights_ptr + e, mask=live, other=0.0).to(tl.float32)
        tile = load_rows(ptr, more_ptr, row, split, live, columns, columns < width, width)
        total += tl.sum(weight[:, None] * tile, axis=0)
    return total
