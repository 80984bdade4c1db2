"""out[n] = Σ_k acts[n, k] · W[indices[n, k]]: A W, an act of 0 adds nothing.

One program computes BLOCK_N tokens × BLOCK_D columns in registers, slot by slot in order; a masked gather moves only
the rows that are there. Several tokens share a program so that narrow tiles too have enough loads in flight.

Bytes: nnz·D·sizeof(W) + N·D·sizeof(W) + 8·nnz; the rows of latents in common use come from L2.
Flops: 2·nnz·D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.backends import buffers
from fastsae.kernels.variants import POINTERS, Variant


@dataclass(frozen=True)
class Config:
    BLOCK_N: int
    BLOCK_D: int
    UNROLL: int  # slots whose loads are in flight together
    num_warps: int


def tile_of(D: int, largest: int = 1024) -> int:
    """The power of two from 64 to `largest` that covers D with the fewest masked columns; the widest of equals."""
    widths = [w for w in (1024, 512, 256, 128, 64) if w <= largest]
    return min(widths, key=lambda w: (triton.cdiv(D, w) * w, -w))


def choose(D: int) -> Config:
    """1024 accumulators to a program: 8 in each thread, and with 4 slots at once 32 values on their way to it."""
    width = tile_of(D)
    return Config(BLOCK_N=1024 // width, BLOCK_D=width, UNROLL=4, num_warps=4)


@triton.jit
def decoded_tile(
    acts_ptr, indices_ptr, offsets_ptr, w_ptr, n, d, N, K, D,
    RAGGED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, BLOCK_D) fp32: columns d of the tokens n of A W, 0 outside."""
    # Shapes: where each token's slots lie.
    is_token = n < N
    if RAGGED:
        first = tl.load(offsets_ptr + n, mask=is_token, other=0)
        count = (tl.load(offsets_ptr + n + 1, mask=is_token, other=0) - first).to(tl.int32)
        longest = tl.max(count, axis=0)
    else:
        first = n.to(tl.int64) * K
        count = tl.where(is_token, K, 0)
        longest = K

    # Compute: UNROLL independent gathers at a time, added in slot order.
    acc = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for start in range(0, longest, UNROLL):
        for u in tl.static_range(UNROLL):
            slot = start + u
            live = slot < count
            act = tl.load(acts_ptr + first + slot, mask=live, other=0.0).to(tl.float32)
            live &= act != 0
            latent = tl.load(indices_ptr + first + slot, mask=live, other=0).to(tl.int64)
            w = tl.load(w_ptr + latent[:, None] * D + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0).to(
                tl.float32
            )
            acc += act[:, None] * w
    return acc


@triton.jit
def _decode_kernel(
    acts_ptr, indices_ptr, offsets_ptr, w_ptr, out_ptr, N, K, D,
    RAGGED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = decoded_tile(
        acts_ptr, indices_ptr, offsets_ptr, w_ptr, n, d, N, K, D, RAGGED, BLOCK_N, BLOCK_D, UNROLL
    )  # fmt: skip
    out = out_ptr + n.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (d < D)[None, :])


def decode(acts: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor) -> Tensor:
    """(N, D) in W's dtype, from a fixed (N, K) code or a ragged one with offsets (N+1,)."""
    n, D = (acts.shape[0] if offsets is None else offsets.shape[0] - 1), W.shape[1]
    out = buffers.empty((n, D), W.dtype, W.device)
    if out.numel():
        c = choose(D)
        grid = (triton.cdiv(n, c.BLOCK_N), triton.cdiv(D, c.BLOCK_D))
        _decode_kernel[grid](
            acts, indices, offsets, W, out, n, 0 if offsets is not None else acts.shape[1], D,
            RAGGED=offsets is not None, BLOCK_N=c.BLOCK_N, BLOCK_D=c.BLOCK_D, UNROLL=c.UNROLL, num_warps=c.num_warps,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


def variants() -> list[Variant]:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for D, ragged in ((768, False), (4096, False), (4096, True), (1000, False)):
            c = choose(D)
            value = POINTERS[dtype]
            signature = {
                "acts_ptr": value, "indices_ptr": "*i32", "w_ptr": value, "out_ptr": value, "N": "i32", "K": "i32",
                "D": "i32",
            }  # fmt: skip
            constants: dict[str, Any] = {
                "RAGGED": ragged,
                "BLOCK_N": c.BLOCK_N,
                "BLOCK_D": c.BLOCK_D,
                "UNROLL": c.UNROLL,
            }
            if ragged:
                signature["offsets_ptr"] = "*i64"
            else:
                constants["offsets_ptr"] = None
            name = f"decode/{value[1:]}/D={D}{'/ragged' if ragged else ''}"
            aligned = ("D",) if D % 16 == 0 else ()
            found.append(Variant(_decode_kernel, name, signature, constants, c.num_warps, aligned=aligned))
    return found
