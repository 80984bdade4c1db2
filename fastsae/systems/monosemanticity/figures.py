"""Tables and pictures of the `monosemanticity` system."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes

from fastsae.systems.monosemanticity import system
from fastsae.systems.monosemanticity.meaning import LEVELS
from fastsae.systems.monosemanticity.recipe import RULES, Scale
from fastsae.systems.monosemanticity.system import WEIGHTS
from fastsae.systems.page import About
from fastsae.systems.pictures import COLOURS, MUTED, palette, panels, save, styled
from fastsae.systems.results import Table, median
from fastsae.systems.runner import System

FIRST = "frontier.png"
PUBLISHED = {2: "81.6 / 30.4 / .095 / .957", 5: "33.2 / 19.1 / .163 / .904", 10: "8.7 / 12.5 / .255 / .839"}
"""L0 / L1 / nMSE / CE recovered at each λ: 131,072 latents on the residual stream of layer 2 of a 4-layer model."""
NAMES = {"published": "published recipe", "topk": "TopK, AuxK", "batch_topk": "BatchTopK, AuxK", "jumprelu": "JumpReLU",
         "gated": "Gated"}  # fmt: skip
Records = Mapping[str, Any]


def tables(records: Records) -> list[Table | str]:
    """The published recipe over λ, rules at equal L0, the scaling law, then single latents."""
    parts = [_weights(records), _rules(records), *_scaling(records), _causes(records), _meaning(records),
             _concepts(records), _splitting(records), *_steering(records)]  # fmt: skip
    return [part for part in parts if part is not None]


def _middle(record: Records, name: str, form: str = ".3f") -> str:
    middle = median(record.get(name, ()))
    return "-" if math.isnan(middle) else format(middle, form)


def _all(record: Records, name: str, form: str = ".3f") -> str:
    return ", ".join("-" if value is None else format(value, form) for value in record.get(name, ()))


def _weights(records: Records) -> Table | None:
    header = ["published recipe, median of seeds", "published: L0 / L1 / nMSE / CE", "L0", "L1", "nMSE", "FVU",
              "CE recovered, zero", "mean", "never fire", "dead"]  # fmt: skip
    lines = []
    for weight in WEIGHTS:
        if record := records.get(f"lambda-{weight:g}"):
            lines.append([
                f"λ = {weight:g}, {record['latents']:,} latents", PUBLISHED[int(weight)], _middle(record, "l0", ".1f"),
                _middle(record, "l1", ".1f"), _middle(record, "nmse"), _middle(record, "fvu"),
                _middle(record, "recovered_over_zero"), _middle(record, "recovered_over_mean"),
                _middle(record, "never", ".1%"), _middle(record, "dead_share", ".1%"),
            ])  # fmt: skip
    return Table(header, lines) if lines else None


def _at(records: Records, weight: float) -> dict[str, Any]:
    """The records at one λ's L0, by rule."""
    names = {"published": f"lambda-{weight:g}", **{rule: f"{rule}-{weight:g}" for rule in RULES}}
    return {rule: records[name] for rule, name in names.items() if name in records}


def chosen(records: Records, weight: float) -> str | None:
    """The rule of least FVU on the half of the held-out rows that chooses; None where there is one at most."""
    found = _at(records, weight)
    return min(found, key=lambda rule: median(found[rule]["chosen_by"])) if len(found) > 1 else None


def _rules(records: Records) -> Table | None:
    header = ["at equal L0, by seed", "L0", "FVU", "CE recovered, zero", "mean", "KL", "never fire", "dead"]
    lines = []
    for weight in WEIGHTS:
        best = chosen(records, weight)
        if best is None:
            continue
        for rule, record in _at(records, weight).items():
            lines.append([
                f"λ = {weight:g}: {NAMES[rule]}{' (chosen)' if rule == best else ''}", _middle(record, "l0", ".1f"),
                _all(record, "fvu"), _middle(record, "recovered_over_zero", ".4f"),
                _all(record, "recovered_over_mean"), _middle(record, "kl_spliced"), _middle(record, "never", ".1%"),
                _middle(record, "dead_share", ".1%"),
            ])  # fmt: skip
    return Table(header, lines) if lines else None


# -- the scaling law --------------------------------------------------------------------------------------------------


