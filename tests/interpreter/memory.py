"""Loads, stores and atomics stay inside the tensor that their pointer was made from."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as stock

from tests.interpreter import OutOfBounds
from tests.interpreter.numbers import Builder, Handle, from_bf16, is_bf16, to_bf16


@dataclass
class Span:
    """The bytes [start, end) from a tensor argument's first element to its last."""

    name: str
    start: int
    end: int


spans_in_use: list[Span] = []
"""The spans of the running kernel's arguments."""


def span_of(tensor: Any) -> Span:
    tensor = stock._unwrap_tensor(tensor)
    if tensor.device.type != "cpu":
        raise ValueError(f"the interpreter computes on cpu tensors, got one on {tensor.device}")
    start = tensor.data_ptr()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return Span("a tensor", start, start + ((1 + reach) * tensor.element_size() if tensor.numel() else 0))


def check_bounds(pointer: Handle, mask: np.ndarray, what: str) -> None:
    """Raises OutOfBounds unless every live lane of `pointer` lies in its own tensor, or, if unknown, in any."""
    address = pointer.data
    live = address if mask.all() else address[np.broadcast_to(mask, address.shape)]
    if not live.size:
        return
    width = np.uint64(max(1, pointer.get_element_ty().primitive_bitwidth // 8))
    own = getattr(pointer, "span", None)
    low, high = live.min(), live.max() + width
    if own is not None and own.start <= low and high <= own.end:
        return
    spans = spans_in_use if own is None else [own]
    inside = np.zeros(live.shape, dtype=bool)
    for span in spans:
        inside |= (live >= np.uint64(span.start)) & (live + width <= np.uint64(span.end))
    if inside.all():
        return
    message = f"{what} of {np.count_nonzero(~inside)} of {live.size} live lanes out of bounds"
    if own is not None:
        element = (int(live[~inside][0]) - own.start) // int(width)
        message += f": element {element} of {own.name}, which has {(own.end - own.start) // int(width)}"
    raise OutOfBounds(f"{message}, in program {stock.interpreter_builder.grid_idx}")


def mend() -> None:
    def checked(method: str, what: str, pointer_at: int = 0, mask_at: int | None = 1) -> None:
        original = getattr(Builder, method)

        @functools.wraps(original)
        def call(self, *args, **kwargs):
            mask = np.True_ if mask_at is None else args[mask_at]
            check_bounds(args[pointer_at], mask.data if isinstance(mask, Handle) else np.asarray(mask), what)
            return original(self, *args, **kwargs)

        setattr(Builder, method, call)

    def keeps_span(method: str, pointer_at: int = 0) -> None:
        """Makes `method` pass on the tensor that a pointer was made from."""
        original = getattr(Builder, method)

        @functools.wraps(original)
        def call(self, *args, **kwargs):
            made = original(self, *args, **kwargs)
            if hasattr(args[pointer_at], "span"):
                made.span = args[pointer_at].span
            return made

        setattr(Builder, method, call)

    def create_addptr(self, pointer, offset):
        width = max(1, pointer.get_element_ty().primitive_bitwidth // 8)
        made = Handle(pointer.data + (offset.data.astype(np.int64) * width).view(np.uint64), pointer.dtype)
        if hasattr(pointer, "span"):
            made.span = pointer.span
        return made

    def create_splat(self, ret_ty, x):  # a view: nothing writes to a handle's data
        return Handle(np.broadcast_to(x.data.reshape(()), ret_ty.shape.values), x.dtype.scalar)

    original_rmw = Builder.create_atomic_rmw

    def create_atomic_rmw(self, op, pointer, value, mask, sem, scope):
        if not is_bf16(value):
            return original_rmw(self, op, pointer, value, mask, sem, scope)
        old = np.zeros(pointer.data.shape, dtype=np.uint16)  # only add exists in bf16; lanes may share an address
        for lane in zip(*np.nonzero(np.broadcast_to(mask.data, old.shape)), strict=True):
            address, one = pointer.data[lane].reshape(1), np.ones(1, dtype=bool)
            before = stock._interpreter.load(address, one, np.zeros(1, dtype=np.uint16), np.dtype(np.uint16))
            added = from_bf16(before) + from_bf16(value.data[lane].reshape(1))
            stock._interpreter.store(address, to_bf16(added), one)
            old[lane] = before[0]
        return Handle(old, tl.bfloat16)

    for mended in (create_addptr, create_splat, create_atomic_rmw):
        setattr(Builder, mended.__name__, mended)
    for method in ("create_broadcast", "create_expand_dims", "create_reshape", "create_trans", "create_bitcast"):
        keeps_span(method)
    keeps_span("create_splat", pointer_at=1)
    checked("create_masked_load", "load")
    checked("create_masked_store", "store", mask_at=2)
    checked("create_atomic_rmw", "atomic", pointer_at=1, mask_at=3)
    checked("create_atomic_cas", "atomic", mask_at=None)
