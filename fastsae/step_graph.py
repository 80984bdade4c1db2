"""A training step captured once in a CUDA graph and replayed on fresh inputs: three launches instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Metrics = dict[str, Tensor]


class StepGraph:
    """run(x, target) as a CUDA graph. Everything that run reads or writes besides its inputs must stay where it is.

    Capturing runs nothing on the device; every call of the object does the whole step once.
    """

    def __init__(self, run: Callable[[Tensor, Tensor | None], Metrics], x: Tensor, target: Tensor | None):
        self._x, self._target = x.clone(), None if target is None else target.clone()
        self._graph = torch.cuda.CUDAGraph()
        # A stream of x's own device: torch's default for captures belongs to whichever device was current first.
        # thread_local: another thread that allocates, a prefetching source for instance, does not spoil the capture.
        with torch.cuda.device(x.device):
            stream = torch.cuda.Stream(x.device)
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                metrics = run(self._x, self._target)
                self._names = list(metrics)
                # One tensor, so that handing out a copy is one launch too. float64 holds every count below 2⁵³.
                self._values = torch.stack([value.double() for value in metrics.values()])

    def __call__(self, x: Tensor, target: Tensor | None) -> Metrics:
        """One step. The metrics are this call's own; counts come as float64."""
        with torch.cuda.device(self._x.device):
            self._x.copy_(x)
            if self._target is not None and target is not None:
                self._target.copy_(target)
            self._graph.replay()
        return dict(zip(self._names, self._values.clone(), strict=True))
