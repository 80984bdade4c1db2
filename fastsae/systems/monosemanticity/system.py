"""The experiments of `monosemanticity`: SAEs over λ, sizes and rules, then what single latents do and mean."""

from __future__ import annotations

import itertools
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.data.shards import ShardSource
from fastsae.data.stream import StreamConfig
from fastsae.model.sae import SparseAutoencoder
from fastsae.systems import one_layer
from fastsae.systems.interpretable_directions.metrics import cosines
from fastsae.systems.material import Material, trained_once
from fastsae.systems.monosemanticity import causes, meaning, recipe, steering
from fastsae.systems.monosemanticity.recipe import Recipe, Scale
from fastsae.systems.results import FILE, key_of, read

NAME = "monosemanticity"
WEIGHTS = (2.0, 5.0, 10.0)
SIZES = (1024, 2048, 4096, 8192)
SHARES = (0.25, 0.5)
"""Of the rows, for the scaling law; the whole is there anyway."""
PROMPTS, PROMPT, LAST = 8, 32, 4
"""Of the comparison with ablation: prompts, tokens of each, and how many tokens at the end latents are taken from."""
STEERED, STEERING_PROMPT = 3, 12
"""Latents that are steered with, and tokens of the prompt."""
LOOKED_AT = 131_072
"""Rows on which single latents are looked at, at most."""
SPLITS = 0.7
"""Cosine from which on latents of two sizes count as relatives."""


@dataclass(frozen=True)
class Experiment:
    """kind: "sae", "causes", "steering", "meaning" or "splitting".

    recipe    of an "sae", or of the SAE that is looked at.
    like      the experiment that gives the recipe's L0; "": the recipe has its own.
    seeds     how many of those asked for; 0: all.
    """

    title: str
    kind: str
    scale: Scale
    recipe: Recipe = field(default_factory=Recipe)
    like: str = ""
    seeds: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind, "like": self.like, **asdict(self.scale), **asdict(self.recipe)}

    def lacking(self) -> str | None:
        return None if self.scale.model == TINY else self.scale.material.lacking()

    def used(self, seeds: int) -> int:
        return min(seeds, self.seeds or seeds)

    def steps(self, seeds: int) -> int:
        """Steps of training, over all seeds."""
        return self.used(seeds) * recipe.steps_of(self.recipe, self.scale) if self.kind == "sae" else 1

    def seconds(self, seeds: int) -> float:
        """Expected on one core: an estimate from runs at D = 576."""
        if self.kind != "sae":
            return 90.0
        rows, size = self.recipe.share * self.scale.rows, self.recipe.d_sae / 4096
        per_row = 2e-4 if self.recipe.rule in ("published", "gated", "jumprelu") else 7e-5
        return self.used(seeds) * (rows * per_row * size + self.scale.tokens * 4e-3)


# -- the list ---------------------------------------------------------------------------------------------------------


