"""How a valid call is made hostile: one spoiler for each kind of harm, and torch's settings while the call runs."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.hostile.calls import CPU, MAKERS, Call, Draw

# -- tensors: dtype, layout, memory, size ------------------------------------------------------------------------------


class Named(Tensor):
    """A subclass without behaviour of its own."""


class Wrapped(Tensor):
    """A subclass without memory of its own, as torchao's and DTensor are."""

    inner: Any

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        bare = torch.utils._pytree.tree_map_only(Wrapped, lambda t: t.inner, (args, kwargs or {}))
        return func(*bare[0], **bare[1])


def gone(t: Tensor) -> Tensor:
    """Without its memory, as a sharded parameter is between two uses."""
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def halved(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(t.untyped_storage().nbytes() // 2)
    return t


def odd_address(t: Tensor) -> Tensor:
    if not t.numel():
        return t
    memory = bytearray(1 + t.numel() * t.itemsize)
    memory[1:] = bytes(t.contiguous().view(-1).view(torch.uint8).numpy())
    return torch.frombuffer(memory, dtype=t.dtype, offset=1).view(t.shape)


def _apart(t: Tensor) -> Tensor:
    return torch.stack([t, t], -1)[..., 0]


def _transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.ndim == 2 else _apart(t)


def _expanded(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape) if t.ndim and t.shape[0] else t


def _overlapping(t: Tensor) -> Tensor:
    return t.as_strided(t.shape, [1] * t.ndim)


def _offset(t: Tensor) -> Tensor:
    return torch.cat([t.flatten()[:1].repeat(3), t.flatten()])[-t.numel() :].view(t.shape) if t.numel() else t


def _negated(t: Tensor) -> Tensor:
    return torch._neg_view(t) if t.is_floating_point() and t.itemsize > 1 else t


def _inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def _as(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda t: t.to(dtype)


DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int16,
    torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64,
)  # fmt: skip
TENSOR: dict[str, Callable[[Tensor], Any]] = {
    **{str(dtype).removeprefix("torch."): _as(dtype) for dtype in DTYPES},
    "without memory": gone, "with half its memory": halved, "at an odd address": odd_address,
    "columns apart": _apart, "transposed": _transposed, "expanded": _expanded, "overlapping": _overlapping,
    "at an offset": _offset, "a lazy negation": _negated,
    "cut": lambda t: t[:-1] if t.ndim else t, "doubled": lambda t: torch.cat([t, t]) if t.ndim else t,
    "wider": lambda t: torch.cat([t, t], -1) if t.ndim else t, "narrower": lambda t: t[..., :-1] if t.ndim else t,
    "with a dimension more": lambda t: t[None], "flat": lambda t: t.flatten(), "empty": lambda t: t.flatten()[:0],
    "0-d": lambda t: t.flatten()[0] if t.numel() else t.flatten(), "one token": lambda t: t[:1] if t.ndim else t,
    "on meta": lambda t: t.to("meta"), "sparse": lambda t: t.to_sparse() if t.ndim else t,
    "sparse csr": lambda t: t.to_sparse_csr() if t.ndim == 2 and t.numel() else t,
    "a subclass": lambda t: t.as_subclass(Named), "a wrapper": Wrapped,
    "a parameter": lambda t: torch.nn.Parameter(t, requires_grad=t.is_floating_point() or t.is_complex()),
    "an inference tensor": _inference,
    "None": lambda t: None, "a list": lambda t: t.tolist(), "a number": lambda t: 3, "text": lambda t: "x",
    "an array": lambda t: np.zeros(3),
}  # fmt: skip


def readable(t: Tensor) -> bool:
    """Whether all numbers of t lie in its memory."""
    if isinstance(t, Wrapped):
        return readable(t.inner)
    if not t.numel():
        return True
    if t.device != CPU:
        return False
    if t.layout != torch.strided:
        return True
    last = sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
    return t.untyped_storage().nbytes() >= (t.storage_offset() + last + 1) * t.itemsize


# -- values ------------------------------------------------------------------------------------------------------------


def _some(value: float) -> Callable[[Draw, Tensor], Tensor]:
    def set_some(draw: Draw, t: Tensor) -> Tensor:
        t = t.clone()
        flat = t.view(-1)
        for _ in range(draw.of((1, 1, 3)) if flat.numel() else 0):
            flat[int(draw.rng.integers(flat.numel()))] = value
        return t

    return set_some


FLOATS: dict[str, Callable[[Draw, Tensor], Tensor]] = {
    "some NaN": _some(float("nan")), "some inf": _some(float("inf")), "some -inf": _some(float("-inf")),
    "some huge": _some(1e30), "some tiny": _some(1e-42), "some -0": _some(-0.0),
    "all 0": lambda draw, t: t * 0, "all equal": lambda draw, t: t * 0 + 1, "all negative": lambda draw, t: -t.abs(),
    "all huge": lambda draw, t: t * 1e25,
}  # fmt: skip
INTS: dict[str, Callable[[Draw, Tensor], Tensor]] = {
    "some -1": _some(-1), "some 2^31-1": _some(2**31 - 1), "some -2^31": _some(-(2**31)), "some 100": _some(100),
    "some 0": _some(0), "some 3": _some(3), "reversed": lambda draw, t: t.flip(0) if t.ndim else t,
    "all equal": lambda draw, t: t.flatten()[:1].expand(t.shape).clone() if t.numel() and t.ndim else t,
    "one more": lambda draw, t: t + 1, "negative": lambda draw, t: -t,
}  # fmt: skip
LONGS = INTS | {"some 2^40": _some(2**40), "some 2^63-1": _some(2**63 - 1), "some -2^63": _some(-(2**63))}

# Nothing between 10^5 and 2^50: an allocation of that size might succeed and fill the machine.
NUMBERS = (-1, 0, 1, 2, 3, 17, 100, 101, -(2**31), 2**53, 2**62, 2**63 - 1, -(2**63), 2**63, True, 1.5, "7", None, [3])
REALS = (
    0.0, -1.0, 1.0, 0.5, 1e-300, 1e308, float("nan"), float("inf"), float("-inf"), 2, None, "x", True, 1 - 1e-16,
)  # fmt: skip
TEXTS = (
    "",
    "EXACT",
    "exact ",
    "cpu",
    "exact",
    "adam",
    "nothing",
    "x" * 10000,
    "ü\0",
    None,
    3,
    "triton",
    "cuda",
    "fp32",
)


def _list(draw: Draw, values: list[Any]) -> tuple[str, Any]:
    kind = draw.of(("dropped", "repeated", "reversed", "none", "an item", "an item", "an item"))
    if kind == "none" or not values:
        return "none", draw.of(([], None))
    i = int(draw.rng.integers(len(values)))
    if kind == "dropped":
        return kind, values[:i] + values[i + 1 :]
    if kind == "repeated":
        return kind, [*values, values[i]]
    if kind == "reversed":
        return kind, values[::-1]
    said, item = spoil_value(draw, values[i])
    return f"[{i}] {said}", [*values[:i], item, *values[i + 1 :]]


def spoil_value(draw: Draw, value: Any) -> tuple[str, Any]:
    """What was done, and the value after it. A tensor without memory stays as it is: torch would read past it."""
    if isinstance(value, Tensor):
        if not readable(value):
            return "", value
        plain = value.layout == torch.strided and not isinstance(value, Wrapped)
        if draw.chance(0.4) and plain and value.dtype != torch.bool:
            kinds = FLOATS if value.is_floating_point() else LONGS if value.dtype == torch.int64 else INTS
            name = draw.of(kinds)
            if value.dtype.itemsize > 1:
                with torch.no_grad():
                    return name, kinds[name](draw, value)
        name = draw.of(TENSOR)
        return name, TENSOR[name](value)
    if isinstance(value, bool):
        value = draw.of((not value, None, 2, "True"))
    elif isinstance(value, int):
        value = draw.of(NUMBERS)
    elif isinstance(value, float):
        value = draw.of(REALS)
    elif isinstance(value, str):
        value = draw.of(TEXTS)
    elif isinstance(value, list):
        return _list(draw, value)
    else:
        value = draw.of((torch.from_numpy(np.ones(3, np.float32)), 3, 2**63 - 1, "x", [], 0.5, None))
    return f"{value!r:.40}", value


# -- the same memory twice ---------------------------------------------------------------------------------------------


def _places(arguments: dict[str, Any]) -> Iterator[tuple[str, int | None, Tensor]]:
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, None, value
        elif isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, Tensor):
                    yield name, i, item


def alias(draw: Draw, arguments: dict[str, Any]) -> str:
    """Puts one tensor's memory under another argument of the same dtype. Returns what was done, or ""."""
    places = list(_places(arguments))
    if not places:
        return ""
    name, at, t = draw.of(places)
    hosts = [
        (other, j, u)
        for other, j, u in places
        if (other, j) != (name, at) and u.dtype == t.dtype and u.numel() >= t.numel() > 0 and type(u) is Tensor
        if readable(u) and u.layout == torch.strided and u.is_contiguous()
    ]
    if not hosts:
        return ""
    other, j, host = draw.of(hosts)
    start = int(draw.rng.integers(host.numel() - t.numel() + 1))
    view = host.view(-1)[start : start + t.numel()].view(t.shape)
    if at is None:
        arguments[name] = view
    else:
        arguments[name] = [*arguments[name][:at], view, *arguments[name][at + 1 :]]
    return f"{name}{'' if at is None else f'[{at}]'} in the memory of {other}{'' if j is None else f'[{j}]'}"


# -- torch's settings --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def _default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def _another_thread() -> Iterator[None]:
    """A thread that changes the default dtype all the time, between any two lines of this one."""
    stop, interval = threading.Event(), sys.getswitchinterval()

    def change() -> None:
        while not stop.is_set():
            for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
                torch.set_default_dtype(dtype)

    thread = threading.Thread(target=change)
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
        torch.set_default_dtype(torch.float32)


def _autocast(dtype: torch.dtype) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: torch.autocast("cpu", dtype=dtype)


AUTOCAST = {"autocast bfloat16": torch.bfloat16, "autocast float16": torch.float16}
SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default dtype bfloat16": lambda: _default_dtype(torch.bfloat16),
    "default dtype float16": lambda: _default_dtype(torch.float16),
    "default dtype float64": lambda: _default_dtype(torch.float64),
    "default device meta": _default_device,
    "two threads": lambda: _threads(2),
    "three threads": lambda: _threads(3),
    "deterministic": _deterministic,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "another thread": _another_thread,
    **{name: _autocast(dtype) for name, dtype in AUTOCAST.items()},
}


