"""Counts made by hand from the codes of batches, and comparisons of what modules counted."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import fastsae


class ByHand:
    """What an SAE must have counted, from where it stands now.

    since, fired (M,) int64, over: an int; threshold and weight: Python floats, None for a rule without.
    """

    def __init__(self, sae: fastsae.SparseAutoencoder):
        self.since, self.fired = sae.tokens_since_fired.clone(), sae.fired.clone()
        self.over, self.dead_after = int(sae.fired_over), sae.dead_after
        rule = getattr(sae.activation, "inner", sae.activation)
        self.decay = rule.decay if isinstance(rule, fastsae.BatchTopK) else None
        self.sum = self.weight = 0.0
        if self.decay is not None:
            self.weight = float(sae.get_buffer("threshold_weight"))
            self.sum = self.weight * float(sae.get_buffer("threshold"))

    def count(self, A: Tensor, *others: Tensor) -> None:
        """A batch by its code (N, M); others: of other processes, which count with it."""
        parts = [A.detach().flatten(0, -2), *(other.detach().flatten(0, -2) for other in others)]
        active = torch.cat(parts) != 0
        self.fired += active.sum(0)
        self.over += len(active)
        self.since = torch.where(active.any(0), 0, self.since + len(active))
        if self.decay is not None:
            least = [float(part[part > 0].min()) for part in parts if bool((part > 0).any())]
            if least:
                self.sum = self.decay * self.sum + (1 - self.decay) * sum(least) / len(least)
                self.weight = self.decay * self.weight + 1 - self.decay

    def check(self, sae: fastsae.SparseAutoencoder, density: bool = True) -> None:
        """density: whether the module counts these tokens for its densities too."""
        assert torch.equal(sae.tokens_since_fired, self.since)
        assert torch.equal(sae.dead, self.since >= self.dead_after)
        if density:
            assert torch.equal(sae.fired, self.fired)
            assert int(sae.fired_over) == self.over
        if self.decay is not None and self.weight:
            torch.testing.assert_close(float(sae.get_buffer("threshold_weight")), self.weight, rtol=1e-5, atol=0)
            torch.testing.assert_close(float(sae.get_buffer("threshold")), self.sum / self.weight, rtol=1e-5, atol=0)


def buffers(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all counters, those that are not saved included."""
    return {name: t.clone() for name, t in module.named_buffers()}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Whole numbers are equal, the others up to rounding in float64."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-7, atol=1e-9, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}"
        )
