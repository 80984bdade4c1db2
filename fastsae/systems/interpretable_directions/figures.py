"""Tables and pictures of the `interpretable_directions` system."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastsae.systems.interpretable_directions import ioi, saes, system, toy
from fastsae.systems.interpretable_directions.models import FRAMES
from fastsae.systems.interpretable_directions.patching import fewest
from fastsae.systems.interpretable_directions.toy import FOUND, RULES, VARIANTS
from fastsae.systems.page import About
from fastsae.systems.pictures import INK, MUTED, palette, panels, save, styled
from fastsae.systems.results import Table, median
from fastsae.systems.runner import System

DATA = {"coded": "0.97 features on average", "five": "5 features on average"}
FIRST = "mmcs.png"
MODELS = {"": "language model", f"{FRAMES}-": "small model"}
"""Each language model's prefix of its experiments' names, and what tables call it."""
MEASURES = {"fvu": "FVU", "l0": "L0", "recovered_over_mean": "CE recovered over mean ablation",
            "recovered_over_zero": "CE recovered over zero ablation", "alive": "latents alive",
            "alpha": "α"}  # fmt: skip
LIKENESS = {"mmcs": "MMCS", "matched": "one-to-one", "matched_same": "one-to-one, above .9"}
SHARES = (0.5, 0.25, 0.1)
"""Of the KL without a patch, at which patches are counted."""
GRIDS = {"mmcs": "MMCS of the true features", "found": "share of them above .9", "fvu": "FVU", "l0": "L0",
         "alive": "latents alive"}  # fmt: skip


def _cells(records: Mapping[str, Any], variant: str) -> dict[tuple[float, int], Mapping[str, Any]]:
    """The records of a variant's grid by (α, latents)."""
    return {
        (record["settings"]["coefficient"], record["settings"]["d_sae"]): record
        for name, record in records.items()
        if record.get("variant") == variant and not name.startswith("steps-")
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
    """The toy: for each variant the counted recipes, then the published recipe's grid.

    Each language model: the frontier, what is beyond the published recipe, and patching.
    """
    found = []
    for variant in VARIANTS:
        if counted := _counted(records, variant):
            found.append(_counted_table(counted, variant))
        if cells := _cells(records, variant):
            found.append(_grid_table(cells, variant))
    for prefix in MODELS:
        if frontier := _frontier(records, prefix):
            found += [_frontier_table(frontier, prefix), *_beyond_table(frontier, prefix)]
        if patched := _of_kind(records, prefix, "ioi"):
            found.append(_patching_table(patched, records.get(f"{prefix}model"), prefix))
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
    for name, title in LIKENESS.items():
        for size in sizes:
            row = [cells.get((alpha, int(size)), {}).get("next_larger") for alpha in alphas]
            if any(row):
                shown = ["-" if r is None else _number(r[name], name) for r in row]
                lines.append([f"{title} to twice the latents, {size:,}", *shown])
    return Table(header, lines)


def _of_kind(records: Mapping[str, Any], prefix: str, kind: str) -> dict[str, Mapping[str, Any]]:
    """The records of a language model's experiments of a kind, by name without the prefix."""
    start = f"{prefix}{kind}-"
    return {name.removeprefix(prefix): record for name, record in records.items() if name.startswith(start)}


def _frontier(records: Mapping[str, Any], prefix: str) -> dict[tuple[str, int, int], Mapping[str, Any]]:
    """A language model's frontier by (rule, latents per dimension, L0 aimed at)."""
    found = _of_kind(records, prefix, "frontier").values()
    return {(record["rule"], record["ratio"], record["asked"]): record for record in found}


def _lines_of(cells: Mapping[tuple[str, int, int], Any]) -> list[tuple[str, int]]:
    """The lines of a frontier, (rule, latents per dimension)."""
    return list(dict.fromkeys((rule, ratio) for rule, ratio, _ in sorted(cells, key=lambda key: (key[1], key[0]))))


def _called(rule: str, ratio: int) -> str:
    return f"{saes.RULES[rule]}, {ratio} latents per dimension"


def _frontier_table(cells: Mapping[tuple[str, int, int], Mapping[str, Any]], prefix: str) -> Table:
    l0s = sorted({l0 for _, _, l0 in cells})
    settings = next(iter(cells.values()))["settings"]
    rows = f"{settings['rows']:,} rows, {settings['passes']} passes"
    header = [f"{MODELS[prefix]}, {rows}, target L0", *map(str, l0s)]
    lines = []
    for name, title in MEASURES.items():
        for rule, ratio in _lines_of(cells):
            row = [cells.get((rule, ratio, l0), {}).get(name) for l0 in l0s]
            if any(row):
                shown = ["-" if r is None else _shown(median(r), name) for r in row]
                lines.append([f"{title}: {_called(rule, ratio)}", *shown])
    for name, title in LIKENESS.items():
        for rule, ratio in _lines_of(cells):
            row = [cells.get((rule, ratio, l0), {}).get("next_larger") for l0 in l0s]
            if any(row):
                shown = ["-" if r is None else f"{r[name]:.3f}" for r in row]
                lines.append([f"{title} to twice the latents, {_called(rule, ratio)}", *shown])
    return Table(header, lines)


def _shown(value: float, name: str) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.2g}" if name == "alpha" else _number(value, name)


