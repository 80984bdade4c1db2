"""Tables and pictures of the `dictionary_comparison` system."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from fastsae.systems.dictionary_comparison import system as comparison
from fastsae.systems.dictionary_comparison.recipes import BETTER, CANDIDATES, SWAPS
from fastsae.systems.dictionary_comparison.system import COMPARED, L0S, LINKED, MAIN_L0, ONE_LAYER, Scale
from fastsae.systems.page import About
from fastsae.systems.pictures import COLOURS, FAINT, INK, MUTED, panels, save, styled
from fastsae.systems.results import Table, median, spread
from fastsae.systems.runner import System

TITLES = {"cunningham": "Cunningham et al.", "bricken": "Bricken et al.", "better": "better recipe"}
SHADES = {"cunningham": COLOURS["faithful"], "bricken": COLOURS["k_means"], "better": COLOURS["better"]}
FIRST = "fvu.png"

Records = Mapping[str, Any]


# -- what the records say ---------------------------------------------------------------------------------------------


def cell(records: Records, key: str, d_sae: int, l0: int) -> Mapping[str, Any] | None:
    """The record of a recipe at a size and L0."""
    return records.get(f"{key}-m{d_sae}-l{l0}")


def saes(records: Records) -> list[Mapping[str, Any]]:
    return [record for record in records.values() if record["kind"] == "sae"]


def main_size(records: Records) -> int:
    """The size at which most is measured."""
    return next(iter(records.values()))["main"]


def sizes(records: Records) -> list[int]:
    return sorted({record["settings"]["d_sae"] for record in saes(records)})


# -- tables -----------------------------------------------------------------------------------------------------------


def tables(records: Records) -> list[Table | str]:
    """The scale, both recipes and the better one, swaps, sizes, splitting, candidates."""
    parts = (_scale(records), _main(records), _swaps(records), _sizes(records), _splits(records), _candidates(records))
    return [part for part in parts if part]


def _scale(records: Records) -> str:
    found = saes(records)
    if not found:
        return ""
    settings, ce = found[0]["settings"], found[0]["ce"]
    what = settings["model"]
    if what == ONE_LAYER:
        shape = settings["one_layer"]
        what = f"a model of one layer, d = {shape['d']}, MLP {shape['mlp']}, {shape['steps']:,} steps on bytes"
    steps = max(1, settings["rows"] // settings["batch"])
    return (
        f"Scale: {what}; {settings['rows']:,} rows in {steps:,} steps of {settings['batch']:,} (published: Bricken et "
        f"al. 8 billion rows in a million steps of 8,192, Cunningham et al. 5 to 50 million); reported on "
        f"{settings['held'] // 2:,} held-out rows. The model's cross-entropy is {ce['untouched']:.3f} nats per token; "
        f"{ce['zero']:.3f} with these activations set to 0, {ce['mean']:.3f} with them set to their mean."
    )


def _main(records: Records) -> Table | None:
    main, lines = main_size(records) if records else 0, []
    for l0 in L0S:
        compared = records.get(f"compare-m{main}-l{l0}")
        for key in COMPARED:
            if (record := cell(records, key, main, l0)) is not None:
                lines.append([f"{TITLES[key]}, L0 {l0}", *_figures(record), *_alike(compared, key)])
    if not lines:
        return None
    # Bricken et al., A/1: dead is never firing on 100 million tokens.
    lines.append([
        "Bricken et al., A/1, as published", "-", "79 %", "-", "10 – 20", f"{168 / 4096:.1%}", "few", "0.004", "-", "-",
    ])  # fmt: skip
    header = [f"{main:,} latents", "FVU", "CE recovered", "over the mean", "L0", "dead", "density > 1 %",
              "weight α", "MMCS of seeds", "MMCS in the other"]  # fmt: skip
    return Table(header, lines)


def _figures(record: Mapping[str, Any]) -> list[str]:
    """FVU, CE recovered over zero and mean, L0, dead, dense and the weight, over the seeds."""
    known = [weight for weight in record["weight"] if weight is not None]
    return [
        spread(record["fvu"], ".3f"), spread(record["recovered"], ".1%"), spread(record["recovered_over_mean"], ".1%"),
        f"{median(record['l0']):.1f}", f"{median(record['dead_share']):.1%}", f"{median(record['dense']):.1%}",
        f"{median(known):.2g}" if known else "-",
    ]  # fmt: skip


def _drawn(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _alike(compared: Mapping[str, Any] | None, key: str) -> list[str]:
    """MMCS between two seeds, the mean of both ways; and in the other published recipe's dictionary."""
    if compared is None:
        return ["-", "-"]
    between, other = compared["between_seeds"].get(key), {"cunningham": "bricken", "bricken": "cunningham"}.get(key)
    return [
        f"{sum(between) / 2:.2f}" if between else "-",
        f"{compared['between_recipes'][key][other]:.2f}" if other else "-",
    ]


