"""Toy recovery: SAEs on sparse sums of 512 known directions in 256 dimensions; how many directions do they find?

Source: Sharkey, Braun & Millidge 2022 (Taking features out of superposition), as coded by Cunningham et al. 2023
(public code HoagyC/sparse_coding, replicate_toy_models.py; the experiment is not in their paper). Feature i is on with
probability (5/512)·.99^i, which is .97 features on average, not 5, and leaves 38 % of the samples empty. `FIVE` scales
the probabilities to 5 on average. The number of steps is not published.

`SOONER` are recipes that find the features in fewer steps; their constants were chosen on seeds from 100 on.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastsae.atomic import replace_file
from fastsae.model.initial import unit_rows
from fastsae.model.parameters import normalize_rows_
from fastsae.model.resample import resample_
from fastsae.model.rules import Activation, BatchTopK, Gated, ReLU, TopK
from fastsae.model.sae import SparseAutoencoder
from fastsae.runs.evaluate import evaluate
from fastsae.runs.schedules import Schedule
from fastsae.systems.interpretable_directions.metrics import SAME, likeness, max_cosines
from fastsae.training.step import FusedTrainStep

VARIANTS = {"coded": None, "five": 5.0}
"""Each variant of the data, and its mean number of features of a sample; None: what the published code gives, .97."""
FOUND = 0.99
"""An MMCS from here on counts as having found the features."""
ALIVE = 10
"""A latent is alive if it fires more often than this on the samples measured."""
ALPHAS = tuple(round(10 ** (k / 4), 3) for k in range(-8, 8, 2))
SIZES = (256, 512, 1024, 2048)
"""The default grid: every other α of the first 16 of the published 10^(k/4), k = -8…8, and the smaller sizes of the
published 512·2^k, k = -2…5."""
WEIGHTS = 1_000_000
"""Added to a run's seed for its SAE's weights. From the same seed as the features they would *be* the features: both
begin with normal numbers of the same stream."""
POOL = 8
"""Batches that a round of resampling looks at."""


@dataclass(frozen=True)
class Recipe:
    """Data, model, loss and schedule; the defaults are the published ones.

    active       mean number of features of a sample; None: as coded.
    rule         "published" (ReLU with L1), "topk", "batch_topk", "gated".
    coefficient  α of "published", k of "topk" and "batch_topk", the gate's l1 of "gated".
    resample     steps between two rounds of resampling at what the reconstruction lacks; 0: none.
    resample_until  share of the steps with such rounds.
    dead_steps   steps without firing after which a latent is resampled.
    decay        share of the steps over which the rate falls to 0, by a cosine; 0: constant.
    every        steps between two measurements of MMCS.
    measured     samples on which FVU, L0 and firings are measured, after training.
    """

    active: float | None = None
    d: int = 256
    features: int = 512
    d_sae: int = 512
    batch_size: int = 4096
    rule: str = "published"
    coefficient: float = 1.0
    lr: float = 1e-3
    steps: int = 1000
    decay: float = 0.0
    resample: int = 0
    resample_until: float = 0.5
    dead_steps: int = 10
    every: int = 100
    measured: int = 262_144


# -- data -------------------------------------------------------------------------------------------------------------


class Features:
    """The true directions (features, d), unit rows, and samples of their sparse sums; all drawn from one seed."""

    def __init__(self, recipe: Recipe, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.directions = unit_rows(recipe.features, recipe.d, torch.float32, self.generator)
        self.p = 5 / 512 * 0.99 ** torch.arange(recipe.features, dtype=torch.float64)
        if recipe.active is not None:
            self.p *= recipe.active / self.p.sum()

    def codes(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Which features are on, and their sizes in U(0, 1): (sample, feature, size), each (nnz,), feature ascending.

        Each feature is on in each sample with its probability, independently. Only what is on is drawn, which takes a
        tenth of the time of n × features uniform numbers: how many samples each feature is on in, then which.
        """
        g, features = self.generator, len(self.p)
        counts = torch.binomial(torch.full_like(self.p, n), self.p, generator=g).long()
        keys, missing = counts.new_empty(0), counts
        while bool(missing.any()):  # a sample drawn twice for a feature counts once, and another one is drawn
            feature = torch.arange(features).repeat_interleave(missing)
            keys = torch.cat([keys, feature * n + torch.randint(n, feature.shape, generator=g)]).unique()
            missing = counts - torch.bincount(keys // n, minlength=features)
        return keys % n, keys // n, torch.rand(len(keys), generator=g)

    def samples(self, n: int) -> Tensor:
        """n samples (n, d), float32, without noise."""
        sample, feature, size = self.codes(n)
        x = torch.zeros(n, self.directions.shape[1])
        return x.index_add_(0, sample, self.directions[feature] * size[:, None])


# -- model, loss and schedule -----------------------------------------------------------------------------------------


def new_sae(recipe: Recipe, seed: int) -> SparseAutoencoder:
    """The SAE before training. "published": nn.Linear's initial encoder, the orthogonal decoder with unit rows."""
    rules: dict[str, Callable[[], Activation]] = {
        # The published loss averages the error over d and the acts over M; fastsae's sums both, so d times as much.
        "published": lambda: ReLU(l1=recipe.coefficient * recipe.d / recipe.d_sae, weighted=False),
        "topk": lambda: TopK(int(recipe.coefficient)),
        "batch_topk": lambda: BatchTopK(int(recipe.coefficient)),
        "gated": lambda: Gated(l1=recipe.coefficient),
    }
    published = recipe.rule == "published"
    sae = SparseAutoencoder(
        recipe.d, recipe.d_sae, rules[recipe.rule](), pre_bias=False, seed=WEIGHTS + seed,
        # The published code divides rows by their norm after a step, and does not project gradients: see `train`.
        decoder_norm="free" if published else "unit", dead_after=recipe.dead_steps * recipe.batch_size,
    )  # fmt: skip
    if published:
        g = torch.Generator().manual_seed(WEIGHTS + seed)
        assert sae.W_enc is not None
        with torch.no_grad():
            nn.init.orthogonal_(W := torch.empty(recipe.d, recipe.d_sae), generator=g)
            sae.W_dec.copy_(W.T)
            normalize_rows_(sae.W_dec)
            for parameter in (sae.W_enc, sae.b_enc):
                nn.init.uniform_(parameter, -(recipe.d**-0.5), recipe.d**-0.5, generator=g)
    return sae


def train(
    recipe: Recipe, features: Features, seed: int, advance: Callable[[], object] = lambda: None
) -> tuple[SparseAutoencoder, dict[int, float]]:
    """A trained SAE, and MMCS by the number of steps done; `advance()` is called after every step.

    Trained by fused steps, one SAE after the other: N·M is above `BATCH_WORTH`, where they are faster than an SAEBatch.
    """
    sae = new_sae(recipe, seed)
    published = recipe.rule == "published"
    schedule = Schedule(recipe.steps, decay="cosine", decay_fraction=recipe.decay) if recipe.decay else None
    # The loss is d times the published one, and so are its gradients; Adam's steps are the same with d times the eps.
    step = FusedTrainStep(sae, recipe.lr, eps=1e-8 * recipe.d if published else 1e-8, schedule=schedule)
    curve = {}
    for i in range(1, recipe.steps + 1):
        step(features.samples(recipe.batch_size))
        with torch.no_grad():
            if published:
                normalize_rows_(sae.W_dec)
            # There is no decoder bias. A fused step trains every parameter, but this one is 0 whenever it is read.
            sae.b_dec.zero_()
        if recipe.resample and i % recipe.resample == 0 and i <= recipe.resample_until * recipe.steps:
            x = features.samples(POOL * recipe.batch_size)
            with torch.no_grad():
                rest = x - sae(x).recon
            resample_(sae, rest, step, encoder_norm=1.0, seed=i)
        if i % recipe.every == 0 or i == recipe.steps:
            curve[i] = float(max_cosines(features.directions, sae.W_dec.detach()).mean())
        advance()
    return sae.eval(), curve


def measure(recipe: Recipe, features: Features, sae: SparseAutoencoder) -> dict[str, float]:
    """mmcs and found (share above .9) over true features; fvu, l0 and alive (latents) on fresh samples."""
    best = max_cosines(features.directions, sae.W_dec.detach())
    result = evaluate(sae, (features.samples(n) for n in _blocks(recipe.measured, recipe.batch_size)))
    return {
        "mmcs": round(float(best.mean()), 5),
        "found": round(float((best > SAME).double().mean()), 5),
        "fvu": round(result.fvu, 6),
        "l0": round(result.l0, 4),
        "alive": int(((result.density * result.n_tokens).round() > ALIVE).sum()),
    }


def _blocks(n: int, size: int) -> Iterator[int]:
    yield from (min(size, n - start) for start in range(0, n, size))


# -- experiments ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """A cell of a grid, trained on the first seed only, or a recipe whose steps are counted, on every seed."""

    title: str
    variant: str
    recipe: Recipe
    cell: bool

    @property
    def settings(self) -> dict[str, Any]:
        return asdict(self.recipe)

    def used(self, seeds: int) -> int:
        return 1 if self.cell else seeds

    def steps(self, seeds: int) -> int:
        """Steps of training, over all seeds."""
        return self.used(seeds) * self.recipe.steps

    def seconds(self, seeds: int) -> float:
        """About how long it takes here: 4 dense products of a batch with the encoder for every step.

        A step of few active latents takes 2 to 3 products on a CPU, one of many, as at the start or at a small α, 6 to
        10.
        """
        multiplications = self.recipe.batch_size * self.recipe.d * self.recipe.d_sae
        return 4 * self.steps(seeds) * multiplications * seconds_per_multiplication()

    def lacking(self) -> str | None:
        return None

    def perform(self, seeds: Sequence[int], advance: Callable[[], object], folder: Path) -> dict[str, Any]:
        """Trains and measures; returns the record to store.

        The record: lists with one number for each seed of what `measure` gives; curve, MMCS by steps; steps_to_found,
        the first measured number of steps with MMCS >= FOUND, or None; and of a cell what `compare` gives. Cells keep
        their dictionaries in the folder's subfolder "cache".
        """
        measured: dict[str, list[Any]] = {}
        first: Tensor | None = None
        for seed in seeds[: self.used(len(seeds))]:
            features = Features(self.recipe, seed)
            sae, curve = train(self.recipe, features, seed, advance)
            found = next((steps for steps, mmcs in curve.items() if mmcs >= FOUND), None)
            first = sae.W_dec.detach().clone() if first is None else first
            numbers = {
                **measure(self.recipe, features, sae),
                "curve": {str(steps): round(mmcs, 5) for steps, mmcs in curve.items()},
                "steps_to_found": found,
            }
            for name, value in numbers.items():
                measured.setdefault(name, []).append(value)
        assert first is not None
        about = {"title": self.title, "variant": self.variant}
        compared = compare(self, first, folder / "cache") if self.cell else {}
        return {**about, **measured, **compared}


@functools.cache
def seconds_per_multiplication() -> float:
    """Of a multiplication and an addition in a dense product here, now."""
    x, W = torch.randn(4096, 256), torch.randn(256, 512)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        _ = x @ W
        times.append(time.perf_counter() - start)
    return sorted(times)[2] / (x.numel() * W.shape[1])


def compare(cell: Experiment, dictionary: Tensor, cache: Path) -> dict[str, Any]:
    """Saves a cell's dictionary (M, D), and compares it with that of the next larger cell of the same α, if any.

    Returns {"next_larger": what `likeness` gives}; {} without such a cell.
    """
    path = cache / f"{cell_name(cell.variant, cell.recipe)}.safetensors"
    path.parent.mkdir(exist_ok=True)
    steps = {"steps": str(cell.recipe.steps)}
    replace_file(path, lambda partial: save_file({"W_dec": dictionary.contiguous()}, partial, metadata=steps))
    larger = path.with_name(f"{cell_name(cell.variant, _larger(cell.recipe))}.safetensors")
    if not larger.exists():
        return {}
    with safe_open(larger, framework="pt") as file:
        if file.metadata() != steps:  # left by a run with other settings
            return {}
        other = file.get_tensor("W_dec")
    return {"next_larger": likeness(dictionary, other)}


def cell_name(variant: str, recipe: Recipe) -> str:
    return f"{variant}-a{recipe.coefficient:g}-m{recipe.d_sae}"


def _larger(recipe: Recipe) -> Recipe:
    return replace(recipe, d_sae=2 * recipe.d_sae)


_FAST: dict[str, Any] = {
    "rule": "topk", "lr": 5e-3, "decay": 0.5, "steps": 240, "resample": 20, "resample_until": 0.7, "dead_steps": 20,
    "every": 10,
}  # fmt: skip
SOONER: dict[str, dict[str, dict[str, Any]]] = {
    "coded": {"published": {"coefficient": 0.316}, "topk": {**_FAST, "coefficient": 2}},
    "five": {"published": {"coefficient": 0.316}, "topk": {**_FAST, "coefficient": 8}},
}
"""For each variant, the recipes whose steps are counted, by rule; all with 1,024 latents."""
RULES = {"published": "published recipe", "topk": "TopK", "batch_topk": "BatchTopK", "gated": "Gated"}


def experiments(quick: bool = False, steps: int = Recipe.steps) -> dict[str, Experiment]:
    """Every experiment by name: the counted recipes, then the grids, larger dictionaries first.

    quick: a few steps on few features, whose figures mean nothing, and two by two cells. steps: at most so many in
    every experiment; fewer than 1 raise ValueError.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    found = {}
    for variant, active in VARIANTS.items():
        for rule, changes in SOONER[variant].items():
            recipe = replace(Recipe(active=active, d_sae=1024), **changes)
            found[f"steps-{variant}-{rule}"] = Experiment(f"{variant}, {RULES[rule]}", variant, recipe, False)
    alphas, sizes = (ALPHAS[3:5], SIZES[:2]) if quick else (ALPHAS, SIZES)
    for variant, active in VARIANTS.items():
        for alpha in alphas:
            for size in sorted(sizes, reverse=True):
                recipe = Recipe(active=active, coefficient=alpha, d_sae=size)
                title = f"{variant}, α = {alpha:g}, {size} latents"
                found[cell_name(variant, recipe)] = Experiment(title, variant, recipe, True)
    if quick:
        small: dict[str, Any] = {"d": 32, "features": 48, "batch_size": 256, "steps": 20, "measured": 2048, "every": 5}
        tiny = {
            name: replace(one, recipe=replace(one.recipe, **small, d_sae=one.recipe.d_sae // 16))
            for name, one in found.items()
        }
        found = {cell_name(one.variant, one.recipe) if one.cell else name: one for name, one in tiny.items()}
    limited = {name: replace(one.recipe, steps=min(steps, one.recipe.steps)) for name, one in found.items()}
    return {name: replace(one, recipe=limited[name]) for name, one in found.items()}
