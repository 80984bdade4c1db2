"""One step of torch.optim.Adam as device functions, and the numbers of a step that depend on its count.

    m = m + (1-β₁)(g - m);  v = β₂ v + (1-β₂) g²;  p = p - lr/(1-β₁ᵗ) · m / (√v / √(1-β₂ᵗ) + eps)

Moments are computed in float32. In bfloat16 they are stored rounded at random under a seed (rounding.py), else to
nearest; p is stepped with the moments before they are rounded. Source: Adam, arXiv:1412.6980 algorithm 1.

`_step_numbers_kernel` is one program. It reads lr (float64), the step (int64) and whether to skip it (bool) on the
device, and writes what every row needs: no host sync, and a captured graph follows all three.

Bytes: 17 read, 44 written.
Flops: 4·log2(step), in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.backends import buffers
from fastsae.kernels.rounding import round_to_bf16, stream_key
from fastsae.kernels.variants import POINTERS, Variant

STREAMS = 8
"""Streams of random bits in a step: 2i is the i-th parameter's m, 2i + 1 its v."""


@dataclass(frozen=True)
class Config:
    num_warps: int


def choose() -> Config:
    """A handful of scalars: one warp."""
    return Config(num_warps=1)


@triton.jit
def _power(base, exponent):
    """base ** exponent by squaring, float64; exponent: int64, not negative."""
    result = base * 0 + 1
    while exponent > 0:
        result = tl.where(exponent % 2 == 1, result * base, result)
        base = base * base
        exponent = exponent // 2
    return result


@triton.jit(do_not_specialize=["seed"])
def _step_numbers_kernel(
    lr_ptr, step_ptr, skip_ptr, numbers_ptr, keys_ptr, seed,
    BETA1: tl.constexpr, BETA2: tl.constexpr, STREAMS: tl.constexpr,
):  # fmt: skip
    """numbers = [lr / (1-β₁ᵗ), 1 / √(1-β₂ᵗ), 1 or to skip 0] in float32, rounded once; keys = the streams' keys (uint32
    as int32). skip_ptr may be absent."""
    step = tl.load(step_ptr)
    size = tl.load(lr_ptr) / (1 - _power(tl.full((), BETA1, tl.float64), step))
    root = tl.sqrt(1 - _power(tl.full((), BETA2, tl.float64), step))
    tl.store(numbers_ptr, size.to(tl.float32))
    tl.store(numbers_ptr + 1, (1 / root).to(tl.float32))
    go = tl.full((), 1.0, tl.float32)
    if skip_ptr is not None:
        go = tl.where(tl.load(skip_ptr), 0.0, go)
    tl.store(numbers_ptr + 2, go)
    stream = tl.arange(0, STREAMS)
    tl.store(keys_ptr + stream, stream_key(seed, step, stream).to(tl.int32, bitcast=True))


@triton.jit
def latents_to_update(numbers_ptr, M):
    """M, or 0 if the step is skipped: a kernel that goes over the latents then writes nothing."""
    return tl.where(tl.load(numbers_ptr + 2) == 0, 0, M)


@triton.jit
def adam(p, g, m, v, numbers, betas):
    """The new p, m and v, float32. numbers: (step size, 1/√(1-β₂ᵗ), eps); betas: (β₁, 1-β₁, β₂, 1-β₂)."""
    step_size, inverse_root, eps = numbers
    beta1, rest1, beta2, rest2 = betas
    # As torch.lerp: from the nearer end, so that β₁ = 0 gives g itself.
    m = tl.where(rest1 < 0.5, m + rest1 * (g - m), g - beta1 * (g - m))
    v = beta2 * v + rest2 * g * g
    # The approximate root and quotient flush what is below 1e-38 to 0; a step waits for memory either way.
    return p - step_size * tl.div_rn(m, tl.sqrt_rn(v) * inverse_root + eps), m, v


@triton.jit
def load_moments(m_ptr, v_ptr, at, mask):
    """m and v of the places `at` (int64), in float32."""
    # Each is read and written once a step, so L2 evicts it first: gathered rows are reused.
    m = tl.load(m_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    v = tl.load(v_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    return m, v


@triton.jit
def store_moments(m_ptr, v_ptr, at, mask, m, v, key_ptr, STOCHASTIC: tl.constexpr):
    """m and v (float32) in their dtype. key_ptr: the key of m's stream, then v's; `at` also counts the random bits."""
    if STOCHASTIC:
        index = at.to(tl.uint32)
        m_key, v_key = tl.load(key_ptr), tl.load(key_ptr + 1)
        tl.store(m_ptr + at, round_to_bf16(m, m_key.to(tl.uint32, bitcast=True), index), mask=mask)
        tl.store(v_ptr + at, round_to_bf16(v, v_key.to(tl.uint32, bitcast=True), index), mask=mask)
    else:
        tl.store(m_ptr + at, m.to(m_ptr.dtype.element_ty), mask=mask)
        tl.store(v_ptr + at, v.to(v_ptr.dtype.element_ty), mask=mask)


@triton.jit
def adam_step(p, g, m_ptr, v_ptr, at, mask, numbers, betas, key_ptr, STOCHASTIC: tl.constexpr):
    """The new p (float32, 0 outside mask) of the places `at` (int64); their moments are updated in memory."""
    m, v = load_moments(m_ptr, v_ptr, at, mask)
    p, m, v = adam(p, g, m, v, numbers, betas)
    store_moments(m_ptr, v_ptr, at, mask, m, v, key_ptr, STOCHASTIC)
    return tl.where(mask, p, 0.0)


def step_numbers(
    lr: Tensor, step: Tensor, skip: Tensor | None, beta1: float, beta2: float, seed: int | None
) -> tuple[Tensor, Tensor]:
    """numbers (3,) float32 and keys (8,) int32 of one step, on the device of lr (0-d float64), step (0-d int64) and
    skip (0-d bool)."""
    numbers = buffers.empty((3,), torch.float32, lr.device)
    keys = buffers.empty((STREAMS,), torch.int32, lr.device)
    signed = ((seed or 0) + 2**31) % 2**32 - 2**31  # the same 32 bits, as an int32 argument
    _step_numbers_kernel[(1,)](
        lr, step, skip, numbers, keys, signed, BETA1=beta1, BETA2=beta2, STREAMS=STREAMS, num_warps=choose().num_warps,
        enable_fp_fusion=True,
    )  # fmt: skip
    return numbers, keys


def variants() -> list[Variant]:
    signature = {"lr_ptr": "*fp64", "step_ptr": "*i64", "numbers_ptr": "*fp32", "keys_ptr": "*i32", "seed": "i32"}
    constants = {"BETA1": 0.9, "BETA2": 0.999, "STREAMS": STREAMS}
    may_skip = signature | {"skip_ptr": POINTERS[torch.bool]}
    return [
        Variant(_step_numbers_kernel, "step_numbers", signature, constants | {"skip_ptr": None}, choose().num_warps),
        Variant(_step_numbers_kernel, "step_numbers/skip", may_skip, constants, choose().num_warps),
    ]