def _beyond_table(cells: Mapping[tuple[str, int, int], Mapping[str, Any]], prefix: str) -> list[Table]:
    """At each L0 the published recipe beside the rule whose median FVU is lowest on the first half of held-out rows."""
    lines = []
    for (rule, ratio, l0), published in sorted(cells.items(), key=lambda item: item[0][1:]):
        if rule == "published" and (best := _best(cells, ratio, l0)):
            found = (published, cells[best, ratio, l0])
            lines.append([
                f"{l0}, {ratio} latents per dimension", saes.RULES[best],
                *(", ".join(f"{value:.3f}" for value in record["fvu"]) for record in found),
                *(_by_seed(record["recovered_over_mean"], "{:.3f}", "-") for record in found),
            ])  # fmt: skip
    header = [f"{MODELS[prefix]}, target L0, by seed", "chosen", "FVU, published", "FVU, chosen",
              "CE recovered, published", "CE recovered, chosen"]  # fmt: skip
    return [Table(header, lines)] if lines else []


def _best(cells: Mapping[tuple[str, int, int], Mapping[str, Any]], ratio: int, l0: int) -> str:
    """The rule beside the published one with the lowest median FVU on the first half of held-out rows; "": none is."""
    others = [rule for rule in system.BEYOND if (rule, ratio, l0) in cells]
    return min(others, key=lambda rule: median(cells[rule, ratio, l0]["fvu_chosen"]), default="")


def _patching_table(patched: Mapping[str, Mapping[str, Any]], model: Mapping[str, Any] | None, prefix: str) -> Table:
    first = next(iter(patched.values()))
    told = "" if model is None else f", right on {100 * model['accuracy']:.1f} %"
    header = [f"{MODELS[prefix]}{told}, layer {first['layer']}, KL {first['kl']:.2f} without a patch",
              "latents that differ", "KL with all", *(f"patches to {100 * share:g} %" for share in SHARES),
              *(f"edit at {100 * share:g} %" for share in SHARES)]  # fmt: skip
    lines = []
    for record in patched.values():
        curves = [ioi.points(curve) for curve in record["curves"]]
        at = [[fewest(points, share * record["kl"]) for points in curves] for share in SHARES]
        lines.append([
            record["title"], _by_seed([points[0]["latents"] for points in curves], "{:.0f}"),
            _by_seed([points[0]["kl"] for points in curves], "{:.3f}"),
            *(_by_seed([point["latents"] if point else None for point in found], "{:.0f}") for found in at),
            *(_by_seed([point["edit"] if point else None for point in found], "{:.2f}") for found in at),
        ])  # fmt: skip
    return Table(header, lines)


def _by_seed(values: Sequence[float | None], form: str, missing: str = "never") -> str:
    return ", ".join(missing if value is None else form.format(value) for value in values)


# -- pictures ---------------------------------------------------------------------------------------------------------


def draw_all(records: Mapping[str, Any], folder: Path) -> None:
    """mmcs.png and steps.png of the toy; frontier.png and ioi.png of the language models."""
    draw_toy(records, folder)
    draw_frontier(records, folder)
    draw_patching(records, folder)


@styled
def draw_frontier(records: Mapping[str, Any], folder: Path) -> None:
    """frontier.png: FVU and cross-entropy recovered against L0, the median of seeds, a row for each model."""
    found = {prefix: cells for prefix in MODELS if (cells := _frontier(records, prefix))}
    if not found:
        return
    figure, axes = panels(2 * len(found), columns=2, size=(4.2, 3.0))
    for i, (prefix, cells) in enumerate(found.items()):
        lines = _lines_of(cells)
        for one, name in zip(axes[2 * i : 2 * i + 2], ("fvu", "recovered_over_mean"), strict=True):
            for colour, (rule, ratio) in zip(palette(len(lines)), lines, strict=True):
                line = [record for key, record in sorted(cells.items()) if key[:2] == (rule, ratio)]
                one.plot([median(r["l0"]) for r in line], [median(r[name]) for r in line], "o-", color=colour,
                         linewidth=1.2, markersize=3.5, label=_called(rule, ratio))  # fmt: skip
            one.set_xscale("log")
            asked = sorted({l0 for _, _, l0 in cells})
            one.set_xticks(asked, [str(l0) for l0 in asked])
            one.minorticks_off()
            one.set_xlabel("active latents")
            one.set_ylabel(MEASURES[name])
            one.set_title(MODELS[prefix])
        axes[2 * i + 1].legend(fontsize=7.5, loc="lower right")
    save(figure, folder / "frontier.png")


