"""The rows of a matrix that a latent's entries name, BLOCK_E at once so that as many loads are in flight."""

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