def under(setting: str) -> AbstractContextManager[Any]:
    return SETTINGS[setting]() if setting in SETTINGS else contextlib.nullcontext()


# -- a call ------------------------------------------------------------------------------------------------------------


def make(op: str, seed: int, number: int, backend: str | None = None) -> Call:
    """The call of this number. It depends on its arguments alone. backend: instead of a drawn one."""
    draw = Draw(op, seed, number)
    call = Call(op, MAKERS[op](draw))
    if backend is not None:
        call.arguments["backend"] = backend
    tensors = {name for name, value in call.arguments.items() if isinstance(value, Tensor)}
    for _ in range(draw.of((0, 1, 1, 1, 1, 1, 2, 2, 3))):
        try:
            if draw.chance(0.15):
                said = alias(draw, call.arguments)
            else:
                name = draw.of([n for n in call.arguments if n != "backend" or draw.chance(0.1)])
                if isinstance(call.arguments[name], Tensor) and name not in tensors:
                    continue  # torch's error prints a tensor where there should be none, and would read lost memory
                what, call.arguments[name] = spoil_value(draw, call.arguments[name])
                said = what and f"{name} {what}"
        except (RuntimeError, TypeError, ValueError, IndexError):
            continue  # torch has no such tensor
        if said:
            call.spoiled.append(said)
    if draw.chance(0.3):
        call.setting = draw.of(SETTINGS)
    return call
