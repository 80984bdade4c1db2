"""FVU against active latents on a residual stream: the published recipe in three sizes, and other rules beside it.

All recipes of a scale see the same rows as often, and aim at the same numbers of active latents. The rows that a
harvest drops, an attention sink and rows of a huge norm, are not among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastsae.model.files import CONFIG, load
from fastsae.model.sae import SparseAutoencoder
from fastsae.runs.evaluate import evaluate
from fastsae.systems.interpretable_directions import saes
from fastsae.systems.interpretable_directions.metrics import likeness
from fastsae.systems.interpretable_directions.models import Scale
from fastsae.systems.interpretable_directions.saes import Recipe
from fastsae.systems.interpretable_directions.toy import ALIVE, seconds_per_multiplication
from fastsae.systems.results import rounded


@dataclass(frozen=True)
class Experiment:
    """A recipe on the rows of a scale. several: on every seed, not on the first only."""

    title: str
    scale: Scale
    recipe: Recipe
    several: bool

    @property
    def settings(self) -> dict[str, Any]:
        done = {"passes": self.scale.passes, "tokens": self.scale.tokens}
        return {"recipe": asdict(self.recipe), **done, **self.scale.settings}

    def used(self, seeds: int) -> int:
        return seeds if self.several else 1

    def steps(self, seeds: int) -> int:
        return self.used(seeds) * self.recipe.steps(self.scale)

    def seconds(self, seeds: int) -> float:
        """About how long it takes here, if the rows are there: `saes.seconds`, and four passes of the whole model."""
        passes = 4 * self.scale.tokens * 2 * self.scale.later * seconds_per_multiplication()
        return self.used(seeds) * (saes.seconds(self.recipe, self.scale) + passes)

    def lacking(self) -> str | None:
        return self.scale.lacking()

    def perform(self, seeds: Sequence[int], advance: Callable[[], object], folder: Path) -> dict[str, Any]:
        """Trains and measures; returns the record to store, with one number for each seed in each list.

        fvu_chosen on the first half of the held-out rows; fvu and l0 on the second; alive: latents that fire more than
        10 times on the rows to train on; ce_..., recovered_...: what the model loses with the SAE in it; alpha: of the
        published recipe, in its own units; next_larger: of the first seed, `likeness` to twice the latents, if that
        experiment was done before.
        """
        scale, recipe = self.scale, self.recipe
        material = scale.material(folder)
        in_model = material.in_model(folder, scale.tokens)
        measured: dict[str, list[Any]] = {}
        for seed in seeds[: self.used(len(seeds))]:
            source = material.source(folder, seed)
            sae = saes.trained(recipe, scale, source, seed, folder, advance)
            first, second = source.held_out().tensor_split(2)
            result, loss = evaluate(sae, second), in_model.loss(sae)
            numbers = {
                "fvu_chosen": round(evaluate(sae, first).fvu, 5),
                "fvu": round(result.fvu, 5),
                "l0": round(result.l0, 3),
                "alive": int((saes.firings(sae, source) > ALIVE).sum()),
                "ce_untouched": round(loss.ce_untouched, 5),
                "ce_spliced": round(loss.ce_spliced, 5),
                "recovered_over_zero": rounded(loss.recovered_over_zero, 5),
                "recovered_over_mean": rounded(loss.recovered_over_mean, 5),
                **({"alpha": float(f"{saes.alpha(sae):.4g}")} if recipe.rule == "published" else {}),
            }
            for name, value in numbers.items():
                measured.setdefault(name, []).append(value)
            if seed == seeds[0]:
                compared = self._compared(sae, seed, folder)
        about = {"title": self.title, "kind": "frontier", "rule": recipe.rule, "ratio": recipe.ratio}
        return {**about, "asked": recipe.l0, **measured, **compared}

    def _compared(self, sae: SparseAutoencoder, seed: int, folder: Path) -> dict[str, Any]:
        larger = saes.path(replace(self.recipe, ratio=2 * self.recipe.ratio), self.scale, seed, folder)
        if self.recipe.rule != "published" or not (larger / CONFIG).exists():
            return {}
        return {"next_larger": likeness(sae.W_dec.detach(), load(larger).W_dec.detach())}
