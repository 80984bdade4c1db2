"""Tables and pictures of the `interpretable_directions` system."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastsae.systems.interpretable_directions import toy
from fastsae.systems.interpretable_directions.toy import FOUND, RULES, VARIANTS, Experiment
from fastsae.systems.page import About
from fastsae.systems.pictures import MUTED, palette, panels, save, styled
from fastsae.systems.results import Table, median
from fastsae.systems.runner import System

DATA = {"coded": "0.97 features on average", "five": "5 features on average"}
FIRST = "mmcs.png"
GRIDS = {"mmcs": "MMCS of the true features", "found": "share of them above .9", "fvu": "FVU", "l0": "L0",
         "alive": "latents alive"}  # fmt: skip


def _cells(records: Mapping[str, Any], variant: str) -> dict[tuple[float, int], Mapping[str, Any]]:
    """The records of a variant's grid by (α, latents)."""
    recipes = {name: (r, r["settings"]) for name, r in records.items() if not name.startswith("steps-")}
    return {
        (settings["coefficient"], settings["d_sae"]): record
        for record, settings in recipes.values()
        if record["variant"] == variant
    }


def _counted(records: Mapping[str, Any], variant: str) -> dict[str, Mapping[str, Any]]:
    """The records of a variant's counted recipes, by rule."""
    named = {rule: f"steps-{variant}-{rule}" for rule in RULES}
    return {rule: records[name] for rule, name in named.items() if name in records}


def _steps(records: Mapping[Any, Mapping[str, Any]]) -> str:
    """ "3,000 batches of 4,096", or from the fewest to the most."""
    steps = sorted({record["settings"]["steps"] for record in records.values()})
    batches = sorted({record["settings"]["batch_size"] for record in records.values()})
    return " – ".join(f"{n:,}" for n in steps[:: max(1, len(steps) - 1)]) + f" batches of {batches[-1]:,}"


def _number(value: float, name: str) -> str:
    return f"{value:,.0f}" if name == "alive" else f"{value:.2f}" if name == "l0" else f"{value:.3f}"


def tables(records: Mapping[str, Any]) -> list[Table]:
    """For each variant of the data the counted recipes, then the published recipe's grid."""
    found = []
    for variant in VARIANTS:
        if counted := _counted(records, variant):
            found.append(_counted_table(counted, variant))
        if cells := _cells(records, variant):
            found.append(_grid_table(cells, variant))
    return found


def _counted_table(counted: Mapping[str, Mapping[str, Any]], variant: str) -> Table:
    header = [f"{DATA[variant]}, by seed", f"batches to MMCS {FOUND:g}", "batches in all", "MMCS at the end",
              "above .9", "FVU", "L0"]  # fmt: skip
    lines = []
    for rule, record in counted.items():
        settings = record["settings"]
        reached = ", ".join("never" if steps is None else f"{steps:,}" for steps in record["steps_to_found"])
        ends = [", ".join(f"{value:.3f}" for value in record["mmcs"])]
        others = [_number(median(record[name]), name) for name in ("found", "fvu", "l0")]
        name = f"{RULES[rule]}, {'α' if rule == 'published' else 'l1' if rule == 'gated' else 'k'} = "
        lines.append([
            f"{name}{settings['coefficient']:g}, {settings['d_sae']:,} latents", reached, f"{settings['steps']:,}",
            *ends, *others,
        ])  # fmt: skip
    return Table(header, lines)


def _grid_table(cells: Mapping[tuple[float, int], Mapping[str, Any]], variant: str) -> Table:
    alphas, sizes = (sorted({key[i] for key in cells}) for i in range(2))
    header = [f"{DATA[variant]}, {_steps(cells)}, α =", *(f"{alpha:g}" for alpha in alphas)]
    lines = []
    for name, title in GRIDS.items():
        for size in sizes:
            row = [cells.get((alpha, int(size))) for alpha in alphas]
            lines.append(
                [f"{title}, {size:,} latents", *("-" if r is None else _number(r[name][0], name) for r in row)]
            )
    for name, title in (("mmcs", "MMCS"), ("matched", "one-to-one"), ("matched_same", "one-to-one, above .9")):
        for size in sizes:
            row = [cells.get((alpha, int(size)), {}).get("next_larger") for alpha in alphas]
            if any(row):
                shown = ["-" if r is None else _number(r[name], name) for r in row]
                lines.append([f"{title} to twice the latents, {size:,}", *shown])
    return Table(header, lines)


# -- pictures ---------------------------------------------------------------------------------------------------------


def draw_one(name: str, experiment: Experiment, shown: None, folder: Path) -> None:
    """Nothing: a cell's picture is its place in the heat maps."""