def law(records: Records) -> tuple[list[tuple[float, int, float]], tuple[float, float] | None]:
    """([(compute, latents, loss)], (factor, exponent)): compute is latents × steps of the published recipe at λ = 5.

    loss = factor·compute^-exponent is fitted to the losses that no smaller compute reaches; None for fewer than three.
    """
    points = []
    for name, record in records.items():
        if name == "lambda-5" or name.startswith("size-"):
            of = record["settings"]
            steps = int(of["share"] * of["rows"]) // of["batch"]
            points.append((float(record["latents"] * steps), int(record["latents"]), float(record["loss"][0])))
    points.sort()
    front: list[tuple[float, float]] = []
    for compute, _, loss in points:
        if not front or loss < front[-1][1]:
            front = [one for one in front if one[0] != compute]
            front.append((compute, loss))
    if len(front) < 3:
        return points, None
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in zip(*front, strict=True))
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    return points, (math.exp(float(y.mean() - slope * x.mean())), -slope)


def _scaling(records: Records) -> list[Table | str]:
    points, fit = law(records)
    if len(points) < 3:
        return []
    sizes = sorted({size for _, size, _ in points})
    header = ["loss at λ = 5, by share of the rows", *(f"{size:,} latents" for size in sizes)]
    lines: dict[float, list[str]] = {}
    for name, record in records.items():
        if name == "lambda-5" or name.startswith("size-"):
            row = lines.setdefault(record["settings"]["share"], ["-"] * len(sizes))
            row[sizes.index(record["latents"])] = f"{record['loss'][0]:.1f}"
    parts: list[Table | str] = [Table(header, [[f"{share:.0%}", *row] for share, row in sorted(lines.items())])]
    if fit is not None:
        parts.append(f"The lowest losses fall as (latents × steps)^-{fit[1]:.3f}; the published exponent is unknown.")
    return parts


# -- single latents ---------------------------------------------------------------------------------------------------


def _causes(records: Records) -> Table | None:
    header = ["against ablation", "attribution, correlation", "activation", "attribution, of the top ten", "activation",
              "prompts", "latents"]  # fmt: skip
    lines = [["published", ".81", ".12", "8", "3", "-", "-"]]
    for rule in ("published", "topk"):
        record = records.get(f"causes-{rule}")
        if record and record["prompts"]:
            lines.append([
                f"here, {NAMES[rule]}", *(f"{record[name]:.2f}" for name in ("attribution_correlation",
                "activation_correlation")), *(f"{record[name]:.1f}" for name in ("attribution_top", "activation_top")),
                f"{record['prompts']}", f"{record['latents']:,}",
            ])  # fmt: skip
    return Table(header, lines) if len(lines) > 1 else None


def _levels(records: Records) -> dict[str, Sequence[float | None]]:
    """Shares on the top tokens by level, by what has them."""
    found = {}
    for rule in ("published", "topk"):
        if record := records.get(f"meaning-{rule}"):
            found[f"{NAMES[rule]}, {record['specificity']['counted']} latents"] = record["specificity"]["latents"]
            found[f"{NAMES[rule]}, random directions"] = record["specificity"]["random"]
    return found


def _meaning(records: Records) -> Table | None:
    header = ["activations on the ten top tokens, by tenth of the largest", *(f"{i + 1}" for i in range(LEVELS))]
    lines = [[name, *("-" if v is None else f"{v:.2f}" for v in shares)] for name, shares in _levels(records).items()]
    return Table(header, lines) if lines else None


def _concept_records(records: Records) -> dict[str, Any]:
    found = {rule: records.get(f"meaning-{rule}", {}).get("concepts") for rule in ("published", "topk")}
    return {rule: record for rule, record in found.items() if record}


def _concepts(records: Records) -> Table | None:
    header = ["names with a latent of their own (F1 ≥ .5)", "names", "have one", "half do at a frequency of",
              "1 / alive latents"]  # fmt: skip
    lines = []
    for rule, one in _concept_records(records).items():
        half = "-" if one["half_at"] is None else f"{one['half_at']:.2g}"
        lines.append([NAMES[rule], f"{one['concepts']}", f"{one['present']}", half, f"{1 / max(1, one['alive']):.2g}"])
    return Table(header, lines) if lines else None


def _splitting(records: Records) -> Table | None:
    record = records.get("splitting")
    if not record:
        return None
    header = ["published recipe, λ = 5: latents and those of the next size", "alive", "mean largest cosine",
              f"relatives (cosine > {system.SPLITS:g})", "with two or more"]  # fmt: skip
    lines = [
        [f"{one['from']:,} to {one['to']:,}", f"{one['alive']:,}", f"{one['mmcs']:.3f}", f"{one['relatives']:.2f}",
         f"{one['split']:.1%}"] for one in record["steps"]
    ]  # fmt: skip
    return Table(header, lines)


