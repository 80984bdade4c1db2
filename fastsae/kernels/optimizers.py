"""One step of each optimizer as device functions, on moments however they are stored, and the numbers of a step.

    adam      m = m + (1-β₁)(g - m);  v = β₂ v + (1-β₂) g²;  p = p·kept - lr/(1-β₁ᵗ) · m / (√v / √(1-β₂ᵗ) + eps)
    lion      p = p·kept - lr · sign(β₁ m + (1-β₁) g);  m = β₂ m + (1-β₂) g
    signsgd   p = p·kept - lr · sign(g)

kept = 1 - lr · weight_decay, 1 for plain Adam. Moments are computed in float32, and p is stepped with them before they
are rounded. In bfloat16 they are stored rounded at random under a seed, or to nearest without one; in 8 bits always at
random, under a scale for each 128 numbers of a row (rounding.py). Sources: fastsae.reference.optimizers.

`_step_numbers_kernel` is one program. It reads lr (float64), the step (int64), whether to skip it (bool) and the
gradients' scale (float64) on the device, and writes what every row needs: no host sync, and a captured graph follows
all four.

Bytes: 25 read, 52 written.
Flops: 4·log2(step), in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.backends import buffers
from fastsae.backends.gpu.stages import Moments
from fastsae.kernels.rounding import from_fp8, round_to_bf16, round_to_fp8, stream_key
from fastsae.kernels.variants import POINTERS, Variant

STREAMS = 8
"""Streams of random bits in a step: 2i is the i-th parameter's m, 2i + 1 its v."""
SHARED = tl.constexpr(128)
"""Numbers of a row that share the scale of an 8-bit moment (reference.BLOCK)."""


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
    lr_ptr, step_ptr, skip_ptr, scale_ptr, numbers_ptr, keys_ptr, seed,
    RULE: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr, DECAY: tl.constexpr, STREAMS: tl.constexpr,
):  # fmt: skip
    """numbers = [the step size, 1 / √(1-β₂ᵗ), 1 or to skip 0, 1 - lr · DECAY, the gradients' scale] in float32, rounded
    once; keys = the streams' keys (uint32 as int32). skip_ptr and scale_ptr may be absent."""
    step, lr = tl.load(step_ptr), tl.load(lr_ptr)
    size = lr
    if RULE == "adam":
        size = lr / (1 - _power(tl.full((), BETA1, tl.float64), step))
    root = tl.sqrt(1 - _power(tl.full((), BETA2, tl.float64), step))
    tl.store(numbers_ptr, size.to(tl.float32))
    tl.store(numbers_ptr + 1, (1 / root).to(tl.float32))
    go = tl.full((), 1.0, tl.float32)
    if skip_ptr is not None:
        go = tl.where(tl.load(skip_ptr), 0.0, go)
    tl.store(numbers_ptr + 2, go)
    tl.store(numbers_ptr + 3, (1 - lr * DECAY).to(tl.float32))
    scale = tl.full((), 1.0, tl.float64)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    tl.store(numbers_ptr + 4, scale.to(tl.float32))
    stream = tl.arange(0, STREAMS)
    tl.store(keys_ptr + stream, stream_key(seed, step, stream).to(tl.int32, bitcast=True))


@triton.jit
def load_numbers(numbers_ptr, eps):
    """(step size, 1/√(1-β₂ᵗ), kept, eps) of `step_of`."""
    return tl.load(numbers_ptr), tl.load(numbers_ptr + 1), tl.load(numbers_ptr + 3), eps


@triton.jit
def latents_to_update(numbers_ptr, M):
    """M, or 0 if the step is skipped: a kernel that goes over the latents then writes nothing."""
    return tl.where(tl.load(numbers_ptr + 2) == 0, 0, M)


@triton.jit
def _sign(t):
    """1, 0 or -1; 0 of NaN."""
    return (t > 0).to(tl.float32) - (t < 0).to(tl.float32)


@triton.jit
def step_of(p, g, m, v, numbers, betas, RULE: tl.constexpr):
    """The new p, m and v, float32; m and v are what they were where the rule keeps none."""
    step_size, inverse_root, kept, eps = numbers
    beta1, rest1, beta2, rest2 = betas
    if RULE == "adam":
        # As torch.lerp: from the nearer end, so that β₁ = 0 gives g itself.
        m = tl.where(rest1 < 0.5, m + rest1 * (g - m), g - beta1 * (g - m))
        v = beta2 * v + rest2 * g * g
        # The approximate root and quotient flush what is below 1e-38 to 0; a step waits for memory either way.
        move = tl.div_rn(m, tl.sqrt_rn(v) * inverse_root + eps)
    elif RULE == "lion":
        move = _sign(beta1 * m + rest1 * g)
        m = beta2 * m + rest2 * g
    else:
        move = _sign(g)
    return p * kept - step_size * move, m, v


