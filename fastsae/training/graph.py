"""A training step captured once in a CUDA graph and replayed on fresh inputs: three launches instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastsae.model.sae import SparseAutoencoder

Metrics = dict[str, Tensor]


def check_graph(sae: SparseAutoencoder, check: bool, anneals: bool) -> None:
    """Raises ValueError for a step that cannot be captured: off a GPU, or one that reads sizes from the device.

    Every rule can be: see `room_for`.
    """
    device = sae.W_dec.device
    if device.type != "cuda":
        raise ValueError(f"cuda_graph=True needs the SAE on a CUDA device, it is on {device}; move it there first")
    if check:
        raise ValueError("check=True reads from the device at every step, which a CUDA graph cannot; drop one of them")
    if sae.ghost is not None:
        raise ValueError(
            f"ghost={sae.ghost!r} reads the number of dead latents at every step, which a CUDA graph cannot; pass "
            "cuda_graph=False, or use aux_k instead"
        )
    if anneals:
        raise ValueError("k_schedule changes the shape of a step, which a CUDA graph fixes; drop one of them")


def room_for(sae: SparseAutoencoder, n: int) -> int | None:
    """Slots of a threshold rule's code in a graph, whose shapes are fixed: for twice as many active latents as n tokens
    had last; None for a rule that fixes how many are active.

    A step that needs more changes nothing. The host reads afterwards how many it took, and makes an overflowed step
    again without a graph.
    """
    return sae.slots_for(n, 2) if sae.activation.shaped else None


class StepGraph:
    """run(x, target) as a CUDA graph. Every other tensor that run reads or writes must keep its address.

    Capturing runs nothing on the device; every call of the object runs the whole step once.
    """

    def __init__(self, run: Callable[[Tensor, Tensor | None], Metrics], x: Tensor, target: Tensor | None):
        self._x, self._target = x.clone(), None if target is None else target.clone()
        self._graph = torch.cuda.CUDAGraph()
        # A stream of x's own device: torch's default one belongs to the device of the first capture.
        # thread_local: another thread that allocates, such as a prefetching source's, does not break the capture.
        with torch.cuda.device(x.device):
            stream = torch.cuda.Stream(x.device)
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                metrics = run(self._x, self._target)
                self._names = list(metrics)
                # One tensor, so that copying the metrics is one launch. float64 holds every count below 2⁵³.
                self._values = torch.stack([value.double() for value in metrics.values()])

    def __call__(self, x: Tensor, target: Tensor | None) -> Metrics:
        """One step. The metrics are a copy; counts are float64."""
        with torch.cuda.device(self._x.device):
            self._x.copy_(x)
            if self._target is not None and target is not None:
                self._target.copy_(target)
            self._graph.replay()
        return dict(zip(self._names, self._values.clone(), strict=True))