def _steering(records: Records) -> list[Table | str]:
    found: list[Table | str] = []
    for rule in ("published", "topk"):
        for one in records.get(f"steering-{rule}", {}).get("samples", ()):
            found.append(
                f"Steering, {NAMES[rule]}: latent {one['latent']} fires on {_quoted(one['fires_on'])} and, held at 5 × "
                f"its largest activation, raises {_quoted(one['raises'])}."
            )
            lines = [
                [_quoted([text]), "untouched" if level == "untouched" else f"{level} × its largest"]
                for level, text in one["texts"].items()
            ]
            found.append(Table([f"text after {_quoted([one['prompt']])}", "held at"], lines))
    return found


def _quoted(texts: Sequence[str]) -> str:
    """Texts of a model in one line that a Markdown table can hold."""
    clean = (" ".join(text.split()).replace("|", "\\|") for text in texts)
    return ", ".join(f"“{text}”" for text in clean)


# -- pictures ---------------------------------------------------------------------------------------------------------


@styled
def draw_all(records: Records, folder: Path) -> None:
    """frontier.png: FVU and cross-entropy against L0; scaling.png: loss against compute; meaning.png: specificity."""
    if _at(records, WEIGHTS[0]) or _at(records, WEIGHTS[1]):
        _draw_frontier(records, folder)
    points, fit = law(records)
    if len(points) >= 3:
        _draw_law(points, fit, folder)
    if _levels(records):
        _draw_meaning(records, folder)


def _draw_frontier(records: Records, folder: Path) -> None:
    figure, axes = panels(2, columns=2, size=(3.8, 3.0))
    colours = dict(zip(RULES, palette(2 * len(RULES))[1:], strict=False))
    for axis, name, title in zip(
        axes, ("fvu", "recovered_over_mean"), ("FVU", "CE recovered over mean ablation"), strict=True
    ):
        for rule in ("published", *RULES):
            found = [record for weight in WEIGHTS if (record := _at(records, weight).get(rule))]
            # A share is None where the ablation costs nothing.
            lines = [(record["l0"], record[name]) for record in found if None not in record[name]]
            if not lines:
                continue
            colour = COLOURS["faithful"] if rule == "published" else colours[rule]
            x, y = zip(*sorted((median(l0), median(values)) for l0, values in lines), strict=True)
            axis.plot(x, y, color=colour, linewidth=1.2, label=NAMES[rule])
            for l0, values in lines:
                axis.plot(l0, values, ".", color=colour, markersize=4)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
        axis.set_xlabel("L0")
        axis.set_title(title)
    axes[0].legend(fontsize=7.5)
    save(figure, folder / FIRST)