@triton.jit
def _load_moment(moment_ptr, scales_ptr, row, c, mask, D):
    """Row `row` of a moment (rows, D), at the columns c, in float32."""
    # Each is read and written once a step, so L2 evicts it first: gathered rows are reused.
    t = tl.load(moment_ptr + (row * D + c), mask=mask, other=0, eviction_policy="evict_first")
    if scales_ptr is None:
        wide = t.to(tl.float32)
    else:
        wide = from_fp8(t) * tl.load(scales_ptr + (row * tl.cdiv(D, SHARED) + c // SHARED), mask=mask, other=0.0)
    return wide


@triton.jit
def _store_moment(
    moment_ptr, scales_ptr, row, first, c, mask, D, t, key_ptr, POSITIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """t (BLOCK,) float32 in the moment's storage, 8 bits and bfloat16 rounded at random. key_ptr: its stream's key; the
    bits are counted by its flat place in the whole parameter, of which row 0 here is row `first`."""
    at, index = row * D + c, ((row + first) * D + c).to(tl.uint32)
    if scales_ptr is not None:
        key = tl.load(key_ptr).to(tl.uint32, bitcast=True)
        WIDTH: tl.constexpr = BLOCK if BLOCK < SHARED else SHARED
        codes, scales = round_to_fp8(tl.where(mask, t, 0.0), key, index, POSITIVE, BLOCK // WIDTH, WIDTH)
        tl.store(moment_ptr + at, codes, mask=mask)
        block, blocks = tl.arange(0, BLOCK // WIDTH), tl.cdiv(D, SHARED)
        tl.store(scales_ptr + (row * blocks + block), scales, mask=block < blocks)
    elif moment_ptr.dtype.element_ty == tl.bfloat16:
        key = tl.load(key_ptr).to(tl.uint32, bitcast=True)
        tl.store(moment_ptr + at, round_to_bf16(t, key, index), mask=mask)
    else:
        tl.store(moment_ptr + at, t.to(moment_ptr.dtype.element_ty), mask=mask)


@triton.jit
def optimizer_step(
    p, g, moments, row, first, c, mask, D, numbers, betas, key_ptr, RULE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The new p (BLOCK,) float32, 0 outside mask, of row `row` (int64) of a parameter (rows, D) at the columns c, row
    first + row of the whole. Its moments (m_ptr, v_ptr, m_scales_ptr, v_scales_ptr), None where there is none, are
    updated in memory."""
    m_ptr, v_ptr, m_scales_ptr, v_scales_ptr = moments
    m, v = p, p
    if m_ptr is not None:
        m = _load_moment(m_ptr, m_scales_ptr, row, c, mask, D)
    if v_ptr is not None:
        v = _load_moment(v_ptr, v_scales_ptr, row, c, mask, D)
    p, m, v = step_of(p, g, m, v, numbers, betas, RULE)
    if m_ptr is not None:
        _store_moment(m_ptr, m_scales_ptr, row, first, c, mask, D, m, key_ptr, False, BLOCK)
    if v_ptr is not None:
        _store_moment(v_ptr, v_scales_ptr, row, first, c, mask, D, v, key_ptr + 1, True, BLOCK)
    return tl.where(mask, p, 0.0)


def as_int32(number: int) -> int:
    """Its low 32 bits as an int32, which an argument of a kernel can be."""
    return (number + 2**31) % 2**32 - 2**31


def as_pointers(moments: Moments) -> tuple[Tensor | None, ...]:
    """The four tensors as kernels take them: 8-bit codes as bytes, since sm_80 has no 8-bit floats."""
    m, v, *scales = moments
    codes = (None if t is None else t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in (m, v))
    return (*codes, *scales)


def step_numbers(
    lr: Tensor, step: Tensor, skip: Tensor | None, grad_scale: Tensor | None, rule: str, beta1: float,
    beta2: float, weight_decay: float, seed: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """numbers (5,) float32 and keys (8,) int32 of one step, on the device of lr (0-d float64), step (0-d int64), skip
    (0-d bool) and grad_scale (0-d float64)."""
    numbers = buffers.empty((5,), torch.float32, lr.device)
    keys = buffers.empty((STREAMS,), torch.int32, lr.device)
    _step_numbers_kernel[(1,)](
        lr, step, skip, grad_scale, numbers, keys, as_int32(seed or 0), RULE=rule, BETA1=beta1, BETA2=beta2,
        DECAY=weight_decay, STREAMS=STREAMS, num_warps=choose().num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return numbers, keys


def variants() -> list[Variant]:
    signature = {"lr_ptr": "*fp64", "step_ptr": "*i64", "numbers_ptr": "*fp32", "keys_ptr": "*i32", "seed": "i32"}
    constants = {"RULE": "adam", "BETA1": 0.9, "BETA2": 0.999, "DECAY": 0.1, "STREAMS": STREAMS}
    given = signature | {"skip_ptr": POINTERS[torch.bool], "scale_ptr": "*fp64"}
    absent = {"skip_ptr": None, "scale_ptr": None}
    return [
        Variant(_step_numbers_kernel, "step_numbers", signature, constants | absent, choose().num_warps),
        Variant(_step_numbers_kernel, "step_numbers/all", given, constants, choose().num_warps),
    ]