@styled
def draw_all(records: Mapping[str, Any], folder: Path) -> None:
    """mmcs.png: MMCS over α × latents, a heat map for each variant; steps.png: MMCS against steps, by recipe."""
    grids = {variant: cells for variant in VARIANTS if (cells := _cells(records, variant))}
    if grids:
        figure, axes = panels(len(grids), columns=len(grids), size=(4.2, 2.6))
        for one, (variant, cells) in zip(axes, grids.items(), strict=True):
            alphas, sizes = sorted({a for a, _ in cells}), sorted({m for _, m in cells})
            values = torch.full((len(sizes), len(alphas)), float("nan"))
            for (alpha, size), record in cells.items():
                value = record["mmcs"][0]
                i, j = sizes.index(size), alphas.index(alpha)
                values[i, j] = value
                one.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black",
                         fontsize=8)  # fmt: skip
            one.imshow(values, vmin=0, vmax=1, cmap="viridis", origin="lower", aspect="auto")
            one.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
            one.set_yticks(range(len(sizes)), [str(size) for size in sizes])
            one.set_xlabel("α")
            one.set_ylabel("latents")
            one.set_title(f"{DATA[variant]}\n{_steps(cells)}")
        figure.suptitle("MMCS of the 512 true features, published recipe", fontsize=9.5)
        save(figure, folder / FIRST)
    counted = {variant: found for variant in VARIANTS if (found := _counted(records, variant))}
    if counted:
        figure, axes = panels(len(counted), columns=len(counted), size=(3.6, 2.8))
        for one, (variant, found) in zip(axes, counted.items(), strict=True):
            for colour, (rule, record) in zip(palette(len(found)), found.items(), strict=True):
                for i, curve in enumerate(record["curve"]):
                    one.plot([int(steps) for steps in curve], list(curve.values()), color=colour, linewidth=1.2,
                             label=RULES[rule] if i == 0 else None)  # fmt: skip
            one.axhline(FOUND, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
            one.set_xscale("log")
            one.xaxis.set_major_formatter("{x:g}")
            one.set_ylim(0, 1.02)
            one.set_xlabel("batches")
            one.set_ylabel("MMCS of the true features")
            one.set_title(DATA[variant])
            one.legend(fontsize=8)
        save(figure, folder / "steps.png")


def result(records: Mapping[str, Any]) -> str:
    """How soon TopK finds the coded data's features, and how far the published recipe is by then."""
    counted = _counted(records, "coded")
    if not {"topk", "published"} <= set(counted):
        return ""
    ours, theirs = counted["topk"], counted["published"]
    reached = [steps for steps in ours["steps_to_found"] if steps is not None]
    when = f" after {median(reached):,.0f} batches (median)" if reached else ""
    steps = {name: record["settings"]["steps"] for name, record in counted.items()}
    return (
        f"As coded ({DATA['coded']}), TopK reaches an MMCS of {FOUND:g} on {len(reached)} of {len(ours['mmcs'])} "
        f"seeds{when} and ends at {median(ours['mmcs']):.3f}; the published recipe is at {median(theirs['mmcs']):.3f} "
        f"after {steps['published']:,} batches."
    )


ABOUT = About(
    title="How many known directions an SAE finds",
    sources={
        "Sharkey, Braun & Millidge 2022, Taking features out of superposition": "https://www.lesswrong.com/posts/"
        "z6QQJbtpkEAX3Aojj/interim-research-report-taking-features-out-of-superposition",
        "HoagyC/sparse_coding (public code of Cunningham et al.)": "https://github.com/HoagyC/sparse_coding",
        "Cunningham et al. 2023, Sparse Autoencoders Find Highly Interpretable Features": "https://arxiv.org/abs/2309.08600",
    },
    claim="An autoencoder with an L1 penalty recovers the directions that its data was made from: with the right "
    "penalty and enough latents, the mean largest cosine between true and learned directions (MMCS) is close to 1.",
    here="Samples are sparse sums of 512 random unit directions in 256 dimensions, without noise; an SAE has untied "
    "weights and an encoder bias. A grid of L1 weights α and sizes has the published recipe as the public code has "
    "it, one seed a cell. Two variants of the data: as coded, with 0.97 directions on in a sample on average, and "
    "scaled to the 5 that its settings name. Beside the grid stands a recipe that finds the directions in fewer "
    "steps: TopK with a falling rate, whose unused latents are resampled at what the reconstruction lacks; its "
    "constants were chosen on another seed.",
    pictures={
        FIRST: "MMCS of the true directions by L1 weight α and number of latents, published recipe.",
        "steps.png": "MMCS against batches: a line for each seed; dashed: the goal of 0.99.",
    },
    unverified=[
        "The number of steps of the published toy is not given.",
        "No published figure stands beside ours: the results on this toy are published as heat maps, not as numbers.",
        "The publications' parts on language models (autointerpretation, indirect object identification, circuits) "
        "are not reproduced.",
    ],
    result=result,
)
SYSTEM = System(
    about=ABOUT,
    experiments=toy.experiments,
    settings=lambda experiment: experiment.settings,
    ticks=lambda experiment, seeds: experiment.steps(seeds),
    perform=toy.perform,
    draw_one=draw_one,
    draw_all=draw_all,
    tables=tables,
    unit="batch",
    seeds=3,
    scale={"steps": toy.Recipe.steps},
    seconds=lambda experiment, seeds: experiment.seconds(seeds),
)
