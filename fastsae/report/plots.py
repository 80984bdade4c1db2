"""The report's figures: matplotlib drawings as inline SVG that follows the page's colours.

matplotlib knows no CSS variables, so a figure is drawn in marker colours that occur nowhere else (`_INKS`), and these
are replaced by `var(--...)` in the text of the SVG. Letters stay text (fonttype none): small, selectable, searchable.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from .runlog import RunLog

_INKS = {
    "#010101": "--ink",
    "#010102": "--muted",
    "#010103": "--grid",
    "#010104": "--c1",
    "#010105": "--c2",
    "#010106": "--c3",
    "#010107": "--c4",
    "#010108": "--c5",
}
INK, MUTED, GRID, C1, C2, C3, C4, C5 = _INKS
PARTS = (C1, C2, C3, C4, C5)

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


@dataclasses.dataclass(frozen=True)
class Plot:
    """One figure of the page."""

    title: str
    caption: str
    svg: str
    """Safe to embed as it is: all text in it was escaped."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line of a line plot."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    ink: str = C1
    points: bool = False
    """Few, separate measurements: drawn with markers."""
    dashed: bool = False


def thinned(x: Sequence[float], y: Sequence[float], most: int = 300) -> tuple[list[float], list[float]]:
    """At most `most` points: the means of equal stretches, so that the page stays small for a long run."""
    n = len(x)
    if n <= most:
        return list(x), list(y)
    cuts = [i * n // most for i in range(most + 1)]
    spans = list(pairwise(cuts))
    return [sum(x[a:b]) / (b - a) for a, b in spans], [sum(y[a:b]) / (b - a) for a, b in spans]


def to_svg(figure: Figure, name: str, title: str, description: str) -> str:
    """The figure as an <svg> element for inlining: page colours, own id prefix, title and description for readers."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.S)  # matplotlib repeats every text in a comment
    # Several figures share one page, so ids (clip paths, glyphs, groups) need a prefix of their own.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'xlink:href="#', f'href="#{name}-', text)
    for ink, variable in _INKS.items():
        text = text.replace(ink, f"var({variable})")
    view_box = re.search(r'viewBox="[^"]*"', text)
    head = f'<svg {view_box.group(0) if view_box else ""} role="img" aria-labelledby="{name}-title {name}-desc">'
    labels = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
    return head + labels + text[text.index(">") + 1 :].strip()


def _axes(width: float = 4.0, height: float = 2.4) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    return figure, axes


def line_plot(
    name: str,
    title: str,
    caption: str,
    curves: Sequence[Curve],
    *,
    xlabel: str = "step",
    ylabel: str = "",
    log: bool = False,
    from_zero: bool = False,
) -> Plot | None:
    """The curves that have points, or None where none has. `log` is ignored where a value is not positive."""
    curves = [c for c in curves if len(c.x)]
    if not curves:
        return None
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes()
        for curve in curves:
            x, y = thinned(curve.x, curve.y)
            marker = "o" if curve.points or len(x) == 1 else ""
            axes.plot(
                x, y, color=curve.ink, label=curve.label, marker=marker, markersize=3.5,
                linestyle=(0, (4, 2)) if curve.dashed else "-",
            )  # fmt: skip
        values = [v for c in curves for v in c.y]
        if log and min(values) > 0 and max(values) > 1.5 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter("{x:g}")
        elif from_zero:
            axes.set_ylim(bottom=0, top=max(values) * 1.08 or 1.0)
        if max(values) >= 10_000 and axes.get_yscale() == "linear":
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        if max(v for c in curves for v in c.x) >= 10_000:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=xlabel == "step"))
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.margins(x=0.02)
        if len(curves) > 1:
            axes.legend(loc="best")
        parts = [f"{c.label}: from {c.y[0]:.4g} to {c.y[-1]:.4g} over {len(c.y)} points" for c in curves]
        return Plot(title, caption, to_svg(figure, name, title, "; ".join(parts) + "."))


def histogram_plot(edges: Sequence[float], counts: Sequence[int], never: int) -> Plot | None:
    """Latents by log10 density; the ones that never fired have a bar of their own at the left."""
    if not counts or not (sum(counts) or never):
        return None
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes()
        width = edges[1] - edges[0]
        axes.bar(edges[:-1], counts, width=width * 0.92, align="edge", color=C1)
        if never:
            axes.bar([edges[0] - 3 * width], [never], width=width * 0.92, align="edge", color=C2)
        ticks = [e for e in edges if abs(e - round(e)) < 1e-6]
        labels = [f"{10 ** round(t) * 100:g} %" for t in ticks]
        if never:
            ticks, labels = [edges[0] - 2.5 * width, *ticks], ["never", *labels]
        axes.set_xticks(ticks, labels)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("share of tokens on which a latent is active (log scale)")
        axes.set_ylabel("latents")
        total = sum(counts) + never
        top = max(range(len(counts)), key=lambda i: counts[i])
        text = f"{total} latents, {never} never active; most lie between 10^{edges[top]:g} and 10^{edges[top + 1]:g}."
        return Plot(
            "Latent density", f"{total:,} latents on the held-out rows; {never:,} of them were active on none.",
            to_svg(figure, "density", "Latent density", text),
        )  # fmt: skip


def parts_plot(parts: dict[str, float]) -> Plot | None:
    """One stacked bar: mean milliseconds of a step by part."""
    parts = {name: ms for name, ms in parts.items() if ms > 0}
    if not parts:
        return None
    total = sum(parts.values())
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(height=max(1.2, 0.36 * len(parts) + 0.75))
        names = sorted(parts, key=lambda n: parts[n])
        values = [parts[n] for n in names]
        axes.barh(names, values, color=C1, height=0.62)
        for row, value in enumerate(values):
            axes.text(value, row, f" {value:.3g} ms ({value / total:.0%})", va="center", color=INK, fontsize=8.5)
        axes.set_xlim(0, max(values) * 1.4)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("milliseconds per step (mean)")
        text = "; ".join(f"{n} {parts[n]:.3g} ms" for n in reversed(names))
        return Plot("Time by part of a step", f"{total:.3g} ms a step in all.", to_svg(figure, "parts", "Time", text))


def all_plots(log: RunLog) -> list[Plot]:
    """Every figure for which the run has numbers, in reading order."""
    step_of = {"train": C1, "held out": C3}

    def pair(key: str, *, dense: bool = False) -> list[Curve]:
        curves = [Curve("train", *log.series(key), step_of["train"])]
        curves.append(Curve("held out", *log.series(key, of="evals"), step_of["held out"], points=True))
        if dense:
            curves.append(Curve("dense reference", *log.series(key, of="dense"), C2, dashed=True))
        return curves

    held = log.evals[-1].get("density_histogram") if log.evals else None
    plots = [
        line_plot("loss", "Loss", "Training loss, dead-latent term included.", [Curve("loss", *log.series("loss"))],
                  log=True),
        line_plot("fvu", "Fraction of variance unexplained",
                  "0 is perfect; 1 is no better than always answering the mean row.", pair("fvu", dense=True),
                  log=True),
        line_plot("clock", "FVU against the clock", "The same curves over seconds of training.",
                  [Curve("fastsae", *log.series("fvu", x="time_s"), C1),
                   Curve("dense reference", *log.series("fvu", of="dense", x="time_s"), C2, dashed=True)],
                  xlabel="seconds", log=True) if log.series("fvu", of="dense", x="time_s")[0] else None,
        gap_plot(log),
        line_plot("l0", "L0", "Active latents per token.", pair("l0"), from_zero=True),
        line_plot("dead", "Dead latents", "Latents that have not been active for a set number of tokens.",
                  [Curve("dead", *log.series("dead"))], from_zero=True),
        histogram_plot(held["edges"], held["counts"], held.get("never", 0)) if isinstance(held, dict) else None,
        line_plot("lr", "Learning rate", "With warm-up and decay.", [Curve("lr", *log.series("lr"))], from_zero=True),
        line_plot("grad", "Gradient norm", "Over all parameters, before any projection.",
                  [Curve("norm", *log.series("grad_norm"))], log=True),
        line_plot("redone", "Tokens encoded twice",
                  "Share of tokens whose fast selection had no certificate and was repeated; above 1 % costs speed.",
                  [Curve("share", *log.series("redone_share"))], from_zero=True),
        line_plot("speed", "Throughput", "Tokens per second of the whole loop, evaluations included.",
                  [Curve("fastsae", *log.series("tokens_per_s")),
                   Curve("dense reference", *log.series("tokens_per_s", of="dense"), C2, dashed=True)],
                  from_zero=True),
        parts_plot(step_parts(log)),
    ]  # fmt: skip
    return [plot for plot in plots if plot is not None]


def step_parts(log: RunLog) -> dict[str, float]:
    """{part: mean ms}: every numeric column whose name begins with ms_."""
    names = sorted({key for record in log.metrics for key in record if key.startswith("ms_")})
    means = {}
    for name in names:
        values = log.series(name)[1]
        if values:
            means[name.removeprefix("ms_").replace("_", " ")] = sum(values) / len(values)
    return means


def gap_plot(log: RunLog) -> Plot | None:
    """FVU of this run over the dense reference's at the same steps, as a difference in per cent."""
    dense = dict(zip(*log.series("fvu", of="dense"), strict=True))
    steps, ours = log.series("fvu")
    shared = [(s, 100 * (v / dense[s] - 1)) for s, v in zip(steps, ours, strict=True) if dense.get(s)]
    if not shared:
        return None
    worst = max(abs(v) for _, v in shared)
    return line_plot(
        "gap", "Difference to the dense reference",
        f"FVU relative to the dense reference at equal steps; at most {worst:.2g} % off.",
        [Curve("difference", [s for s, _ in shared], [v for _, v in shared])], ylabel="per cent",
    )  # fmt: skip