def _draw_law(points: Sequence[tuple[float, int, float]], fit: tuple[float, float] | None, folder: Path) -> None:
    figure, (axis,) = panels(1, size=(5.2, 3.2))
    sizes = sorted({size for _, size, _ in points})
    for size, colour in zip(sizes, palette(len(sizes)), strict=True):
        mine = [(compute, loss) for compute, of, loss in points if of == size]
        axis.plot(*zip(*mine, strict=True), ".-", color=colour, linewidth=1.0, label=f"{size:,} latents")
    if fit is not None:
        ends = torch.tensor([points[0][0], points[-1][0]], dtype=torch.float64)
        axis.plot(ends, fit[0] * ends ** -fit[1], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        axis.set_title(f"loss at λ = 5; dashed: compute^-{fit[1]:.3f}")
    axis.set_xscale("log")
    axis.set_yscale("log")
    # The style takes text as it is, and matplotlib's own labels of a logarithmic axis are formulas.
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_minor_formatter("")
    for set_formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        set_formatter("{x:.0f}")
    axis.set_xlabel("latents × steps")
    axis.set_ylabel("loss on held-out rows")
    axis.legend(fontsize=7.5)
    save(figure, folder / "scaling.png")


def _draw_meaning(records: Records, folder: Path) -> None:
    # Where no name has a latent, there is no curve to see.
    curves = {rule: one for rule, one in _concept_records(records).items() if one["present"]}
    figure, axes = panels(1 + bool(curves), columns=1 + bool(curves), size=(3.8, 3.0))
    levels = [(i + 0.5) / LEVELS for i in range(LEVELS)]
    for (name, shares), colour in zip(_levels(records).items(), palette(4), strict=False):
        held = [(x, y) for x, y in zip(levels, shares, strict=True) if y is not None]
        if held:
            style = (0, (4, 3)) if "random" in name else "-"
            axes[0].plot(*zip(*held, strict=True), color=colour, linewidth=1.2, linestyle=style, label=name)
    axes[0].set_xlabel("share of the latent's largest activation")
    axes[0].set_ylabel("on the ten top tokens")
    axes[0].set_ylim(0, 1.02)
    axes[0].legend(fontsize=7)
    if curves:
        _draw_concepts(axes[1], curves)
    save(figure, folder / "meaning.png")


def _draw_concepts(axis: Axes, curves: Mapping[str, Any]) -> None:
    for (rule, one), colour in zip(curves.items(), (COLOURS["faithful"], COLOURS["better"]), strict=False):
        frequency, has = torch.tensor(one["frequency"]), torch.tensor(one["has"], dtype=torch.float64)
        bins = frequency.log().tensor_split(8), has.tensor_split(8)
        pairs = [(float(x.mean().exp()), float(y.mean())) for x, y in zip(*bins, strict=True) if len(x)]
        axis.plot(*zip(*pairs, strict=True), "o-", color=colour, markersize=3, linewidth=1.0, label=NAMES[rule])
        axis.axvline(1 / max(1, one["alive"]), color=colour, linewidth=0.8, linestyle=(0, (4, 3)))
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlabel("frequency of a name (dashed: 1 / alive latents)")
    axis.set_ylabel("share with a latent of their own")
    axis.legend(fontsize=7.5)


def result(records: Records) -> str:
    """How the chosen rule compares with the published recipe at its L0, λ = 5."""
    best, found = chosen(records, 5.0), _at(records, 5.0)
    if best is None or best == "published":
        return ""
    theirs, ours = found["published"], found[best]
    recovered = "recovered_over_mean"
    return (
        f"At the L0 of the published recipe at λ = 5 ({median(theirs['l0']):.0f}), {NAMES[best]} has an FVU of "
        f"{median(ours['fvu']):.3f} instead of {median(theirs['fvu']):.3f} and recovers {median(ours[recovered]):.1%} "
        f"of the cross-entropy over mean ablation instead of {median(theirs[recovered]):.1%} (medians of "
        f"{len(ours['fvu'])} seeds, same rows and passes)."
    )


ABOUT = About(
    title="The recipe of Scaling Monosemanticity",
    sources={
        "Templeton et al. 2024, Scaling Monosemanticity": "https://transformer-circuits.pub/2024/scaling-monosemanticity",
        "Anthropic, Circuits Updates April 2024 (training of SAEs)": "https://transformer-circuits.pub/2024/april-update",
    },
    claim="SAEs with an L1 penalty weighted by decoder norms, trained on the middle residual stream of a model, have "
    "latents that stand for concepts, that explain the model's output when they are removed, and that steer it. The "
    "loss falls as a power of compute.",
    here="The activations are SmolLM2-135M's residual stream after 15 of 30 blocks, on the works of Shakespeare; all "
    "figures are from held-out text. The published recipe runs with three weights λ and four sizes; TopK, BatchTopK, "
    "JumpReLU and Gated are trained to the L0 that it reached, on the same rows, each read once. The learning rate is "
    "higher than published because the runs are hundreds of times shorter. Two measures replace a judge that reads "
    "activations: the share of a latent's activations on its ten top tokens, compared with random directions, and how "
    "many names have a latent of their own.",
    pictures={
        FIRST: "FVU, and cross-entropy recovered over mean ablation, against L0: a point for each seed.",
        "scaling.png": "The published recipe's loss against compute.",
        "meaning.png": "The share of activations on a latent's ten top tokens, by the activations' size; where "
        "names have latents of their own, also the share that has one, by frequency.",
    },
    unverified=[
        "The publication does not say what its normalized MSE is relative to: here, the mean square. FVU is shown too.",
        "Nor does it say which ablation its recovered cross-entropy refers to: zero and mean ablation are both shown.",
        "The published exponents of the scaling law are not given.",
        "The published models are different and far larger: only the order over λ and sizes can be compared.",
        "The correlation of latents with neurons of earlier layers, and a judge's scores, are not reproduced.",
    ],
    result=result,
)
SYSTEM = System(
    about=ABOUT,
    experiments=system.experiments,
    perform=system.perform,
    draw_all=draw_all,
    tables=tables,
    unit="step",
    seeds=3,
    scale={name: value for name, value in vars(Scale()).items()},
    seconds=lambda experiment, seeds: experiment.seconds(seeds),
    lacking=lambda experiment: experiment.lacking(),
)
