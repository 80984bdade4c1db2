"""The K largest positive scores of a token's candidates as a fixed code: indices ascending, ties to the lower index.

One program takes one token, its candidates in registers. The K-th largest key is found bit by bit. If several share
it, the largest index still taken is found the same way. Then each chosen latent counts the chosen ones below it, which
is its slot. No sort: 62 counts of a list in registers, and one pass over its square, which at 256 candidates costs less
than half of a bitonic sort.

Bytes: 8 a candidate, N·K·(4 + sizeof(acts)).
Flops: 62·2·R + 2·R², integer, for R candidates.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.keys import key_of, kth_key
from fastsae.kernels.variants import POINTERS, Variant


@triton.jit
def _top_k_kernel(
    latents_ptr, scores_ptr, counts_ptr, certified_ptr, acts_ptr, indices_ptr, K, candidates, index_offset, last,
    BLOCK: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Shapes: another kernel redoes tokens that are not certified.
    n = tl.program_id(0).to(tl.int64)
    if tl.load(certified_ptr + n) == 0:
        return
    count = tl.load(counts_ptr + n)
    i = tl.arange(0, BLOCK)
    live = i < count
    latent = tl.load(latents_ptr + n * candidates + i, mask=live, other=0)
    score = tl.load(scores_ptr + n * candidates + i, mask=live, other=0.0)

    # Choose: above the K-th largest key, and of those that share it the lowest indices.
    key = tl.where(live, key_of(score), -1)
    least = kth_key(key, K, 0)
    chosen = (key > least) & (key > 0)
    ties = (key == least) & (key > 0)
    free = K - tl.sum(chosen.to(tl.int32), axis=0)
    if tl.sum(ties.to(tl.int32), axis=0) > free:
        reversed_index = tl.where(ties, 0x7FFFFFFF - latent, -1)
        ties &= reversed_index >= kth_key(reversed_index, free, 0)
    act = score.to(acts_ptr.dtype.element_ty)
    chosen = (chosen | ties) & (act.to(tl.float32) != 0)  # a narrow dtype can round a score to 0

    # Slots: how many chosen latents lie below. All threads read the list through memory.
    tl.store(latents_ptr + n * candidates + i, tl.where(chosen, latent, 0x7FFFFFFF), mask=live)
    tl.debug_barrier()
    slot = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, count, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        other = tl.load(latents_ptr + n * candidates + j, mask=j < count, other=0x7FFFFFFF)
        slot += tl.sum((other[None, :] < latent[:, None]).to(tl.int32), axis=1)

    # Store the chosen, then the empty slots.
    tl.store(acts_ptr + n * K + slot, act, mask=chosen)
    tl.store(indices_ptr + n * K + slot, latent + index_offset, mask=chosen)
    k = tl.arange(0, BLOCK_K)
    empty = (k >= tl.sum(chosen.to(tl.int32), axis=0)) & (k < K)
    tl.store(acts_ptr + n * K + k, tl.zeros((BLOCK_K,), dtype=acts_ptr.dtype.element_ty), mask=empty)
    tl.store(indices_ptr + n * K + k, tl.zeros((BLOCK_K,), dtype=tl.int32) + last, mask=empty)


def top_k(
    latents: Tensor,
    scores: Tensor,
    counts: Tensor,
    certified: Tensor,
    acts: Tensor,
    indices: Tensor,
    offset: int,
    last: int,
) -> None:
    """Fills acts and indices (N, K) of the certified tokens. latents (N, candidates) is used up."""
    n, k = acts.shape
    candidates = latents.shape[1]
    _top_k_kernel[(n,)](
        latents, scores, counts, certified, acts, indices, k, candidates, offset, last,
        BLOCK=candidates, BLOCK_J=block_of(candidates), BLOCK_K=triton.next_power_of_2(k),
        num_warps=warps_of(candidates), enable_fp_fusion=True,
    )  # fmt: skip


def block_of(candidates: int) -> int:
    """Pairs of a tile: 32 to a thread."""
    return max(4, min(64, 4096 * warps_of(candidates) // 4 // candidates))


def warps_of(candidates: int) -> int:
    return max(1, min(8, candidates // 64))


def variants() -> list[Variant]:
    found = []
    for candidates, k in ((128, 32), (256, 64), (1024, 512), (4096, 2048)):
        signature = {
            "latents_ptr": "*i32", "scores_ptr": "*fp32", "counts_ptr": "*i32", "certified_ptr": "*i32",
            "acts_ptr": POINTERS[torch.float32], "indices_ptr": "*i32",
            **dict.fromkeys(("K", "candidates", "index_offset", "last"), "i32"),
        }  # fmt: skip
        constants = {"BLOCK": candidates, "BLOCK_J": block_of(candidates), "BLOCK_K": k}
        name = f"top_k/candidates={candidates}"
        aligned = ("K", "candidates")
        found.append(Variant(_top_k_kernel, name, signature, constants, warps_of(candidates), aligned=aligned))
    return found
