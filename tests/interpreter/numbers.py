"""Arithmetic: bf16 in float32, rounding to nearest even, dots, casts, NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as stock

Handle = stock.TensorHandle
Builder = stock.InterpreterBuilder


def rounded(value: np.ndarray, dropped: int) -> np.ndarray:
    """The bits, uint32, of float32 values rounded to nearest even with the lowest `dropped` bits of the mantissa 0."""
    value = np.ascontiguousarray(value, dtype=np.float32)
    bits = value.view(np.uint32)
    half = np.uint32((1 << (dropped - 1)) - 1)
    up = (bits + half + ((bits >> np.uint32(dropped)) & np.uint32(1))) & np.uint32(0xFFFFFFFF << dropped & 0xFFFFFFFF)
    return np.where(np.isnan(value), np.uint32(0x7FC00000), up)


def to_bf16(value: np.ndarray) -> np.ndarray:
    """uint16, as the interpreter stores bfloat16."""
    value = np.asarray(value)
    return (rounded(value, 16) >> np.uint32(16)).astype(np.uint16).reshape(value.shape)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar.name == "bf16"


def number(handle: Handle) -> np.ndarray:
    """A handle's values in a dtype that numpy computes in."""
    return from_bf16(handle.data) if is_bf16(handle) else handle.data


def result(value: np.ndarray, like: Any) -> Handle:
    """A handle of dtype `like` from computed values; a comparison always gives int1."""
    if value.dtype == np.bool_:
        return Handle(value, tl.int1)
    if like.name == "bf16":
        return Handle(to_bf16(value), like)
    wanted = stock._get_np_dtype(like)
    return Handle(value if value.dtype == wanted else value.astype(wanted), like)


def mend() -> None:
    def unary_op(self, x, op):
        return result(op(number(x)), x.dtype.scalar)

    def binary_op(self, x, y, op):
        return result(op(number(x), number(y)), x.dtype.scalar)

    def ternary_op(self, x, y, z, op):
        if op is np.where:  # a select moves bits and computes nothing
            return Handle(np.where(x.data, y.data, z.data), z.dtype.scalar)
        return result(op(number(x), number(y), number(z)), z.dtype.scalar)

    def create_clampf(self, x, low, high, propagate_nans):
        if propagate_nans == tl.PropagateNan.ALL:
            return result(np.clip(number(x), number(low), number(high)), x.dtype.scalar)
        return result(np.fmin(np.fmax(number(x), number(low)), number(high)), x.dtype.scalar)

    def create_fma(self, x, y, z):  # one rounding, except for rare double rounding through float64
        return result(number(x).astype(np.float64) * number(y) + number(z), z.dtype.scalar)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        refuse_fp8(a.dtype, b.dtype)
        left, right = number(a), number(b)
        if left.dtype == np.float32 and not is_bf16(a) and input_precision == stock._ir.INPUT_PRECISION.TF32:
            left, right = (rounded(side, 13).view(np.float32) for side in (left, right))
        wide = np.int32 if left.dtype == np.int8 else np.promote_types(left.dtype, np.float32)
        return result(np.matmul(left.astype(wide), right.astype(wide)) + number(d), d.dtype.scalar)

    def cast_impl(self, x, dtype):
        refuse_fp8(x.dtype, dtype)
        if dtype.scalar.name == "bf16":
            return Handle(to_bf16(number(x).astype(np.float32)), dtype.scalar)
        return Handle(number(x).astype(stock._get_np_dtype(dtype)), dtype.scalar)

    def create_fp_to_fp(self, x, dtype, rounding_mode):
        nearest = cast_impl(self, x, dtype)
        if rounding_mode != stock._ir.ROUNDING_MODE.RTZ:
            return nearest
        # Steps back where rounding went away from zero. In both formats the bits are in the order of the magnitudes.
        away = np.abs(number(nearest).astype(np.float64)) > np.abs(number(x).astype(np.float64))
        bits = nearest.data.view(f"uint{dtype.scalar.primitive_bitwidth}")
        return Handle((bits - away.astype(bits.dtype)).view(nearest.data.dtype), dtype.scalar)

    for mended in (
        unary_op, binary_op, ternary_op, create_clampf, create_fma, create_dot, cast_impl, create_fp_to_fp,
    ):  # fmt: skip
        setattr(Builder, mended.__name__, mended)
    # maxnum and minnum drop a NaN, as tl.maximum and tl.minimum do unless told otherwise.
    Builder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, np.fmax)
    Builder.create_minnumf = lambda self, x, y: self.binary_op(x, y, np.fmin)
    Builder.create_rsqrt = lambda self, x: self.unary_op(x, lambda value: 1 / np.sqrt(value))
    Builder.get_bf16 = lambda self, value: Handle(to_bf16(np.array([value], dtype=np.float32)), tl.bfloat16)


def refuse_fp8(*dtypes: Any) -> None:
    for dtype in dtypes:
        if dtype.scalar.is_fp8():
            raise NotImplementedError(f"the mended interpreter does not compute in {dtype.scalar}")
