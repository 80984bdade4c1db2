"""score[n, r] = (⟨x[n], W[latents[n, r]]⟩ + b) · g, exactly: the engine's own fp32 score of every latent of a list.

One program takes one token's list, BLOCK_L latents at a time, by `dots.row_dots`.

Bytes: list·D·sizeof(W) + N·D·sizeof(x) + 12·list, where list is the length of all lists.
Flops: 2·list·D.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.dots import BLOCK_D, BLOCK_L, NUM_WARPS, row_dots
from fastsae.kernels.variants import POINTERS, Variant


@triton.jit
def exact_scores(x_row, w_ptr, b_ptr, gate_ptr, latent, live, D, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK_L,) fp32: the exact scores of one row of x (D,) for the latents of a block; meaningless where not live."""
    score = row_dots(x_row, w_ptr, latent, live, D, BLOCK_L, BLOCK_D)
    score += tl.load(b_ptr + latent, mask=live, other=0.0).to(tl.float32)
    if gate_ptr is not None:
        score *= tl.load(gate_ptr + latent, mask=live, other=0.0).to(tl.float32)
    return score


@triton.jit
def _rescore_kernel(
    x_ptr, w_ptr, b_ptr, gate_ptr, latents_ptr, counts_ptr, scores_ptr, D, capacity,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    count = tl.minimum(tl.load(counts_ptr + n), capacity)
    for start in range(0, count, BLOCK_L):
        i = start + tl.arange(0, BLOCK_L)
        live = i < count
        latent = tl.load(latents_ptr + n * capacity + i, mask=live, other=0)
        score = exact_scores(x_ptr + n * D, w_ptr, b_ptr, gate_ptr, latent, live, D, BLOCK_L, BLOCK_D)
        tl.store(scores_ptr + n * capacity + i, score, mask=live)


def rescore(
    x: Tensor, W: Tensor, b: Tensor, gate: Tensor | None, latents: Tensor, counts: Tensor, scores: Tensor
) -> None:
    """Fills scores (N, capacity) fp32 for the first counts[n] latents (N, capacity) of each token."""
    n, D = x.shape
    _rescore_kernel[(n,)](
        x, W, b, gate, latents, counts, scores, D, latents.shape[1],
        BLOCK_L=BLOCK_L, BLOCK_D=BLOCK_D, num_warps=NUM_WARPS, enable_fp_fusion=True,
    )  # fmt: skip


def variants() -> list[Variant]:
    found = []
    for dtype, D in ((torch.float32, 768), (torch.bfloat16, 768), (torch.float32, 1000)):
        value = POINTERS[dtype]
        signature = {
            "x_ptr": value, "w_ptr": value, "b_ptr": value, "latents_ptr": "*i32", "counts_ptr": "*i32",
            "scores_ptr": "*fp32", "D": "i32", "capacity": "i32",
        }  # fmt: skip
        constants = {"gate_ptr": None, "BLOCK_L": BLOCK_L, "BLOCK_D": BLOCK_D}
        aligned = ("D", "capacity") if D % 16 == 0 else ("capacity",)
        name = f"rescore/{value[1:]}/D={D}"
        found.append(Variant(_rescore_kernel, name, signature, constants, NUM_WARPS, aligned=aligned))
    return found
