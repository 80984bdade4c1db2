"""out[n, k] = ⟨x[n], W[indices[n, k]]⟩ at the active latents only; 0 in empty slots (the gradient of the acts).

One program computes a token: its slots in blocks of BLOCK_L, each block by `dots.row_dots`, so the bits are those of
the exact score. x's row is read once for each block and stays in L1.

Bytes: nnz·D·sizeof(W) + N·D·sizeof(x) + nnz·(8 + sizeof(acts)).
Flops: 2·nnz·D.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.dots import BLOCK_D, BLOCK_L, NUM_WARPS, row_dots
from fastsae.kernels.variants import POINTERS, Variant


@triton.jit
def _active_dot_kernel(
    x_ptr, acts_ptr, indices_ptr, offsets_ptr, w_ptr, out_ptr, K, D,
    RAGGED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Shapes: this token's slots.
    n = tl.program_id(0).to(tl.int64)
    if RAGGED:
        first = tl.load(offsets_ptr + n)
        count = (tl.load(offsets_ptr + n + 1) - first).to(tl.int32)
    else:
        first = n * K
        count = K

    for start in range(0, count, BLOCK_L):
        # Load: in a fixed code an act of 0 is an empty slot; in a ragged one every slot below offsets[N] is occupied.
        slot = start + tl.arange(0, BLOCK_L)
        stored = slot < count
        live = stored
        if not RAGGED:
            live &= tl.load(acts_ptr + first + slot, mask=stored, other=0.0).to(tl.float32) != 0
        latent = tl.load(indices_ptr + first + slot, mask=live, other=0)

        # Compute and store.
        dots = row_dots(x_ptr + n * D, w_ptr, latent, live, D, BLOCK_L, BLOCK_D)
        tl.store(out_ptr + first + slot, tl.where(live, dots, 0.0).to(out_ptr.dtype.element_ty), mask=stored)


def active_dot(x: Tensor, acts: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor) -> Tensor:
    """Shape and dtype of acts. x (N, D), W (M, D); spare slots of a ragged code become 0."""
    ragged = offsets is not None
    out = torch.zeros_like(acts) if ragged else torch.empty_like(acts)
    if x.shape[0] and acts.numel():
        _active_dot_kernel[(x.shape[0],)](
            x, acts, indices, offsets, W, out, 0 if ragged else acts.shape[1], x.shape[1],
            RAGGED=ragged, BLOCK_L=BLOCK_L, BLOCK_D=BLOCK_D, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def variants() -> list[Variant]:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for D, ragged in ((768, False), (768, True), (1000, False)):
            value = POINTERS[dtype]
            signature = {
                "x_ptr": value, "acts_ptr": value, "indices_ptr": "*i32", "w_ptr": value, "out_ptr": value, "K": "i32",
                "D": "i32",
            }  # fmt: skip
            constants: dict[str, Any] = {"RAGGED": ragged, "BLOCK_L": BLOCK_L, "BLOCK_D": BLOCK_D}
            if ragged:
                signature["offsets_ptr"] = "*i64"
            else:
                constants["offsets_ptr"] = None
            name = f"active_dot/{value[1:]}/D={D}{'/ragged' if ragged else ''}"
            aligned = ("D",) if D % 16 == 0 else ()
            found.append(Variant(_active_dot_kernel, name, signature, constants, NUM_WARPS, aligned=aligned))
    return found
