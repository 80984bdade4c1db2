"""What may go wrong in an item, by name; and faults that are planted to test that they are noticed."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.gpu.plan import OPS

PLANTS = ("wrong", "raise", "crash", "hang")


class NotThere(RuntimeError):
    """What was to be measured does not exist here; the message says why."""


class Poisoned(RuntimeError):
    """The CUDA context is lost: nothing more can be measured in this process. result: what the item had found."""

    def __init__(self, message: str, result: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.result = result or {}


@functools.cache
def caught() -> tuple[type[BaseException], ...]:
    """What ends an item and not its process. Anything else ends the process, and the parent records that."""
    known: tuple[type[BaseException], ...] = (
        RuntimeError, AssertionError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, ImportError,
        OSError,
    )  # fmt: skip
    try:
        from triton.errors import TritonError
    except ImportError:
        return known
    return (*known, TritonError)  # compilation errors, resources exceeded, the interpreter's errors


def text(error: BaseException) -> str:
    """The kind and the message, cut to fit a table."""
    return f"{type(error).__name__}: {error}"[:1500]


def ensure_alive(device: str) -> None:
    """Raises Poisoned where an earlier launch has broken the CUDA context."""
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise Poisoned(text(error)) from error


def free() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def spoiled(value: Any) -> Any:
    """A result of an op that is wrong by a little."""
    from fastsae import LatentOrder, SparseCodes

    if isinstance(value, tuple):
        return (spoiled(value[0]), *value[1:])
    if isinstance(value, SparseCodes):
        return replace(value, acts=value.acts * 1.01)
    if isinstance(value, LatentOrder):
        return replace(value, tokens=value.tokens + 1)
    assert isinstance(value, Tensor)
    return value * 1.01 + 0.01


def parse(what: str) -> tuple[str, str]:
    """The op and the fault of "OP:FAULT". Raises ValueError for unknown ones."""
    name, _, fault = what.partition(":")
    if name not in OPS or fault not in PLANTS:
        raise ValueError(f"--plant {what}: expected OP:FAULT, OP of {', '.join(OPS)}, FAULT of {', '.join(PLANTS)}")
    return name, fault


def plant(what: str) -> None:
    """Breaks one op of fastsae.ops in this process: its result is wrong by a little, or it raises, crashes or hangs."""
    from fastsae import ops

    name, fault = parse(what)
    real: Callable[..., Any] = getattr(ops, name)

    @functools.wraps(real)
    def broken(*args: Any, **kwargs: Any) -> Any:
        if fault == "raise":
            raise RuntimeError(f"planted: {name} raises")
        if fault == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang":
            time.sleep(3600)
        value = real(*args, **kwargs)
        if name == "update_latents_":
            args[1].add_(1e-3)  # W_dec; the squared norms that it returns stay right
            return value
        return spoiled(value)

    setattr(ops, name, broken)
