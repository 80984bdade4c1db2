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
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

_INKS = {
    "#010101": "--ink",
    "#010102": "--muted",
    "#010103": "--grid",
    "#010104": "--c1",
    "#010105": "--c2",
    "#010106": "--c3",
    "#010107": "--c4",
    "#010108": "--c5",
    "#010109": "--c6",
    "#01010a": "--c7",
    "#01010b": "--c8",
    "#01010c": "--c9",
}
LABEL = 24
"""Characters of a bar's name at most, to leave room for the bar; the description has the full name."""
INK, MUTED, GRID, *CURVES = _INKS
C1, C2, C3 = CURVES[:3]
SHAPES: tuple[tuple[Any, str], ...] = (
    ("-", "o"), ((0, (4, 2)), "s"), ((0, (1, 1.5)), "^"), ((0, (4, 1.5, 1, 1.5)), "D"), ((0, (8, 2)), "v"),
)  # fmt: skip
"""Line styles with their markers: a second property of a line beside its colour."""

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
_RING: dict[str, Any] = {
    "color": INK, "linestyle": "", "marker": "o", "markersize": 10, "markerfacecolor": "none", "markeredgewidth": 0.9,
}  # fmt: skip


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


@dataclasses.dataclass(frozen=True)
class Group:
    """Measurements of one kind, of several sizes of which this is one: points, and a line through other points."""

    kind: str
    size: str
    points: Sequence[tuple[float, float]]
    best: Sequence[bool]
    """Which points get a ring."""
    line: Sequence[tuple[float, float]]


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


def _axes(height: float = 2.4, width: float = 4.0) -> tuple[Figure, Axes]:
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
                linestyle=(0, (4, 2)) if curve.dashed else "-", linewidth=2.4 if curve.dashed else None,
            )  # fmt: skip
        values = [v for c in curves for v in c.y]
        if log and min(values) > 0 and max(values) > 1.5 * min(values):
            axes.set_yscale("log")
            _log_ticks(axes.yaxis, (1.0, 2.0, 5.0))
        elif from_zero:
            # A curve that is 0 throughout would lie on the axis and look as if it were missing.
            axes.set_ylim(bottom=0 if max(values) else -0.1, top=max(values) * 1.08 or 1.0)
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


def _log_ticks(axis: Axis, subs: Sequence[float]) -> None:
    """Plain numbers at these multiples of powers of ten."""
    axis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter("{x:g}")


def front_plot(
    name: str,
    title: str,
    caption: str,
    groups: Sequence[Group],
    *,
    xlabel: str,
    ylabel: str,
    level: tuple[str, float] | None = None,
) -> Plot | None:
    """Points in groups, a colour for each kind and a line style and marker for each size; a ring around the best.

    level: name and height of a horizontal line. x is logarithmic where the points span more than a factor of 2. None if
    there are no points.
    """
    groups = [group for group in groups if group.points]
    if not groups:
        return None
    kinds, sizes = (list(dict.fromkeys(getattr(group, which) for group in groups)) for which in ("kind", "size"))
    inks = {kind: CURVES[i % len(CURVES)] for i, kind in enumerate(kinds)}
    shapes = {size: SHAPES[i % len(SHAPES)] for i, size in enumerate(sizes)}
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(3.9, 5.2)
        for group in groups:
            dashes, marker = shapes[group.size]
            ink = inks[group.kind]
            axes.plot(*zip(*group.line, strict=True), color=ink, linestyle=dashes)
            axes.plot(*zip(*group.points, strict=True), color=ink, linestyle="", marker=marker, markersize=4.5)
            if best := [point for point, is_best in zip(group.points, group.best, strict=True) if is_best]:
                axes.plot(*zip(*best, strict=True), **_RING)
        every = [point for group in groups for point in group.points]
        lowest, highest = min(x for x, _ in every), max(x for x, _ in every)
        if lowest > 0 and highest > 2 * lowest:
            axes.set_xscale("log")
            _log_ticks(axes.xaxis, (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
        handles = [Line2D([], [], color=ink, label=kind) for kind, ink in inks.items()]
        if len(sizes) > 1:
            handles += [Line2D([], [], color=MUTED, linestyle=dashes, marker=marker, markersize=4.5, label=size)
                        for size, (dashes, marker) in shapes.items()]  # fmt: skip
        handles.append(Line2D([], [], label="no other is lower in both", **_RING))
        if level is not None:
            axes.axhline(level[1], color=MUTED, linestyle=(0, (2, 2)), linewidth=1.0)
            handles.append(Line2D([], [], color=MUTED, linestyle=(0, (2, 2)), linewidth=1.0, label=level[0]))
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        figure.legend(handles=handles, loc="outside lower center", ncols=3, handlelength=2.4)
        text = "; ".join(
            f"{group.kind}, {group.size}: " + ", ".join(f"{y:.4g} at {x:.4g}" for x, y in group.points)
            for group in groups
        )
        return Plot(title, caption, to_svg(figure, name, title, text + "."))


def side_by_side(plots: Sequence[Plot], css: str) -> str:
    """The plots as one SVG file, in the colours that the page's `css` has for a light screen."""
    colours = dict(re.findall(r"(--[\w-]+): (#\w+)", css.partition("@media")[0]))
    sizes = [re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', plot.svg) for plot in plots]
    widths, heights = ([float(size[i]) for size in sizes if size] for i in (1, 2))
    parts = [
        plot.svg.replace("<svg ", f'<svg x="{sum(widths[:i]):g}" width="{widths[i]:g}" height="{heights[i]:g}" ', 1)
        for i, plot in enumerate(plots)
    ]
    text = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {sum(widths):g} {max(heights):g}">'
        f'<rect width="100%" height="100%" fill="var(--card)"/>{"".join(parts)}</svg>\n'
    )
    return re.sub(r"var\((--[\w-]+)\)", lambda found: colours[found[1]], text)


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
