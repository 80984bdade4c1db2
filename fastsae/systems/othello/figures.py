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
from fastsae.systems.othello.system import PUBLISHED, Scale, numbers
from fastsae.systems.page import About
from fastsae.systems.pictures import COLOURS, DPI, FAINT, INK, MUTED, panels, save, styled
from fastsae.systems.results import Table, median, spread
from fastsae.systems.runner import System

PAIRS = len(game.CLASSES) * game.SQUARES
PROBE = "probe"
MAIN = ("faithful", "mended", "candidate")
TITLES = {PROBE: "linear probe", "faithful": "published recipe", "mended": "published recipe, latents normalized",
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


def tables(records: Records) -> list[Table | str]:
    """The model in a paragraph, pairs found by layer beside the published counts, and every recipe."""
    return [part for part in (_model(records), _main(records), _grid(records)) if part]


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


def _main(records: Records) -> Table | None:
    known = layers(records)
    if not known:
        return None
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
    return Table(header, lines)


def _grid(records: Records) -> Table | None:
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
                  for name, digits in (("l0", 1), ("fvu", 3), ("dead_share", 2))),
                *(f"{median([one[name]['held_out'] for one in boards]):.2f}"
                  for name in ("coverage", "reconstruction")),
            ])  # fmt: skip
    if not lines:
        return None
    header = ["recipe", "found, selected on", "found, held out", "share", "L0", "FVU", "dead", "coverage",
              "reconstruction"]  # fmt: skip
    return Table(header, lines)


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


def result(records: Records) -> str:
    """At the layer where the probe finds most: how many pairs it finds, and how many of them the SAEs find."""
    known = [layer for layer in layers(records) if all(at(records, key, layer) for key in ("faithful", "candidate"))]
    if not known or "model" not in records:
        return ""
    layer = max(known, key=lambda n: counts(records[f"{PROBE}-{n}"])[0])
    probe = records[f"{PROBE}-{layer}"]
    legal = records["model"]["legal"]["top_1"]
    ours, theirs = (f"{median(shares(records[f'{key}-{layer}'], probe)):.0%}" for key in ("candidate", "faithful"))
    published = [f"{PUBLISHED[key] / PUBLISHED['probes']:.0%}" for key in ("sae", "untied")]
    return (
        f"The model's top move is legal in {legal:.1%} of positions. At layer {layer} a linear probe finds "
        f"{counts(probe)[0]} of {PAIRS} pairs of square and state (published: {PUBLISHED['probes']}, larger model). "
        f"The published recipe's SAE has a latent for {theirs} of these (published: {published[0]}, at best "
        f"{published[1]}), the candidate's for {ours}."
    )


ABOUT = About(
    title="Board state in OthelloGPT",
    sources={
        "Huben 2024, Sparse Autoencoders find only 9/180 board state features in OthelloGPT": "https://www.lesswrong.com/"
        "posts/BduCMgmjJnCtc7jKc/research-report-sparse-autoencoders-find-only-9-180-board",
        "RobertHuben/othellogpt_sparse_autoencoders (public code)": "https://github.com/RobertHuben/othellogpt_sparse_autoencoders",
        "Karvonen et al. 2024, Measuring Progress in Dictionary Learning (coverage, reconstruction)": "https://arxiv.org/abs/2408.00113",
    },
    claim="In a GPT trained on random games of Othello, linear probes find 180 of 192 pairs of square and state "
    "(empty, own, enemy). An SAE of layer 6 has a latent for 9 of them, one with untied weights at an earlier layer "
    "for 33.",
    here="A smaller GPT is trained here on random games. A probe or a latent finds a pair if the area under its ROC "
    "curve is above 0.9; each latent is chosen on one half of the games and measured on the other. The published SAE "
    "recipe is compared with the same recipe with normalized latents, with a grid of fastsae's rules with tied and "
    "untied weights, and with a candidate: TopK with untied weights. The published counts are for another model, so "
    "only shares of the probe's pairs can be compared. One fault is not copied: here probes normalize each token, not "
    "a whole game.",
    pictures={
        "areas.png": "The area under the ROC curve of each square and state, for the probe and for the best latent of "
        "each recipe, on games that the latent was not chosen on. Framed squares are found: above 0.9.",
        FIRST: "The share of the probe's pairs that each recipe also finds. Dashed: the published best, 33 of 180.",
    },
    unverified=[
        "The number of games that the published model was trained on is not given.",
        "Counts by layer are not published; the report only says that most pairs are found in layers 2 to 4.",
        "Nothing was run at the published scale (8 blocks, d = 512).",
    ],
    result=result,
)
SYSTEM = System(
    about=ABOUT,
    experiments=othello.experiments,
    perform=othello.perform,
    draw_all=draw_all,
    tables=tables,
    unit="step",
    seeds=3,
    scale={name: int(field.default) for name, field in Scale.__dataclass_fields__.items()},  # type: ignore[arg-type]
    seconds=lambda experiment, seeds: experiment.seconds(seeds),
)
