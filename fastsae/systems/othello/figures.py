"""Tables and pictures of the `othello` system."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fastsae.systems.othello import game, metrics
from fastsae.systems.othello import system as othello
from fastsae.systems.othello.system import PUBLISHED, Experiment, Scale, numbers
from fastsae.systems.pictures import COLOURS, DPI, FAINT, INK, MUTED, panels, save, styled
from fastsae.systems.results import median, spread, table
from fastsae.systems.runner import System

PAIRS = len(game.CLASSES) * game.SQUARES
PROBE = "probe"
MAIN = ("faithful", "mended", "candidate")
TITLES = {PROBE: "linear probe", "faithful": "published recipe", "mended": "the same, latents normalized",
          "candidate": "candidate recipe"}  # fmt: skip
FIRST = "shares.png"

Records = Mapping[str, Any]


# -- what the records say ---------------------------------------------------------------------------------------------


def at(records: Records, key: str, layer: int) -> Mapping[str, Any] | None:
    """The record of a recipe at a layer."""
    return records.get(f"{key}-{layer}")


def layers(records: Records) -> list[int]:
    """The layers of which there is a probe."""
    return sorted(record["layer"] for record in records.values() if record["kind"] == PROBE)


def keys(records: Records) -> list[str]:
    """The recipes of SAEs that there are, in order."""
    return list(dict.fromkeys(name.rsplit("-", 1)[0] for name, r in records.items() if r["kind"] == "sae"))


def found_by(record: Mapping[str, Any]) -> Tensor:
    """bool (seeds, 192): the pairs found on the held-out half."""
    return torch.stack([metrics.found(numbers(areas)) for areas in record["areas"]])


def counts(record: Mapping[str, Any]) -> list[int]:
    """Pairs found on the held-out half, for each seed."""
    return found_by(record).sum(1).tolist()


def shares(record: Mapping[str, Any], probe: Mapping[str, Any]) -> list[float]:
    """For each seed, the share of the pairs found by the probe that the SAE finds too; 0 where the probe finds none."""
    probed = found_by(probe)[0]
    return [float((seed & probed).sum() / probed.sum().clamp(min=1)) for seed in found_by(record)]


# -- tables -----------------------------------------------------------------------------------------------------------


def tables(records: Records) -> str:
    """The records as Markdown: the model, pairs found by layer beside the published counts, and every recipe."""
    parts = [part for part in (_model(records), _main(records), _grid(records)) if part]
    return "\n\n".join(parts)


def _model(records: Records) -> str:
    if (record := records.get("model")) is None:
        return ""
    shape, legal = record["settings"]["model"], record["legal"]
    return (
        f"Scale: {shape['blocks']} blocks, d = {shape['d']}, {record['parameters']:,} parameters, "
        f"{shape['games']:,} games seen once (published: 8 blocks, d = 512). The most likely move is legal in "
        f"{legal['top_1']:.1%} of {legal['positions']:,} positions of new games, and {legal['mass']:.1%} of the "
        f"probability is on legal moves; a random empty square is legal in {legal['chance']:.1%}."
    )


def _main(records: Records) -> str:
    known = layers(records)
    if not known:
        return ""
    published = {
        PROBE: f"{PUBLISHED['probes']} (layer 6 of 8)",
        "faithful": f"{PUBLISHED['sae']} = {PUBLISHED['sae'] / PUBLISHED['probes']:.0%}; best of all "
        f"{PUBLISHED['untied']} = {PUBLISHED['untied'] / PUBLISHED['probes']:.0%}",
    }
    lines = []
    for key in (PROBE, *MAIN):
        cells = []
        for layer in known:
            record, probe = at(records, key, layer), at(records, PROBE, layer)
            if record is None or probe is None:
                cells.append("-")
            elif key == PROBE:
                cells.append(str(counts(record)[0]))
            else:
                cells.append(f"{spread(counts(record), '.0f')} = {median(shares(record, probe)):.0%}")
        if any(cell != "-" for cell in cells):
            lines.append([TITLES[key], published.get(key, "-"), *cells])
    header = [
        "pairs found of 192, and share of the probe's",
        "published, another model",
        *(f"layer {n}" for n in known),
    ]
    return table(header, lines)


def _grid(records: Records) -> str:
    lines = []
    for layer in layers(records):
        for key in keys(records):
            record, probe = at(records, key, layer), at(records, PROBE, layer)
            if record is None or probe is None:
                continue
            measures, boards = record["measures"], record["boards"]
            lines.append([
                f"{key.replace('_', ' ').replace('-', ', ')}, layer {layer}",
                spread(record["selected"], ".0f"), spread(counts(record), ".0f"),
                f"{median(shares(record, probe)):.0%}",
                *(f"{median([one[name] for one in measures]):.{digits}f}"
                  for name, digits in (("l0", 1), ("fvu", 3), ("dead", 2))),
                *(f"{median([one[name]['held_out'] for one in boards]):.2f}"
                  for name in ("coverage", "reconstruction")),
            ])  # fmt: skip
    if not lines:
        return ""
    header = ["recipe", "found, selected on", "found, held out", "share", "L0", "FVU", "dead", "coverage",
              "reconstruction"]  # fmt: skip
    return table(header, lines)


# -- pictures ---------------------------------------------------------------------------------------------------------


@styled
def draw_all(records: Records, folder: Path) -> None:
    """shares.png: the share of probe-findable pairs by recipe and layer; areas.png: each square's best area."""
    _draw_shares(records, folder)
    _draw_areas(records, folder)


