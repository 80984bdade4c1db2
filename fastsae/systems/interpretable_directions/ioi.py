"""The experiments on prompts with two names: what the model knows of them, and the patching of patching.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastsae.systems.interpretable_directions import saes
from fastsae.systems.interpretable_directions.models import FRAMES, Scale, in_full, prompts_of
from fastsae.systems.interpretable_directions.patching import Patched, of_sae, principal, select
from fastsae.systems.interpretable_directions.saes import Recipe
from fastsae.systems.interpretable_directions.toy import seconds_per_multiplication

TOLD = 60
"""Prompts on which the model's accuracy is measured."""
PCA = {"pca": "PCA, rotation", "pca-signed": "PCA, ± directions"}


@dataclass(frozen=True)
class Model:
    """What a scale's model is: its rows are harvested, and its accuracy on prompts is measured."""

    title: str
    scale: Scale

    @property
    def settings(self) -> dict[str, Any]:
        return {"prompts": self.scale.prompts, "told": TOLD, **self.scale.settings}

    def steps(self, seeds: int) -> int:
        return self.scale.small.steps if self.scale.model == FRAMES else 1

    def seconds(self, seeds: int) -> float:
        """About how long it takes here: SmolLM2's harvest makes 1,000 rows a second; the small model's steps count."""
        if self.scale.model != FRAMES:
            return 1e-3 * (self.scale.rows + self.scale.holdout)
        small = self.scale.small
        return 20 * small.batch * small.window * small.steps * self.scale.later * seconds_per_multiplication()

    def lacking(self) -> str | None:
        return self.scale.lacking()

    def perform(self, seeds: Sequence[int], advance: Callable[[], object], folder: Path) -> dict[str, Any]:
        """The record: rows stored; accuracy, the share of prompts after which the receiver's logit is above the
        giver's; top, after which it is the largest of all; kl, between the prompts to be patched and their targets.
        """
        material = self.scale.material(folder, advance)
        source, model = material.source(folder), in_full(material)
        told = prompts_of(model, TOLD, seed=1)
        logits = Patched(model, self.scale.layer, told).untouched
        receiver, giver, _ = told.names.T
        patched = Patched(model, self.scale.layer, prompts_of(model, self.scale.prompts))
        right, wrong = (logits.gather(1, one[:, None]) for one in (receiver, giver))
        return {
            "title": self.title,
            "kind": "model",
            "rows": source.n_tokens,
            "accuracy": round(float((right > wrong).double().mean()), 4),
            "top": round(float((logits.argmax(1) == receiver).double().mean()), 4),
            "kl": round(patched.kl(patched.x), 5),
        }


@dataclass(frozen=True)
class Experiment:
    """The selection over the latents of a recipe's SAE, or over principal components.

    method: of PCA, or "sae". several: on every seed, not on the first only.
    """

    title: str
    scale: Scale
    method: str
    recipe: Recipe | None = None
    several: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        code = {"method": self.method} if self.recipe is None else {"recipe": asdict(self.recipe)}
        done = {"passes": self.scale.passes, "prompts": self.scale.prompts, "taus": self.scale.taus}
        return {**code, **done, **self.scale.settings}

    def used(self, seeds: int) -> int:
        return seeds if self.several else 1

    @property
    def latents(self) -> int:
        per_dimension = self.recipe.ratio if self.recipe else 2 if self.method == "pca-signed" else 1
        return per_dimension * self.scale.width

    def steps(self, seeds: int) -> int:
        training = 0 if self.recipe is None else self.recipe.steps(self.scale)
        return self.used(seeds) * (training + self.scale.taus * self.latents)

    def seconds(self, seeds: int) -> float:
        """About how long it takes here: three passes through the later layers for every latent, and the training of an
        SAE that is not of the frontier.
        """
        passes = 3 * self.latents * self.scale.prompts * 18 * self.scale.later
        own = self.recipe if self.recipe and self.recipe.l0 not in self.scale.l0s else None
        training = saes.seconds(own, self.scale) if own else 0.0
        return self.used(seeds) * (passes * seconds_per_multiplication() + training)

    def lacking(self) -> str | None:
        return self.scale.lacking()

    def perform(self, seeds: Sequence[int], advance: Callable[[], object], folder: Path) -> dict[str, Any]:
        """The record: kl of nothing patched, as of `Model`; curves: of each seed the points of `select`, as text."""
        material = self.scale.material(folder)
        model = in_full(material)
        patched = Patched(model, self.scale.layer, prompts_of(model, self.scale.prompts))
        curves = []
        for seed in seeds[: self.used(len(seeds))]:
            source = material.source(folder, seed)
            if self.recipe is None:
                code = principal(source, signed=self.method == "pca-signed")
            else:
                code = of_sae(saes.trained(self.recipe, self.scale, source, seed, folder, advance))
            points = select(patched, code, self.scale.thresholds, seed, advance)
            # A line a point: a JSON file with a number a line would be five times as long.
            curves.append([" ".join(f"{value:g}" for value in point.values()) for point in points])
        about = {"title": self.title, "kind": "ioi", "method": self.method, "layer": self.scale.layer}
        made = {} if self.recipe is None else {"rule": self.recipe.rule, "asked": self.recipe.l0}
        return {**about, **made, "kl": round(patched.kl(patched.x), 5), "curves": curves}


def points(curve: Sequence[str]) -> list[dict[str, float]]:
    """The points of a stored curve, as `select` gives them."""
    names = ("tau", "latents", "kl", "edit")
    return [dict(zip(names, map(float, line.split()), strict=True)) for line in curve]