@styled
def draw_patching(records: Mapping[str, Any], folder: Path) -> None:
    """ioi.png: KL to the target against the number of patches and against the edit's size, a row for each model."""
    found = {prefix: patched for prefix in MODELS if (patched := _of_kind(records, prefix, "ioi"))}
    if not found:
        return
    figure, axes = panels(2 * len(found), columns=2, size=(4.4, 3.2))
    for i, (prefix, patched) in enumerate(found.items()):
        for one, name in zip(axes[2 * i : 2 * i + 2], ("latents", "edit"), strict=True):
            for colour, record in zip(palette(len(patched)), patched.values(), strict=True):
                for j, curve in enumerate(record["curves"]):
                    points = ioi.points(curve)
                    one.plot([point[name] for point in points], [point["kl"] for point in points], color=colour,
                             linewidth=1.2, label=record["title"] if j == 0 else None)  # fmt: skip
            one.axhline(next(iter(patched.values()))["kl"], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
            one.set_xlabel("latents patched" if name == "latents" else "mean ‖x' - x‖")
            one.set_ylabel("KL(patched ‖ target), nats")
            one.set_title(f"{MODELS[prefix]}; dashed: nothing patched")
        axes[2 * i].set_xscale("symlog", linthresh=1)
        axes[2 * i].set_xlim(left=0)
        axes[2 * i].xaxis.set_major_formatter("{x:g}")
        axes[2 * i + 1].legend(fontsize=7)
    save(figure, folder / "ioi.png")


@styled
def draw_toy(records: Mapping[str, Any], folder: Path) -> None:
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
    """How soon TopK finds the coded data's features; and what a rule at the published recipe's L0 loses less."""
    return " ".join(filter(None, (_result_toy(records), _result_frontier(records))))


def _result_toy(records: Mapping[str, Any]) -> str:
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


def _result_frontier(records: Mapping[str, Any]) -> str:
    """At the least L0 at which a rule stands beside the published recipe on a language model."""
    cells = _frontier(records, "")
    both = sorted((l0, ratio) for rule, ratio, l0 in cells if rule == "published" and _best(cells, ratio, l0))
    if not both:
        return ""
    l0, ratio = both[0]
    best = _best(cells, ratio, l0)
    theirs, ours = cells["published", ratio, l0], cells[best, ratio, l0]
    recovered = "recovered_over_mean"
    return (
        f"On a language model at L0 {l0}, {saes.RULES[best]} has an FVU of {median(ours['fvu']):.3f} instead of "
        f"{median(theirs['fvu']):.3f} and recovers {median(ours[recovered]):.1%} of the cross-entropy over mean "
        f"ablation instead of {median(theirs[recovered]):.1%} (medians of {len(ours['fvu'])} seeds)."
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
    here="Samples are sparse sums of 512 random unit directions in 256 dimensions, without noise; SAEs have untied "
    "weights and an encoder bias. The published recipe, as in the public code, runs over a grid of L1 weights α and "
    "sizes, with one seed per cell. The data has two variants: as coded, with 0.97 active directions per sample on "
    "average, and scaled to the 5 that the code's settings name. Another recipe finds the directions in fewer steps: "
    "TopK with a decaying learning rate, whose unused latents are resampled to the reconstruction error; its constants "
    "were chosen on another seed. On the residual stream of a language model, the published recipe and other rules are "
    "compared at equal L0, and by how few latents have to be patched to turn one name into another.",
    pictures={
        FIRST: "MMCS of the true directions by L1 weight α and number of latents, published recipe.",
        "steps.png": "MMCS against batches: one line per seed; the dashed line is the goal, 0.99.",
        "frontier.png": "A language model's residual stream: FVU and cross-entropy recovered against L0.",
        "ioi.png": "Indirect object identification: KL to the target against patches, and against the edit's size.",
    },
    unverified=[
        "The publication does not give the number of steps of its toy.",
        "There are no published figures to compare with: the results on this toy are published as heat maps.",
        "The publication's figures on indirect object identification are curves, not numbers.",
        "Autointerpretation and circuits are not reproduced.",
    ],
    result=result,
)
SYSTEM = System(
    about=ABOUT,
    experiments=system.experiments,
    perform=lambda experiment, seeds, advance, folder: (experiment.perform(seeds, advance, folder), None),
    draw_all=draw_all,
    tables=tables,
    unit="step",
    seeds=3,
    scale={"steps": toy.Recipe.steps, **system.CHANGED},
    seconds=lambda experiment, seeds: experiment.seconds(seeds),
    lacking=lambda experiment: experiment.lacking(),
)