def _draw_shares(records: Records, folder: Path) -> None:
    known, recipes = layers(records), keys(records)
    rows = [(layer, [key for key in recipes if at(records, key, layer)]) for layer in known]
    rows = [(layer, found) for layer, found in rows if found]
    if not rows:
        return
    tallest = max(len(found) for _, found in rows)
    figure, grid = panels(len(rows), columns=min(2, len(rows)), size=(4.6, 0.26 * tallest + 0.9))
    for axes, (layer, found) in zip(grid, rows, strict=True):
        probe = records[f"{PROBE}-{layer}"]
        for row, key in enumerate(found):
            values = shares(records[f"{key}-{layer}"], probe)
            axes.barh(
                row,
                median(values),
                height=0.7,
                color=COLOURS["better"] if key == "candidate" else COLOURS.get(key, FAINT),
                linewidth=0,
            )
            if len(values) > 1:
                axes.scatter(values, [row] * len(values), s=9, color=INK, zorder=3, linewidths=0)
        axes.axvline(PUBLISHED["untied"] / PUBLISHED["probes"], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(found)), [key.replace("_", " ").replace("-", ", ") for key in found])
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.set_title(f"layer {layer}: share of the {counts(probe)[0]} pairs that the probe finds")
    figure.suptitle(
        "bar: median of the seeds, dots: seeds; dashed: the published best, 33 of 180, on another model", fontsize=8.5
    )
    save(figure, folder / FIRST)


def _draw_areas(records: Records, folder: Path) -> None:
    complete = [layer for layer in layers(records) if all(at(records, key, layer) for key in ("faithful", "candidate"))]
    if not complete:
        return
    main = records[f"{PROBE}-{complete[0]}"]["main_layer"]
    layer = main if main in complete else complete[-1]
    shown = [key for key in (PROBE, *MAIN) if at(records, key, layer)]
    figure = Figure(figsize=(6.4, 2.0 * len(shown) + 0.5), layout="constrained", dpi=DPI)
    grid = figure.subplots(len(shown), len(game.CLASSES), squeeze=False)
    image = None
    for row, key in zip(grid, shown, strict=True):
        areas = numbers(records[f"{key}-{layer}"]["areas"][0]).view(len(game.CLASSES), 8, 8)
        for axes, name, values in zip(row, game.CLASSES, areas, strict=True):
            image = _draw_board(axes, values)
            axes.set_title(f"{TITLES[key]}\n{name}: {int(metrics.found(values).sum())} found", fontsize=8)
    assert image is not None
    figure.colorbar(image, ax=list(grid.flat), shrink=0.5, label="area under the ROC curve, held-out games")
    figure.suptitle(
        f"the best latent of each square and class, layer {layer}, first seed; framed: above .9", fontsize=9
    )
    save(figure, folder / "areas.png")


def _draw_board(axes: Axes, values: Tensor) -> Any:
    image = axes.imshow(values.numpy(), cmap="viridis", vmin=0.5, vmax=1.0)
    for row, column in metrics.found(values).nonzero().tolist():
        axes.add_patch(_frame(row, column))
    axes.set_xticks([])
    axes.set_yticks([])
    return image


def _frame(row: int, column: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor="#d6452b", linewidth=1.1)


def draw_one(name: str, experiment: Experiment, shown: None, folder: Path) -> None:
    """An experiment has no picture of its own."""


SYSTEM = System(
    experiments=othello.experiments,
    settings=lambda experiment: experiment.settings,
    ticks=lambda experiment, seeds: experiment.steps(seeds),
    perform=othello.perform,
    draw_one=draw_one,
    draw_all=draw_all,
    tables=tables,
    unit="step",
    seeds=3,
    scale={name: int(field.default) for name, field in Scale.__dataclass_fields__.items()},  # type: ignore[arg-type]
    seconds=lambda experiment, seeds: experiment.seconds(seeds),
)
