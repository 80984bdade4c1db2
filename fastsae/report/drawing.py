"""Line, bar and histogram plots by matplotlib, as inline SVG that follows the page's colours.

matplotlib has no CSS variables, so a figure is drawn in marker colours that occur nowhere else (`_INKS`), then these
are replaced by `var(--...)` in the SVG. Text stays text (fonttype none): small, selectable, searchable.
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

_INKS = {
    "#010101": "--ink",
    "#010102": "--muted",
    "#010103": "--grid",
    "#010104": "--c1",
    "#010105": "--c2",
    "#010106": "--c3",
}
LABEL = 24
"""Characters of a bar's name at most, to leave room for the bar; the description has the full name."""
INK, MUTED, GRID, C1, C2, C3 = _INKS

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "text.parse_math": False,  # a "$" in a name from a file is a dollar
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
    """Safe to embed: all its text is escaped."""


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
    """The figure as an <svg> element for inlining: page colours, own ids, title and description for screen readers."""
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


def _axes(height: float = 2.4) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.0, height), layout="constrained")
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
    """The curves that have points, or None if none has. `log` is ignored if a value is not positive."""
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


def histogram_plot(
    edges: Sequence[float], counts: Sequence[int], never: int, *, where: str = "", name: str = "density"
) -> Plot | None:
    """Latents by log10 density; those that never fired are a separate bar on the left. where: ends the title."""
    if not counts or not (sum(counts) or never):
        return None
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes()
        width = edges[1] - edges[0]
        axes.bar(edges[:-1], counts, width=width * 0.92, align="edge", color=C1)
        if never:
            axes.bar([edges[0] - 4 * width], [never], width=width * 0.92, align="edge", color=C2)
        ticks = [e for e in edges if abs(e - round(e)) < 1e-6]
        labels = [f"{10 ** round(t) * 100:g} %" for t in ticks]
        if never:
            ticks, labels = [edges[0] - 3.5 * width, *ticks], ["never", *labels]
        axes.set_xticks(ticks, labels)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("share of tokens on which a latent is active (log scale)")
        axes.set_ylabel("latents")
        total = sum(counts) + never
        top = max(range(len(counts)), key=lambda i: counts[i])
        text = f"{total} latents, {never} never active; most lie between 10^{edges[top]:g} and 10^{edges[top + 1]:g}."
        return Plot(
            f"Latent density{where}", f"{total:,} latents on the held-out rows; {never:,} of them were active on none.",
            to_svg(figure, name, f"Latent density{where}", text),
        )  # fmt: skip


def bar_plot(name: str, title: str, caption: str, bars: dict[str, float], *, shares: bool = False) -> Plot | None:
    """Milliseconds by name, the longest on top; None if there are none."""
    bars = {label: ms for label, ms in bars.items() if ms > 0}
    if not bars:
        return None
    total = sum(bars.values())
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(height=max(1.2, 0.36 * len(bars) + 0.75))
        labels = sorted(bars, key=lambda n: bars[n])
        values = [bars[n] for n in labels]
        axes.barh(range(len(labels)), values, color=C1, height=0.62)
        axes.set_yticks(range(len(labels)), [n if len(n) <= LABEL else n[: LABEL - 1] + "…" for n in labels])
        for row, value in enumerate(values):
            share = f" ({value / total:.0%})" if shares else ""
            axes.annotate(
                f"{_ms(value)}{share}", (value, row), (4, 0), textcoords="offset points", va="center", color=INK,
                fontsize=8.5,
            )  # fmt: skip
        axes.set_xlim(0, max(values) * 1.45)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("milliseconds per step")
        text = "; ".join(f"{n} {_ms(bars[n])}" for n in reversed(labels)) + "."
        return Plot(title, caption, to_svg(figure, name, title, text))


def _ms(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"
