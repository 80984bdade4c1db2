"""The part "calls": hostile calls of every raw op and of the C++ structs, each judged against float64 in NumPy."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastsae
from bench.hostile import spoil, structs, truth
from bench.hostile.calls import RAW_OPS, Call
from bench.hostile.run import ERRORS, Found, judge_error
from bench.hostile.spoil import readable
from fastsae.backends.contract import WRITTEN

STRUCTS = "structs"
"""In place of a raw op: the C++ extension by itself (structs.py)."""
KINDS = (*RAW_OPS, STRUCTS)
AS_IT_IS = nullcontext()


def case(kind: str, seed: int, number: int, backend: str | None) -> tuple[str, Callable[[], Found]]:
    """A call in words, and what makes and judges it."""
    if kind == STRUCTS:
        return kind, lambda: Found(*structs.outcome(seed, number))
    call = spoil.make(kind, seed, number, backend)
    return str(call), lambda: outcome(call, narrow_copies() if number % 2 else AS_IT_IS)


def narrow_copies() -> AbstractContextManager[Any]:
    """The cpu backend's narrow copies for a few tokens too, which most calls have: in every other call."""
    if not fastsae.backends()["cpu"]["available"]:
        return AS_IT_IS
    from fastsae.backends.cpu import screen

    return mock.patch.multiple(screen, FEW=0, FEW_KEPT=0)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors(v)] if isinstance(value, (list, tuple)) else []


def copied(value: Any) -> Any:
    if isinstance(value, spoil.Wrapped):
        return copied(value.inner)
    if isinstance(value, Tensor):
        return value.detach().clone() if readable(value) else value
    return [copied(v) for v in value] if isinstance(value, list) else value


def bits_of(value: Any) -> list[bytes]:
    with torch.inference_mode(False):
        return [
            bytes(t.detach().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy())
            for t in tensors(copied(value))
            if readable(t) and t.layout == torch.strided and t.numel()
        ]


def outcome(call: Call, how: AbstractContextManager[Any] = AS_IT_IS) -> Found:
    """One call, made under `how`, judged. Changes no setting of torch for long."""
    given = call.arguments
    before, bits = {name: copied(value) for name, value in given.items()}, {n: bits_of(v) for n, v in given.items()}
    # A backend that does not screen does not look at a screen.
    whole = all(map(readable, tensors([value for name, value in given.items() if name != "screen"])))
    error: BaseException | None = None
    result: Any = None
    try:
        with how, spoil.under(call.setting):
            result = getattr(torch.ops.fastsae, call.op)(**given)
    except ERRORS as raised:
        error = raised
    written = () if error is not None or call.op != "update_latents_" else WRITTEN
    changed = [name for name in given if name not in written and bits_of(given[name]) != bits[name]]
    if changed:
        return Found("wrong", f"changed {', '.join(changed)}; then {type(error).__name__}: {error}")
    if error is not None:
        return judge_error(error)
    if not whole:
        return Found("wrong", "returned, and an argument has no memory to read")
    try:
        with torch.inference_mode(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if _is_stale(call) or _spreads(before):
                pass
            elif call.op == "update_latents_":
                truth.update_latents_(before, result, given)
            else:
                as_called = truth.as_cast(Call(call.op, before, [], call.setting))
                truth.JUDGES[call.op](as_called, result)
    except truth.Wrong as wrong:
        return Found("wrong", str(wrong))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as raised:
        return Found("wrong", f"returned something for arguments without meaning: {type(raised).__name__}: {raised}")
    return Found("right")


def _is_stale(call: Call) -> bool:
    """Whether a screen may be of another W: then results follow the screen, as ops.prepare_screen says."""
    return bool(call.arguments.get("screen")) and any("W" in said or "screen" in said for said in call.spoiled)


def _spreads(given: dict[str, Any]) -> bool:
    """Whether numbers that are not finite spread to others: the reference multiplies all of A and W; 0 · inf is NaN."""
    if given["backend"] == "cpu":
        return False
    return not all(truth.is_finite(t) for t in tensors(list(given.values())))