def experiments(quick: bool = False, **changes: Any) -> dict[str, Experiment]:
    """Every experiment by name, in order; those at λ = 5 have several seeds, the others one.

    quick: so small that figures mean nothing. changes: of the `Scale`.
    """
    scale = replace(QUICK if quick else Scale(), **changes)
    sizes = tuple(size * scale.latents // 4096 for size in SIZES)
    base = Recipe(d_sae=scale.latents)
    found: dict[str, Experiment] = {}

    def add(name: str, title: str, kind: str, one: Recipe, like: str = "", seeds: int = 0) -> None:
        found[name] = Experiment(title, kind, scale, one, like, seeds)

    several = {weight: 0 if weight == base.weight else 1 for weight in WEIGHTS}
    for weight, seeds in several.items():
        one = replace(base, weight=weight)
        add(f"lambda-{weight:g}", f"published, λ = {weight:g}", "sae", one, seeds=seeds)
    for weight, seeds in several.items():
        for rule in recipe.RULES:
            title, like = f"{rule}, L0 of λ = {weight:g}", f"lambda-{weight:g}"
            add(f"{rule}-{weight:g}", title, "sae", replace(base, rule=rule), like, seeds)
    for size in sizes:
        for share in (*SHARES, 1.0):
            if size != scale.latents or share != 1.0:
                one = replace(base, d_sae=size, share=share)
                add(
                    f"size-{size}-{share:g}", f"published, {size:,} latents, {share:.0%} of the rows", "sae", one, "", 1
                )
    for rule in ("published", "topk"):
        like = "" if rule == "published" else "lambda-5"
        for kind in ("causes", "steering", "meaning"):
            add(f"{kind}-{rule}", f"{kind}, {rule}", kind, replace(base, rule=rule), like, 1)
    add("splitting", "the same features at other sizes", "splitting", base, "", 1)
    return found


TINY = "one-layer"
"""The model of --quick: one block on bytes, trained in seconds on Python's own sources."""
QUICK = Scale(rows=2048, latents=256, batch=256, hook=1, tokens=512, model=TINY, text="python")


def material(scale: Scale, folder: Path) -> Material:
    """The activations to train on."""
    if scale.model != TINY:
        return scale.material
    library = Path(sysconfig.get_paths()["stdlib"])
    corpus = one_layer.bytes_of([library / name for name in ("argparse.py", "ast.py", "inspect.py", "typing.py")])
    shape = one_layer.Recipe(d=32, mlp=64, window=64, batch=8, steps=40)
    model, _ = one_layer.trained(shape, corpus, folder / "cache")
    stream = StreamConfig(hook=scale.hook, window=64, holdout=1024, special_tokens="keep")
    return Material(model, corpus, stream, scale.rows)


# -- running one ------------------------------------------------------------------------------------------------------


def perform(
    experiment: Experiment, seeds: Sequence[int], advance: Callable[[], object], folder: Path
) -> tuple[dict[str, Any], None]:
    """Runs an experiment; returns the record to store. There are no pictures of one alone."""
    of = material(experiment.scale, folder)
    used = seeds[: experiment.used(len(seeds))]
    run = {"sae": run_sae, "causes": run_causes, "steering": run_steering, "meaning": run_meaning,
           "splitting": run_splitting}[experiment.kind]  # fmt: skip
    return {"title": experiment.title, **run(experiment, of, used, advance, folder)}, None


def run_sae(
    experiment: Experiment, of: Material, seeds: Sequence[int], advance: Callable[[], object], folder: Path
) -> dict[str, Any]:
    """Lists with one number for each seed of what `recipe.measure` and `recipe.in_model` give."""
    held, model = of.source(folder).held_out(), of.in_model(folder, experiment.scale.tokens)
    found: dict[str, list[Any]] = {}
    for seed in seeds:
        sae = sae_of(experiment, of, seed, folder, advance)
        weight = experiment.recipe.weight
        for name, value in {**recipe.measure(sae, held, weight), **recipe.in_model(sae, model)}.items():
            found.setdefault(name, []).append(value)
    return {"rule": experiment.recipe.rule, "latents": experiment.recipe.d_sae, **found}


def sae_of(
    experiment: Experiment, of: Material, seed: int, folder: Path, advance: Callable[[], object] = lambda: None
) -> SparseAutoencoder:
    """The SAE of an experiment's recipe, trained, or read where it is trained already."""
    one = experiment.recipe
    if experiment.like:
        one = replace(one, l0=l0_of(experiment.like, seed, folder))
    key = key_of({**recipe.settings(one, experiment.scale), "seed": seed})

    def train(run: Path, after_step: Callable[[], object]) -> SparseAutoencoder:
        return recipe.train(one, experiment.scale, of.source(folder, seed), seed, run, after_step)

    return trained_once(folder / "cache" / f"sae-{key}", recipe.steps_of(one, experiment.scale), train, advance)


def l0_of(name: str, seed: int, folder: Path) -> float:
    """The L0 that an experiment of this system measured. Raises ValueError if it has not run."""
    path = folder / FILE
    stored = read(path, NAME)["experiments"] if path.exists() else {}
    if name not in stored:
        raise ValueError(f"this takes its L0 from the experiment {name}, which is not in {path}; run that one too")
    measured = stored[name]["l0"]
    return float(measured[min(seed, len(measured) - 1)])


def run_causes(
    experiment: Experiment, of: Material, seeds: Sequence[int], advance: Callable[[], object], folder: Path
) -> dict[str, Any]:
    """Means over prompts of what `causes.compare` gives, and how many prompts and latents they are of."""
    sae = sae_of(experiment, of, seeds[0], folder)
    place = of.in_model(folder, PROMPTS * max(of.stream.window, PROMPT + 1))
    model = of.language_model(torch.float32).model  # see causes.py for why
    compared: list[dict[str, float]] = []
    latents = 0
    for ids in place.ids[:PROMPTS, : PROMPT + 1]:
        found = causes.of_prompt(model, place.hook, sae, ids, LAST)
        latents += len(found.latent)
        if (numbers := causes.compare(found)) is not None:
            compared.append(numbers)
    advance()
    means = {
        name: round(sum(one[name] for one in compared) / len(compared), 4) for name in (compared[0] if compared else {})
    }
    return {"prompts": len(compared), "latents": latents, **means}


def _looked_at(source: ShardSource) -> tuple[Tensor, Tensor]:
    """(rows (n, D), tokens (n,)) of training rows, as many as LOOKED_AT."""
    ids = range(min(LOOKED_AT, source.n_tokens or 0))
    return source.rows(ids), source.token_ids(ids)


def run_steering(
    experiment: Experiment, of: Material, seeds: Sequence[int], advance: Callable[[], object], folder: Path
) -> dict[str, Any]:
    """STEERED latents with the text that is written while they are held.

    Chosen without looking at the texts: of the latents that fire on a thousandth to a hundredth of the rows, those with
    the largest share of their stronger activations on their ten top tokens, no two with the same first token.
    """
    sae, source = sae_of(experiment, of, seeds[0], folder), of.source(folder)
    place = of.in_model(folder, max(of.stream.window, STEERING_PROMPT))
    rows, tokens = _looked_at(source)
    row, latent, act = meaning.entries(sae, rows)
    starts = torch.searchsorted(latent, torch.arange(sae.d_sae + 1)).tolist()
    ranked = []
    for i in range(sae.d_sae):
        mine = slice(starts[i], starts[i + 1])
        counts = meaning.by_level(row[mine], act[mine], tokens)
        if counts is None or not 1e-3 <= (mine.stop - mine.start) / len(rows) <= 1e-2:
            continue
        counted, right = (float(part[meaning.LEVELS // 2 :].sum()) for part in counts)
        ranked.append((right / counted if counted >= meaning.LEAST else 0.0, i))
    samples, seen = [], set()
    for _, best in sorted(ranked, key=lambda one: (-one[0], one[1])):
        mine = slice(starts[best], starts[best + 1])
        strongest = tokens[row[mine][act[mine].topk(min(50, mine.stop - mine.start)).indices]]
        about = list(dict.fromkeys(steering.text_of(place.model, t[None]) for t in strongest))[:5]
        if about[0] in seen:
            continue
        seen.add(about[0])
        # `steer` sets acts, which are activations over the decoder's norm.
        largest = float(act[mine].max() / sae.W_dec[best].norm())
        ids = place.ids[0, :STEERING_PROMPT]
        samples.append(steering.sample(place, sae, ids, best, largest, about))
        if len(samples) == STEERED:
            break
    advance()
    return {"samples": samples}


def run_meaning(
    experiment: Experiment, of: Material, seeds: Sequence[int], advance: Callable[[], object], folder: Path
) -> dict[str, Any]:
    """`meaning.specificity` and, for a model with words, `meaning.concepts`."""
    sae, source = sae_of(experiment, of, seeds[0], folder), of.source(folder)
    rows, tokens = _looked_at(source)
    strings = source.vocabulary()
    found = None if strings is None else meaning.concepts(sae, rows, tokens, strings)
    advance()
    return {"specificity": meaning.specificity(sae, rows, tokens), "concepts": found}


def run_splitting(
    experiment: Experiment, of: Material, seeds: Sequence[int], advance: Callable[[], object], folder: Path
) -> dict[str, Any]:
    """For each size and the next: mean largest cosine of its latents to one there, and relatives per latent."""
    sizes = [size * experiment.scale.latents // 4096 for size in SIZES]
    decoders = []
    for size in sizes:
        one = replace(experiment, recipe=replace(experiment.recipe, d_sae=size))
        sae = sae_of(one, of, seeds[0], folder)
        decoders.append(sae.W_dec.detach()[~sae.dead])
    steps: list[Mapping[str, Any]] = []
    for (size, small), (larger, large) in itertools.pairwise(zip(sizes, decoders, strict=True)):
        near = cosines(small, large)
        relatives = (near > SPLITS).sum(1)
        steps.append({
            "from": size, "to": larger, "alive": len(small), "mmcs": round(float(near.amax(1).mean()), 4),
            "relatives": round(float(relatives.double().mean()), 4),
            "split": round(float((relatives > 1).double().mean()), 4),
        })  # fmt: skip
    advance()
    return {"steps": steps}
