"""The samples and the metrics: SynthSAEBench's generator and evaluation, from the library that publishes them.

Batch i is drawn after seeding torch with a number that i fixes. So every batch can be drawn again: a run that was
stopped, and rules that are trained on another day, get the same samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsae.codes import SparseCodes

STRIDE = 1_000_003
"""Between the first seeds of two streams: more than there are batches in the longest run."""
HELD_OUT = 999
"""The stream that evaluation draws from, apart from those of all training seeds in use."""


@dataclass(frozen=True)
class Settings:
    """All that a result depends on. The defaults are the published ones, but for the number of samples."""

    samples: int = 5_000_000
    batch: int = 1024
    M: int = 4096
    k: int = 25
    """The L0 that every rule is to have."""
    lr: float = 3e-4
    eval_samples: int = 100_000
    """Held-out samples for the metrics."""
    seed: int = 0
    """Of the weights and of the training samples."""
    device: str = "cpu"
    autocast: bool = False
    """SAELens under bf16 autocast, as published."""
    world: str = ""
    """A saved SyntheticModel, a folder or a name on the hub. Left out: made from the published settings."""
    features: int = 16_384
    D: int = 768
    roots: int = 128
    """Trees in the hierarchy of features."""

    @property
    def steps(self) -> int:
        return self.samples // self.batch


def quick(settings: Settings) -> Settings:
    return replace(
        settings, samples=64 * 12, batch=64, M=64, k=4, eval_samples=256, features=256, D=32, roots=4, world=""
    )


def orthogonalized(rows: Tensor, steps: int, lr: float) -> Tensor:
    """Rows (n, D) of norm 1, after `steps` of Adam on  Σ_{i≠j} ⟨e_i, e_j⟩² + n · Σ_i (‖e_i‖² - 1)²  from `rows`.

    The objective of the library's `orthogonalize_embeddings`, with Σ_ij ⟨e_i, e_j⟩² = ‖EᵀE‖²: O(n D²) a step in place
    of O(n² D). At n = 16,384 the library's 100 steps would take three quarters of an hour on one core.
    """
    rows = F.normalize(rows.detach(), dim=-1).requires_grad_()
    optimizer = torch.optim.Adam([rows], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        squares = rows.square().sum(-1)
        pairs = (rows.mT @ rows).square().sum() - squares.square().sum()
        (pairs + len(rows) * (squares - 1).square().sum()).backward()
        optimizer.step()
    return F.normalize(rows.detach(), dim=-1)


def published(settings: Settings) -> Any:
    """SyntheticModel with the settings of SynthSAEBench-16k, at the sizes of `settings`.

    Source: docs/synth_sae_bench.md of SAELens, "Creating Custom Benchmark Models".
    """
    from sae_lens import synthetic

    config = synthetic.SyntheticModelConfig(
        num_features=settings.features,
        hidden_dim=settings.D,
        firing_probability=synthetic.ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
        hierarchy=synthetic.HierarchyConfig(
            total_root_nodes=settings.roots, branching_factor=4, max_depth=3, mutually_exclusive_portion=1.0,
            mutually_exclusive_min_depth=0, compensate_probabilities=True, scale_children_by_parent=True,
        ),
        orthogonalization=synthetic.OrthogonalizationConfig(num_steps=100, lr=3e-4),
        correlation=synthetic.LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
        mean_firing_magnitudes=synthetic.LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=synthetic.FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        bias=0.5,
        seed=42,
    )  # fmt: skip
    plan = config.orthogonalization

    def initialize(features: Any) -> None:
        features.feature_vectors.data = orthogonalized(features.feature_vectors, plan.num_steps, plan.lr)

    features = synthetic.FeatureDictionary(
        settings.features, settings.D, bias=config.bias, initializer=initialize, device=settings.device,
        seed=config.seed,
    )  # fmt: skip
    return synthetic.SyntheticModel(config, feature_dict=features, device=settings.device)


class World:
    """The generator, and the metrics that know its features.

    Raises ValueError where a saved model has another width than `settings.D`.
    """

    def __init__(self, settings: Settings):
        from sae_lens import synthetic

        self.settings = settings
        if settings.world:
            self.model = synthetic.SyntheticModel.load_from_source(settings.world, device=settings.device)
        else:
            self.model = published(settings)
        if (width := self.model.cfg.hidden_dim) != settings.D:
            raise ValueError(f"--world {settings.world} has activations of width {width}, expected {settings.D}")

    def batch(self, i: int) -> Tensor:
        """Training batch i: (batch, D)."""
        torch.manual_seed(self.settings.seed * STRIDE + i)
        return self.model.sample(self.settings.batch)

    def held_out(self) -> Replay:
        """The true acts of the held-out samples, the same for every SAE that is judged."""
        torch.manual_seed(HELD_OUT * STRIDE)
        left, drawn = self.settings.eval_samples, []
        while left > 0:
            n = min(left, self.settings.batch)
            drawn.append(SparseCodes.from_dense(self.model.activation_generator.sample(n)))
            left -= n
        return Replay(drawn)

    def scores(self, sae: Any, held_out: Replay) -> dict[str, float]:
        """The library's metrics of one SAE, which needs eval(), encode(x) -> (N, M), decode(acts) and W_dec."""
        from sae_lens import synthetic

        held_out.rewind()
        found = synthetic.eval_sae_on_synthetic_data(
            sae, self.model.feature_dict, held_out, self.settings.eval_samples, self.settings.batch
        ).to_dict()
        return {**found.pop("classification"), **found}


class Replay:
    """The true acts that were drawn before, as a generator of them: drawing takes longer than judging an SAE."""

    def __init__(self, drawn: list[SparseCodes]):
        self._drawn = drawn
        self.rewind()

    def rewind(self) -> None:
        self._left: Iterator[SparseCodes] = iter(self._drawn)

    def sample(self, n: int) -> Tensor:
        """The next batch (n, features). Raises ValueError where the next one is of another size."""
        codes = next(self._left)
        if codes.n_tokens != n:
            raise ValueError(f"{n} samples asked for, {codes.n_tokens} were drawn")
        return codes.to_dense()


class Digest:
    """A number of 64 bits over a sequence of float32 batches, in their order; equal for equal bits. Never syncs.

    h ← P·h + Σ_j (2j + 1)·bits_j: an odd factor for every place, so that no change of a single element can be missed.
    """

    FACTOR = 1_000_003

    def __init__(self, value: int = 0):
        self._value = torch.tensor(value, dtype=torch.int64)

    def add(self, x: Tensor) -> None:
        bits = x.detach().contiguous().view(torch.int32).flatten().long()
        odd = torch.arange(1, 2 * bits.numel(), 2, dtype=torch.int64, device=x.device)
        self._value = self._value.to(x.device) * self.FACTOR + (bits * odd).sum()

    def __int__(self) -> int:
        return int(self._value)
