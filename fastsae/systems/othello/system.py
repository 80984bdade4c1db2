"""Which squares of the board a small Othello model has latents for, by recipe of the SAE; probes are the measure.

The model is trained here, on random games. A linear probe says of each pair of square and class (empty, own, enemy)
whether its layer's activations tell it; an SAE finds a pair if one of its latents alone tells it, both by an area under
the ROC curve above .9. The figure is the share of the pairs that the probe finds that the SAE finds too, each latent
chosen on one half of the games and measured on the other.

Source: the public code RobertHuben/othellogpt_sparse_autoencoders; metrics also of Karvonen et al. 2024. The published
figures are of another model (8 blocks, d = 512): shares may be set beside each other, counts may not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastsae.atomic import replace_file
from fastsae.systems.othello import game, language, metrics, probes, saes
from fastsae.systems.results import key_of

PUBLISHED = {"probes": 180, "sae": 9, "untied": 33}
"""Pairs found, of 192: by probes; by the SAE of layer 6; by untied weights and earlier layers."""


@dataclass(frozen=True)
class Scale:
    """How large everything is; each can be given as `--scale games=40000`.

    blocks, d      of the model.
    games          that the model is trained on.
    read           games that probes and SAEs are trained on.
    scored         games that everything is scored on, half of them to choose by.
    epochs         passes of the SAEs over the games that they read. Published: 4, of many more games.
    probe_epochs   of the probes.
    """

    blocks: int = 6
    d: int = 128
    games: int = 200_000
    read: int = 10_000
    scored: int = 2_000
    epochs: int = 12
    probe_epochs: int = 8

    @property
    def model(self) -> language.Recipe:
        return language.Recipe(blocks=self.blocks, d=self.d, games=self.games)

    @property
    def layer(self) -> int:
        """The layer that takes the place of the published one, 6 of 8."""
        return max(1, 3 * self.blocks // 4)

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if self.scored < 2:
            raise ValueError(f"scored is {self.scored}, expected at least 2: one half chooses, the other measures")


QUICK = Scale(blocks=2, d=32, games=640, read=48, scored=32, epochs=2, probe_epochs=2)


# -- the model and its activations, cached ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Boards:
    """Games with a layer's activations: x float16 (G, 52, D), labels uint8 (G, 52, 64), running bool (G, 52)."""

    x: Tensor
    labels: Tensor
    running: Tensor

    def half(self, second: bool, scores: Callable[[Tensor], Tensor]) -> metrics.Half:
        """The running boards of the first or second half of the games, with their scores."""
        x, labels, running = (t.tensor_split(2)[second] for t in (self.x, self.labels, self.running))
        return metrics.Half(scores(x[running].float()), metrics.positives(labels[running]))


def _cached(cache: Path, kind: str, scale: Scale) -> Path:
    return cache / f"{kind}-{key_of([asdict(scale.model), scale.read, scale.scored])}.safetensors"


def boards(scale: Scale, layer: int, cache: Path) -> tuple[Boards, Boards]:
    """The games to learn from and those to score on, at a layer, through `cache`."""
    path, activations = _cached(cache, "games", scale), _cached(cache, "activations", scale)
    if not (path.exists() and activations.exists()):
        model, _ = language.trained(scale.model, cache)
        games: dict[str, Tensor] = {}
        layers: dict[str, Tensor] = {}
        for name, n, seed in (
            ("read", scale.read, language.READ_GAMES),
            ("scored", scale.scored, language.SCORED_GAMES),
        ):
            tokens = torch.cat(list(game.stream(n, seed, n)))
            games[f"{name}.labels"], games[f"{name}.running"] = game.labels(tokens)
            layers |= {f"{name}.{i + 1}": x for i, x in enumerate(language.activations(model, tokens))}
        replace_file(activations, lambda partial: save_file(layers, partial))
        replace_file(path, lambda partial: save_file(games, partial))
    stored = load_file(path)
    with safe_open(activations, "pt") as file:
        return tuple(  # type: ignore[return-value]
            Boards(file.get_tensor(f"{name}.{layer}"), stored[f"{name}.labels"], stored[f"{name}.running"])
            for name in ("read", "scored")
        )


