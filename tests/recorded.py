"""A CUDA graph's part played on a CPU: the torch ops of a step are recorded once, and then run again without Python.

`Replayed` takes the place of training.graph.StepGraph. As in a real graph, a replay reads and writes the addresses of
the recording, all numbers that Python computed stay as they were, and recording itself changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """Keeps every op with its arguments and results, and the bytes that were there before an op wrote over them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(kind not in (Tensor, torch.nn.Parameter) for kind in types):
            return NotImplemented  # a gradient that a ledger keeps: what it calls comes here by itself
        for argument, value in _named(func, args, kwargs):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for t in tree_leaves(value):
                    self._keep(t)
        out = func(*args, **kwargs)
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.calls.append((func, args, kwargs, results))
        if not _is_view(func):
            self._made.update(t.untyped_storage().data_ptr() for t in results)
        return out

    def _keep(self, t: Any) -> None:
        if isinstance(t, Tensor) and (place := t.untyped_storage()).data_ptr() not in self._made:
            self._before.setdefault(place.data_ptr(), (place, place.clone()))

    def undo(self) -> None:
        """Puts back what was written over."""
        for place, bytes_before in self._before.values():
            place.copy_(bytes_before)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, results in self.calls:
            if _is_view(func):
                continue  # of memory that has its new values already
            out = func(*args, **kwargs)
            for place, fresh in zip(results, (t for t in tree_leaves(out) if isinstance(t, Tensor)), strict=True):
                if place.data_ptr() != fresh.data_ptr():
                    assert place.shape == fresh.shape, (
                        f"{func} gave {tuple(fresh.shape)}, recorded {tuple(place.shape)}"
                    )
                    place.detach().copy_(fresh)


def _named(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
    arguments = func._schema.arguments
    return [*zip(arguments, args, strict=False), *((a, kwargs[a.name]) for a in arguments if a.name in kwargs)]


def _is_view(func: Any) -> bool:
    aliases = [r.alias_info for r in func._schema.returns]
    return any(a is not None and not a.is_write for a in aliases)


class Replayed:
    """In the place of StepGraph(run, x, target); counts captures and replays of all objects."""

    captured = 0
    replayed = 0

    def __init__(self, run: Callable[[Tensor, Tensor | None], dict[str, Tensor]], x: Tensor, target: Tensor | None):
        Replayed.captured += 1
        self._x, self._target = x.clone(), None if target is None else target.clone()
        self.recorder = Recorder()
        with self.recorder:
            metrics = run(self._x, self._target)
            self._names, self._values = list(metrics), [value.double() for value in metrics.values()]
        self.recorder.undo()

    def __call__(self, x: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        Replayed.replayed += 1
        self._x.copy_(x)
        if self._target is not None and target is not None:
            self._target.copy_(target)
        self.recorder.replay()
        return dict(zip(self._names, [value.clone() for value in self._values], strict=True))
