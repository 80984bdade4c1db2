"""Shared by the pictures of all systems: style, panels, and atomic writing of files."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastsae.atomic import replace_file

P = ParamSpec("P")
INK, MUTED, FAINT = "#222222", "#8a8a8a", "#dcdcdc"
COLOURS = {"faithful": "#3b6fb6", "better": "#c2703d", "k_means": "#5aa469", "published": INK}
STYLE: dict[Any, Any] = {
    "font.size": 9.0, "axes.titlesize": 9.5, "text.parse_math": False, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": MUTED, "xtick.color": MUTED, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "axes.axisbelow": True,
}  # fmt: skip
DPI = 130


def styled(draw: Callable[P, None]) -> Callable[P, None]:
    """Draws in this style; matplotlib reads the style whenever something is added to a figure."""

    @functools.wraps(draw)
    def in_style(*args: P.args, **kwargs: P.kwargs) -> None:
        with matplotlib.rc_context(STYLE):
            draw(*args, **kwargs)

    return in_style


def panels(n: int, *, columns: int | None = None, size: tuple[float, float] = (2.0, 2.0)) -> tuple[Figure, list[Axes]]:
    """A figure with n panels of `size` inches in rows."""
    columns = columns or (math.ceil(math.sqrt(1.6 * n)) if n > 2 else n)
    rows = math.ceil(n / columns)
    figure = Figure(figsize=(columns * size[0], rows * size[1] + 0.4), layout="constrained", dpi=DPI)
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(n)]


def plane(axes: Axes) -> Axes:
    """Axes for points in the plane: equal scales, no ticks."""
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG atomically; the same figure gives the same bytes."""
    canvas = FigureCanvasAgg(figure)
    replace_file(path, lambda partial: canvas.print_png(partial, metadata={"Software": None}))


def palette(n: int) -> Sequence[Any]:
    """n colours, different for consecutive numbers."""
    return [matplotlib.colormaps["tab20"]((i % 10) * 2 + i // 10) for i in range(n)]
