"""s[i] = Σ_d x[d] · W[latent i, d]: the engine's exact score, in fp32 and in one fixed order.

Device code that `active_dot`, rescoring and the exhaustive search share, so that a token gets the same bits from each:
lane l of BLOCK_D sums d = l, l + BLOCK_D, ... by fused multiply-adds, then the lanes are summed. Products are IEEE fp32
whatever the inputs' dtype, never TF32. |s - exact| <= (D/BLOCK_D + log2 BLOCK_D) · 2⁻²⁴ · ‖x‖‖W_i‖.
"""

from __future__ import annotations

import triton
import triton.language as tl

# One shape for every caller: the order of the last sum depends on it. 32 rows of 128 put 8 loads of 16 bytes in flight
# in each of 128 threads, and cost 32 accumulators.
BLOCK_L = 32
BLOCK_D = 128
NUM_WARPS = 4


@triton.jit
def row_dots(x_row, w_ptr, latents, live, D, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK_L,) fp32: the dots of one row x_row (D,) with the rows `latents` of w_ptr (M, D); 0 where not live."""
    rows = w_ptr + latents.to(tl.int64)[:, None] * D
    acc = tl.zeros((BLOCK_L, BLOCK_D), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = d < D
        x = tl.load(x_row + d, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(rows + d[None, :], mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
        acc += w * x[None, :]
    return tl.sum(acc, axis=1)
