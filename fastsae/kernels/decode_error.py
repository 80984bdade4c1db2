"""error = A W (+ bias) - target, and Σ error² of each token: a decode that goes on to the loss while it has the tile.

One program computes BLOCK_N tokens × BLOCK_D columns as `decode` does, then subtracts, squares and sums its columns.
Alone, a residual and its squares cost two more passes over (N, D).

Bytes: decode's, N·D·sizeof(W) for the target, 4·N for each tile of columns.
Flops: 2·nnz·D + 4·N·D.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.backends import buffers
from fastsae.kernels.decode import choose, decoded_tile
from fastsae.kernels.limits import register_limit
from fastsae.kernels.variants import POINTERS, Variant

REGISTERS = 128


@triton.jit
def _decode_error_kernel(
    acts_ptr, indices_ptr, offsets_ptr, w_ptr, target_ptr, bias_ptr, error_ptr, squares_ptr, N, K, D,
    RAGGED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    # Shapes.
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (n < N)[:, None] & (d < D)[None, :]
    place = n.to(tl.int64)[:, None] * D + d[None, :]

    # Compute.
    error = decoded_tile(
        acts_ptr, indices_ptr, offsets_ptr, w_ptr, n, d, N, K, D, RAGGED, BLOCK_N, BLOCK_D, UNROLL
    )  # fmt: skip
    if bias_ptr is not None:
        error += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    error -= tl.load(target_ptr + place, mask=inside, other=0.0).to(tl.float32)
    error = tl.where(inside, error, 0.0)

    # Store. Each tile of columns has a row of sums of its own, so that their order is fixed.
    tl.store(error_ptr + place, error.to(error_ptr.dtype.element_ty), mask=inside)
    tl.store(squares_ptr + tl.program_id(1).to(tl.int64) * N + n, tl.sum(error * error, axis=1), mask=n < N)


def decode_error(
    acts: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor, target: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """error (N, D) in W's dtype and its squares float64 (N,), summed before rounding. target (N, D), bias (D,)."""
    n, D = target.shape
    c = choose(D)
    tiles = triton.cdiv(D, c.BLOCK_D)
    error = torch.empty_like(target)
    squares = buffers.empty((tiles, n), torch.float32, W.device)
    if error.numel():
        _decode_error_kernel[(triton.cdiv(n, c.BLOCK_N), tiles)](
            acts, indices, offsets, W, target, bias, error, squares, n, 0 if offsets is not None else acts.shape[1], D,
            RAGGED=offsets is not None, BLOCK_N=c.BLOCK_N, BLOCK_D=c.BLOCK_D, UNROLL=c.UNROLL, num_warps=c.num_warps,
            **register_limit(REGISTERS), enable_fp_fusion=True,
        )  # fmt: skip
    return error, squares.double().sum(0)


def variants() -> list[Variant]:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for D, bias in ((768, False), (4096, True)):
            c = choose(D)
            value = POINTERS[dtype]
            floats = dict.fromkeys(("acts_ptr", "w_ptr", "target_ptr", "error_ptr"), value)
            signature = {
                **floats, "indices_ptr": "*i32", "squares_ptr": "*fp32", "N": "i32", "K": "i32", "D": "i32",
            }  # fmt: skip
            constants = {
                "offsets_ptr": None, "RAGGED": False, "BLOCK_N": c.BLOCK_N, "BLOCK_D": c.BLOCK_D, "UNROLL": c.UNROLL,
            }  # fmt: skip
            if bias:
                signature["bias_ptr"] = value
            else:
                constants["bias_ptr"] = None
            name = f"decode_error/{value[1:]}/D={D}"
            found.append(
                Variant(
                    _decode_error_kernel, name, signature, constants, c.num_warps, aligned=("D",), maxnreg=REGISTERS
                )
            )
    return found