# -- experiments ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """What to run: "model", "probe" or "sae", at a layer. seeds: how many of those asked for; 0: all."""

    title: str
    kind: str
    scale: Scale
    layer: int = 0
    recipe: saes.Recipe = field(default_factory=saes.Recipe)
    seeds: int = 0

    @property
    def probe(self) -> probes.Recipe:
        return probes.Recipe(epochs=self.scale.probe_epochs)

    @property
    def settings(self) -> dict[str, Any]:
        more = {"probe": {"probe": asdict(self.probe)}, "sae": {"sae": asdict(self.recipe)}}.get(self.kind, {})
        read = {} if self.kind == "model" else {"read": self.scale.read, "layer": self.layer}
        return {"model": asdict(self.scale.model), "scored": self.scale.scored, **read, **more}

    def used(self, seeds: int) -> int:
        return min(seeds, self.seeds or seeds) if self.kind == "sae" else 1

    def steps(self, seeds: int) -> int:
        """Steps of training, over all seeds."""
        if self.kind == "model":
            return self.scale.model.steps
        recipe = self.probe if self.kind == "probe" else self.recipe
        return self.used(seeds) * recipe.epochs * -(-self.scale.read // recipe.batch)

    def seconds(self, seeds: int) -> float:
        """Expected on one idle core. An estimate from steps timed at d = 128; the model's grow as blocks·d²."""
        scale, d = self.scale, self.scale.d / 128
        if self.kind == "model":
            return self.steps(seeds) * 0.022 * scale.blocks * max(d, d * d)
        scoring = 20e-6 * scale.scored * self.recipe.ratio * scale.d
        if self.kind == "probe":
            return self.steps(seeds) * 0.02 * d + scoring / 4
        return self.steps(seeds) * STEP[self.recipe.rule] * d * d + self.used(seeds) * scoring


STEP = {"published": 0.015, "l1": 0.02, "topk": 0.015, "batch_topk": 0.02, "jumprelu": 0.035}
"""Seconds of a step of 16 games at d = 128 and M = 512."""

GRID: dict[str, dict[str, Any]] = {
    "l1": {"alpha": 1.0},
    "topk": {},
    "batch_topk": {},
    "jumprelu": {},
}
"""The rules of the grid, tied and untied; all but L1 have the same number of active latents."""
CANDIDATE: dict[str, Any] = {"rule": "topk", "tied": False, "lr": 3e-3, "decay": True, "centre": True}
"""A change of the published recipe that finds more, with 32 active latents: 24 do about as well, 64 and more find few.
A third of the rate, or of the passes, finds half as many. Chosen on the choosing half of the scored games, see LOG.md.
"""


def experiments(quick: bool = False, **changes: int) -> dict[str, Experiment]:
    """Every experiment by name, in order. quick: so small that figures mean nothing. changes: of the `Scale`."""
    scale = replace(QUICK if quick else Scale(), **changes)
    plain = saes.Recipe(epochs=scale.epochs, k=min(32, scale.d))
    found = {"model": Experiment("the model", "model", scale)}
    layers = range(1, scale.blocks + 1)
    for layer in layers:
        found[f"probe-{layer}"] = Experiment("linear probe", "probe", scale, layer)
    named: dict[str, tuple[str, saes.Recipe, int]] = {
        "faithful": ("published recipe", plain, 0),
        "mended": ("published, each latent normalized", replace(plain, norm="latents"), 1),
        "candidate": ("candidate recipe", replace(plain, **CANDIDATE), 0),
    }
    for rule, more in GRID.items():
        for tied in (True, False):
            key = f"{rule}-{'tied' if tied else 'untied'}"
            named[key] = (key.replace("_", " ").replace("-", ", "), replace(plain, rule=rule, tied=tied, **more), 1)
    for layer in layers:
        for key, (title, recipe, seeds) in named.items():
            found[f"{key}-{layer}"] = Experiment(title, "sae", scale, layer, recipe, seeds)
    return found


# -- running one ------------------------------------------------------------------------------------------------------


def _numbers(values: Tensor) -> dict[str, str]:
    """192 areas as text, the 64 squares of each class: a JSON file with a number a line would be ten times as long."""
    classes = zip(game.CLASSES, values.view(len(game.CLASSES), game.SQUARES).tolist(), strict=True)
    return {name: " ".join(f"{value:.4f}" for value in squares) for name, squares in classes}


def numbers(stored: dict[str, str]) -> Tensor:
    """The 192 areas of a record."""
    return torch.tensor([float(value) for name in game.CLASSES for value in stored[name].split()])


def perform(
    experiment: Experiment, seeds: Sequence[int], advance: Callable[[], object], folder: Path
) -> tuple[dict[str, Any], None]:
    """Runs an experiment; returns the record to store. There are no pictures of one alone."""
    run = {"model": run_model, "probe": run_probe, "sae": run_saes}[experiment.kind]
    record = run(experiment, list(seeds)[: experiment.used(len(seeds))], advance, folder / "cache")
    about = {"title": experiment.title, "kind": experiment.kind, "layer": experiment.layer}
    return {**about, "main_layer": experiment.scale.layer, **record}, None


def run_model(
    experiment: Experiment, seeds: Sequence[int], advance: Callable[[], object], cache: Path
) -> dict[str, Any]:
    """Trains the model, or loads it, and says how often its moves are legal on games that it has not seen."""
    scale = experiment.scale
    model, losses = language.trained(scale.model, cache, advance)
    tokens = torch.cat(list(game.stream(scale.scored, language.SCORED_GAMES, scale.scored)))
    parameters = sum(p.numel() for p in model.parameters())
    return {"legal": language.legal_rate(model, tokens), "losses": losses, "parameters": parameters}


def run_probe(
    experiment: Experiment, seeds: Sequence[int], advance: Callable[[], object], cache: Path
) -> dict[str, Any]:
    """Trains a probe; its areas are those of the second half of the scored games, as the SAEs' are."""
    read, scored = boards(experiment.scale, experiment.layer, cache)
    probe = probes.train(experiment.probe, read.x, read.labels, read.running, advance)
    selected, held_out = (metrics.own_areas(scored.half(second, probe.scores)) for second in (False, True))
    return {"selected": int(metrics.found(selected).sum()), "areas": [_numbers(held_out)]}


def run_saes(
    experiment: Experiment, seeds: Sequence[int], advance: Callable[[], object], cache: Path
) -> dict[str, Any]:
    """Trains and scores an SAE for each seed: lists with one entry for each."""
    read, scored = boards(experiment.scale, experiment.layer, cache)
    record: dict[str, list[Any]] = {name: [] for name in ("selected", "areas", "boards", "measures")}
    for seed in seeds:
        trained = saes.train(experiment.recipe, read.x, read.running, seed, advance)
        selection, held_out = (scored.half(second, trained.acts) for second in (False, True))
        _, chosen_by, area = metrics.areas(selection, held_out)
        record["selected"].append(int(metrics.found(chosen_by).sum()))
        record["areas"].append(_numbers(area))
        record["boards"].append(metrics.board_scores(selection, held_out))
        x = scored.x.tensor_split(2)[1][scored.running.tensor_split(2)[1]].float()
        record["measures"].append(trained.measures(x, held_out.scores))
    return record