def _swaps(records: Records) -> Table | None:
    lines = [
        [title, *_figures(record)[:2], *_figures(record)[3:5]] for title, record in swaps(records).values()
    ]  # fmt: skip
    header = [f"one change at a time, L0 {MAIN_L0}", "FVU", "CE recovered", "L0", "dead"]
    return Table(header, lines) if lines else None


def swaps(records: Records) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Title and record of every step from one recipe to the other that is stored; {} without a step in between."""
    main = main_size(records) if records else 0
    found = {}
    for key, (title, _) in SWAPS.items():
        record = records.get(f"swap-{key}") or cell(records, key, main, MAIN_L0)
        if record is not None:
            found[key] = (title, record)
    return found if len(found) > 2 else {}


def _sizes(records: Records) -> Table | None:
    lines = []
    for key in ("cunningham", "bricken"):
        for size in sizes(records):
            row = [cell(records, key, size, l0) for l0 in L0S]
            if any(row):
                lines.append([f"{TITLES[key]}, {size:,} latents", *("-" if r is None else _short(r) for r in row)])
    header = ["FVU / CE recovered / dead, first seed", *(f"L0 {l0}" for l0 in L0S)]
    return Table(header, lines) if len(sizes(records)) > 1 else None


def _short(record: Mapping[str, Any]) -> str:
    return f"{record['fvu'][0]:.3f} / {spread(record['recovered'][:1], '.1%')} / {record['dead_share'][0]:.0%}"


def _splits(records: Records) -> Table | None:
    lines = []
    for record in records.values():
        if record["kind"] == "split":
            links, settings = record["links"], record["settings"]
            shares = [links[0], links[1], links[2], sum(links[3:])]
            lines.append([
                f"{settings['small']:,} in {settings['d_sae']:,}", f"{record['alive']:,}",
                *(f"{n / max(1, record['alive']):.0%}" for n in shares), f"{record['mean_links']:.2f}",
            ])  # fmt: skip
    header = [f"splitting: latents linked above {LINKED:g}", "alive", "none", "one", "two", "more", "links, mean"]
    return Table(header, lines) if lines else None


def _candidates(records: Records) -> Table | None:
    lines = []
    for key in CANDIDATES:
        if (record := records.get(f"try-{key}")) is not None:
            name = key.replace("_", " ") + (", chosen" if key == BETTER else "")
            lines.append(
                [name, f"{record['chosen_by'][0]:.3f}", f"{record['l0'][0]:.1f}", f"{record['dead_share'][0]:.1%}"]
            )
    header = [f"candidates, L0 {MAIN_L0}, another seed", "FVU, choosing half", "L0", "dead"]
    return Table(header, lines) if lines else None


# -- pictures ---------------------------------------------------------------------------------------------------------


@styled
def draw_all(records: Records, folder: Path) -> None:
    """fvu.png: FVU and CE recovered against L0; densities.png; swaps.png: from one recipe to the other, as bars."""
    if not saes(records):
        return
    main = main_size(records)
    figure, axes = panels(2, size=(3.6, 2.9))
    _draw_curves(axes[0], records, "fvu", "FVU")
    _draw_curves(axes[1], records, "recovered", "cross-entropy recovered")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{main:,} latents; dots: seeds; thin: other sizes, as labelled", fontsize=8.5)
    save(figure, folder / FIRST)
    found = {key: record for key in COMPARED if (record := cell(records, key, main, MAIN_L0)) is not None}
    if found:
        figure, axes = panels(len(found), columns=len(found), size=(2.7, 2.4))
        for one, (key, record) in zip(axes, found.items(), strict=True):
            _draw_densities(one, record["densities"][0], SHADES[key])
            one.set_title(f"{TITLES[key]}\n{record['densities'][0]['never']:,} never fire")
        axes[0].set_ylabel("latents")
        figure.suptitle(f"densities on held-out rows, {main:,} latents, L0 {MAIN_L0}, first seed", fontsize=8.5)
        save(figure, folder / "densities.png")
    if path := swaps(records):
        figure, axes = panels(3, columns=3, size=(2.7, 0.28 * len(path) + 0.7))
        for one, (name, title) in zip(
            axes, (("fvu", "FVU"), ("recovered", "CE recovered"), ("dead_share", "dead")), strict=True
        ):
            _draw_bars(one, [_drawn(record[name]) for _, record in path.values()])
            one.set_title(title)
        axes[0].set_yticks(range(len(path)), [title for title, _ in path.values()])
        save(figure, folder / "swaps.png")


def _draw_curves(axes: Axes, records: Records, name: str, label: str) -> None:
    main = main_size(records)
    for key in COMPARED:
        for size in sizes(records):
            row = [record for l0 in L0S if (record := cell(records, key, size, l0)) is not None]
            x, y = [median(r["l0"]) for r in row], [median(r[name]) for r in row]
            if not row:
                continue
            if size == main:
                axes.plot(x, y, color=SHADES[key], linewidth=1.6, label=TITLES[key])
                for record in row:
                    axes.scatter(record["l0"], _drawn(record[name]), s=12, color=SHADES[key], linewidths=0)
            else:
                axes.plot(x, y, color=SHADES[key], linewidth=0.7, alpha=0.7)
                axes.annotate(f"{size:,}", (x[-1], y[-1]), (3, 0), textcoords="offset points", fontsize=7, color=MUTED)
    axes.set_xscale("log")
    axes.set_xticks(L0S, [str(l0) for l0 in L0S])
    axes.minorticks_off()
    axes.set_xlabel("L0")
    axes.set_title(label)


def _draw_densities(axes: Axes, densities: Mapping[str, Any], colour: str) -> None:
    counts = [int(n) for n in densities["counts"].split()]
    left = [densities["from"] + i / 4 for i in range(len(counts))]
    axes.bar(left, counts, width=0.25, align="edge", color=colour, linewidth=0)
    axes.axvline(-2, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xlabel("log10 of the density")


def _draw_bars(axes: Axes, values: Sequence[Sequence[float]]) -> None:
    for row, seeds in enumerate(values):
        axes.barh(row, median(seeds), height=0.7, color=FAINT, linewidth=0)
        axes.scatter(seeds, [row] * len(seeds), s=9, color=INK, zorder=3, linewidths=0)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_yticks([])


def result(records: Records) -> str:
    """FVU and cross-entropy of both recipes, and of the better one, at the middle L0."""
    main = main_size(records) if records else 0
    found = {key: record for key in COMPARED if (record := cell(records, key, main, MAIN_L0)) is not None}
    if len(found) < 2:
        return ""
    each = "; ".join(
        f"{TITLES[key]} {median(one['fvu']):.3f} and {spread(one['recovered'], '.1%')}" for key, one in found.items()
    )
    return f"At L0 {MAIN_L0} of {main:,} latents, FVU and cross-entropy recovered over zero ablation: {each}."


ABOUT = About(
    title="Two published recipes for dictionaries at equal L0",
    sources={
        "Bricken et al. 2023, Towards Monosemanticity": "https://transformer-circuits.pub/2023/monosemantic-features",
        "Cunningham et al. 2023, Sparse Autoencoders Find Highly Interpretable Features": "https://arxiv.org/abs/2309.08600",
    },
    claim="Both find interpretable directions with an L1 penalty. Bricken et al. untie encoder and decoder, subtract a "
    "decoder bias, project the decoder's gradients and resample dead latents; 79% of a one-layer model's loss is "
    "recovered with 4,096 latents, of which 168 never fire.",
    here="A language model of one block (d = 128, an MLP of 512 with ReLU) is trained here on bytes. Both recipes are "
    "trained on the activations of its MLP and driven to the same L0, so that their losses can be compared. Then their "
    "differences are swapped one at a time. Recipes with other rules are chosen on one half of the held-out rows and "
    "measured on the other.",
    pictures={
        FIRST: "FVU and cross-entropy recovered against L0. Each dot is a seed; thin lines are other sizes.",
        "densities.png": "How often latents fire; the dashed line is at 1%.",
        "swaps.png": "From Cunningham et al. to Bricken et al., one change at a time. Each dot is a seed.",
    },
    unverified=[
        "Bricken et al. do not give their learning rate.",
        "The published model and the training on 8 billion rows are not reproduced.",
        "The published figures are for a model trained on tokens: they are shown for orientation, not for comparison.",
    ],
    result=result,
)
SYSTEM = System(
    about=ABOUT,
    experiments=comparison.experiments,
    perform=comparison.perform,
    draw_all=draw_all,
    tables=tables,
    unit="step",
    seeds=3,
    scale={name: field.default for name, field in Scale.__dataclass_fields__.items()},  # type: ignore[misc]
    seconds=lambda experiment, seeds: experiment.seconds(seeds),
    lacking=lambda experiment: experiment.lacking(),
)
