"""Every experiment of this system by name: the toy, then residual streams and prompts of a language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from fastsae.systems import one_layer
from fastsae.systems.interpretable_directions import frontier, ioi, toy
from fastsae.systems.interpretable_directions.models import FRAMES, Scale
from fastsae.systems.interpretable_directions.saes import RULES, Recipe

BEYOND = ("topk", "gated")
"""The rules that are compared with the published recipe at equal L0. The frontier chooses one on held-out rows."""
CHANGED = {name: getattr(Scale, name) for name in
           ("model", "text", "layer", "rows", "passes", "tokens", "prompts", "taus")}  # fmt: skip
"""The sizes of a `Scale` that a user may change."""
SMALL: dict[str, Any] = {
    "model": FRAMES, "text": "", "layer": 2, "rows": 100_000, "passes": 10, "holdout": 4096, "ratio": 4,
    "l0s": (), "patched": (4, 16), "prompts": 50, "taus": 50,
}  # fmt: skip
"""The scale of the small model, where it stands beside another one; its patching is cheap, so it is as published."""
QUICK = Scale(
    FRAMES, "", layer=1, rows=3000, passes=1, tokens=320, prompts=4, taus=2, holdout=512, ratios=(1, 2), l0s=(4,),
    patched=(4,), small=one_layer.Recipe(blocks=2, d=16, mlp=32, heads=2, window=32, batch=8, steps=20),
)  # fmt: skip


class Experiment(Protocol):
    """What the runner asks of an experiment; see `runner.System`."""

    @property
    def settings(self) -> dict[str, Any]: ...
    def steps(self, seeds: int) -> int: ...
    def seconds(self, seeds: int) -> float: ...
    def lacking(self) -> str | None: ...
    def perform(self, seeds: Sequence[int], advance: Callable[[], object], folder: Path) -> dict[str, Any]: ...


def experiments(quick: bool = False, steps: int = toy.Recipe.steps, **changes: int | str) -> dict[str, Experiment]:
    """Every experiment by name, in order. steps: of the toy. changes: of the `Scale`, for both models where they fit.

    quick: the toy on a few features, and a tiny model that is hardly trained; the figures mean nothing.
    """
    scale = replace(QUICK if quick else Scale(), **changes)  # type: ignore[arg-type]
    found: dict[str, Experiment] = {**toy.experiments(quick, steps), **on_stream(scale, "")}
    if scale.model != FRAMES:
        fixed = {name: value for name, value in changes.items() if name not in SMALL}
        found |= on_stream(replace(Scale(**SMALL), **fixed), f"{FRAMES}-")  # type: ignore[arg-type]
    return found


def on_stream(scale: Scale, prefix: str) -> dict[str, Experiment]:
    """The experiments on a model's residual stream, larger dictionaries first: the smaller are compared with them."""
    found: dict[str, Experiment] = {f"{prefix}model": ioi.Model("the model", scale)}
    for ratio in sorted(scale.ratios, reverse=True):
        for l0 in scale.l0s:
            recipe = Recipe("published", ratio, l0)
            title = f"{RULES['published']}, {ratio} latents a dimension, L0 {l0}"
            found[f"{prefix}frontier-published-r{ratio}-l{l0}"] = frontier.Experiment(
                title, scale, recipe, several=ratio == scale.ratio
            )
    for rule in BEYOND:
        for l0 in scale.l0s:
            title = f"{RULES[rule]}, {scale.ratio} latents a dimension, L0 {l0}"
            recipe = Recipe(rule, scale.ratio, l0)
            found[f"{prefix}frontier-{rule}-r{scale.ratio}-l{l0}"] = frontier.Experiment(title, scale, recipe, True)
    for method, title in ioi.PCA.items():
        found[f"{prefix}ioi-{method}"] = ioi.Experiment(title, scale, method)
    found[f"{prefix}ioi-dense"] = ioi.Experiment(RULES["dense"], scale, "sae", Recipe("dense", scale.ratio))
    for rule in ("published", *BEYOND):
        for l0 in scale.patched:
            title, recipe = f"{RULES[rule]}, L0 {l0}", Recipe(rule, scale.ratio, l0)
            found[f"{prefix}ioi-{rule}-l{l0}"] = ioi.Experiment(
                title, scale, "sae", recipe, several=scale.model == FRAMES
            )
    return found
