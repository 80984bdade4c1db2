"""Caches types and shapes. The stock interpreter rebuilds them for each op, in over half of a program's time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as stock

PLAIN = {"int1", "int8", "int32", "int64", "uint8", "uint32", "uint64", "fp32", "fp64"}
"""dtypes that arithmetic leaves as they are; division widens the narrow floats."""


def mend() -> None:
    _keep_shapes()
    _keep_numpy_types()
    _skip_needless_checks()


def _keep_shapes() -> None:
    stock_init = tl.block_type.__init__
    known: dict[tuple, tuple] = {}
    scalar = tl.tuple([]), tl.constexpr(1)

    def describe(shape: Any) -> tuple:
        """Shape, size and text as a block type stores them, then shape and size as a tensor stores them."""
        key = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
        if key not in known:
            block = SimpleNamespace()
            stock_init(block, tl.int32, list(key))  # refuses sizes that are not a power of two
            sizes = tl.tuple([tl.constexpr(size) for size in key])
            known[key] = block.shape, block.numel, str(block.shape), sizes, tl.constexpr(block.numel)
        return known[key]

    def block_init(self, element_ty, shape):
        self.known = describe(shape)
        self.element_ty, self.shape, self.numel = element_ty, self.known[0], self.known[1]
        self.name = f"<{self.known[2]}, {element_ty.name}>"

    def tensor_init(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.known[3:] if type.is_block() else scalar

    tl.block_type.__init__, tl.tensor.__init__ = block_init, tensor_init


def _keep_numpy_types() -> None:
    stock_type = stock._get_np_dtype  # builds a dictionary of all types at every call
    known: dict[str, np.dtype] = {}

    def numpy_type(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = stock_type(dtype.scalar)
        return known[name]

    stock._get_np_dtype = numpy_type


def _skip_needless_checks() -> None:
    stock_check = TritonSemantic.binary_op_type_checking_impl
    stock_broadcast = TritonSemantic.broadcast_impl_value

    def check(self, lhs, rhs, *args, **kwargs):
        tensors = isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor)
        if tensors and lhs.dtype.name == rhs.dtype.name and lhs.dtype.name in PLAIN:
            return self.broadcast_impl_value(lhs, rhs)
        return stock_check(self, lhs, rhs, *args, **kwargs)

    def broadcast(self, lhs, rhs):
        if lhs.shape is rhs.shape:  # cached shapes are the same object
            return lhs, rhs
        return stock_broadcast(self, lhs, rhs)

    TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value = check, broadcast
