"""How an op becomes torch.ops.fastsae.<op>: plain tensors in and out, with a fake kernel, a backward and autocast.

`define` binds the arguments of a call to their names, checks them, and hands them to the backend that
fastsae.backends.choose picks at run time, so a compiled graph holds one opaque call. Everything is flat: x (N, D),
fixed codes (N, K), ragged codes (capacity,) with offsets (N+1,).

The check of an op keeps a backend inside its memory, so it runs for every call, in the fake kernel too: torch.compile
raises for a wrong shape when it traces. Values are checked in real tensors on the CPU only, because reading one on a
GPU is a host sync.

Autocast: the ops run in the weights' dtype, and autocast is off inside them. x and acts are cast to W's dtype (x to
that of acts where there is no W), weights never. Backends get contiguous tensors only: other arguments are
copied first, except those that the op writes, which must be contiguous.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsae.backends import choose
from fastsae.ops import checks as check_that

CODE = "Tensor acts, Tensor indices, Tensor? offsets"
"""A flat code in a schema."""

_LIBRARY = torch.library.Library("fastsae", "FRAGMENT")


def define(
    op: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    check: Callable[..., None],
    check_values: Callable[..., None] | None = None,
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    cast: Sequence[str] = (),
    to: str = "W",
    mutates: Sequence[str] = (),
    bundle: Callable[..., Any] | None = None,
) -> None:
    """Defines torch.ops.fastsae.<op>; the last argument of its schema is `str? backend`.

    fake, check, check_values and the backend's function take the other arguments in the order of the schema, or, with
    `bundle`, the one object that bundle makes of them by name. fake returns tensors of the results' shapes and dtypes.
    setup and backward: as torch.library's register_autograd takes them. cast: the arguments that autocast casts to the
    dtype of the argument `to`. mutates: the arguments that are written.
    """

    def bound(given: dict[str, Any]) -> list[Any]:
        for name, value in given.items():
            if name not in optional:
                check_that.given(name, value)
        return [bundle(**given)] if bundle else list(given.values())

    def run(*args: Any) -> Any:
        *given, backend = args
        named = dict(zip(names, given, strict=True))
        for name, value in named.items():
            check_that.has_memory(name, value)
        # Before anything is copied: an expanded view may be too large to copy.
        check(*bound(named))
        check_that.one_device(named)
        named = {n: v if n in mutates else _contiguous(v) for n, v in named.items()}
        arguments = bound(named)
        if check_values is not None:
            check_values(*arguments)
        info = {n: v for n, v in named.items() if isinstance(v, (int, float, str))}
        module = choose(op, backend, *_tensors(named.values()), **info)
        return getattr(module, op)(*arguments)

    def run_fake(*args: Any) -> Any:
        named = dict(zip(names, args[:-1], strict=True))
        arguments = bound(named)
        check(*arguments)
        check_that.one_device(named)
        return fake(*arguments)

    def autocast(device: str, *args: Any) -> Any:
        *given, backend = args
        named = dict(zip(names, given, strict=True))
        for name in (to, *cast) if cast else ():  # which the cast reads
            check_that.given(name, named[name])
            check_that.has_memory(name, named[name])
        with without_autocast(device):
            return raw(*(v.to(named[to].dtype) if n in cast else v for n, v in named.items()), backend)

    def lazily_negated(*args: Any, **named: Any) -> Any:
        raise TypeError(
            f"an argument of fastsae.{op} is lazily negated (t.is_neg()), and torch cannot write it back; pass "
            "t.resolve_neg()"
        )

    custom = torch.library.custom_op(f"fastsae::{op}", run, mutates_args=mutates, schema=schema)
    custom.register_fake(run_fake)
    raw = getattr(torch.ops.fastsae, op).default
    names = [argument.name for argument in raw._schema.arguments][:-1]
    optional = {a.name for a in raw._schema.arguments if isinstance(a.type, torch.OptionalType)}
    if backward is not None:
        custom.register_autograd(backward, setup_context=setup)
    if mutates:
        _LIBRARY.impl(op, lazily_negated, "Negative")
    for device in ("cpu", "cuda"):
        _LIBRARY.impl(op, functools.partial(autocast, device), f"Autocast{device.upper()}")


def without_autocast(device: str) -> torch.autocast:
    """Turns autocast off in the block: the ops run in the weights' dtype, and so should torch's ops around them.

    Does nothing for a device type without autocast (meta).
    """
    return torch.autocast(device if torch.amp.is_autocast_available(device) else "cpu", enabled=False)


def empty_ints(like: Tensor, *shape: Any, dtype: torch.dtype = torch.int64) -> Tensor:
    """What a fake kernel returns for integers, on like's device."""
    return like.new_empty(shape, dtype=dtype)


def no_gradients(inputs: Any) -> list[Any]:
    """No gradient, in the structure of an op's inputs: None for an argument, a list of None for a list."""
    return [[None] * len(value) if isinstance(value, (list, tuple)) else None for value in inputs]


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(item for item in value if isinstance(item, Tensor))
    return found


def _contiguous(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.resolve_neg().contiguous()  # contiguous() alone keeps a lazy negation, which no kernel sees
    if isinstance(value, (list, tuple)):
        return [_contiguous(item) for item in value]
    return value
