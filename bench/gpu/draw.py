"""The plots: roofline of the ops, breakdown of a step, scaling over the sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.cases import Case
from bench.gpu.cost import Ceilings, of
from bench.gpu.plan import OPS
from bench.gpu.sections import label
from bench.gpu.targets import is_of
from bench.plot import COLORS, PARTS, save

Row = Mapping[str, Any]
MARKERS = {"small": "o", "big": "s", "zipf": "^", "hot": "v"}
PALETTE = ("#3b6fb6", "#c2703d", "#5aa469", "#8a5fa8", "#b0a04f", "#50a5b1", "#a85f6d", "#6b7785", "#2f4858")


def case_of(row: Row) -> Case:
    return Case(row["case"], row["N"], row["D"], row["M"], row["K"])


def roofline(flat: Sequence[Row], ceilings: Ceilings, folder: Path) -> str | None:
    """Operations per second over operations per byte, each op against the copy's and the products' ceilings."""
    shown = [r for r in flat if r["job"].startswith("ops-") and r["item"] in OPS and r["part"] and r["tflops"]]
    if not shown or not (ceilings.copy and ceilings.fp32 and ceilings.narrow):
        return None
    figure = Figure(figsize=(7, 4.6))
    axes: Axes = figure.subplots()
    places = []
    for r in shown:
        cost = of(r["item"], case_of(r), r["nnz"])
        assert cost is not None
        places.append(cost.flops / cost.bytes)
        color = PALETTE[OPS.index(r["item"]) % len(PALETTE)]
        # The first backend's marks are filled.
        fill = "full" if r["backend"] == shown[0]["backend"] else "none"
        axes.plot(places[-1], r["tflops"], MARKERS.get(r["case"], "x"), color=color, markersize=7, fillstyle=fill)
    ridge = max(ceilings.narrow, ceilings.fp32) / ceilings.copy
    low, high = min(*places, ridge) / 2, max(*places, ridge) * 4
    for rate, name in ((ceilings.narrow, "16-bit product"), (ceilings.fp32, "fp32 product")):
        line = [low, rate / ceilings.copy, high]
        axes.plot(line, [low * ceilings.copy / 1e12, rate / 1e12, rate / 1e12], "k-", linewidth=0.8)
        va = "bottom" if rate == max(ceilings.narrow, ceilings.fp32) else "top"
        axes.annotate(f"{name}, {rate / 1e12:.3g} TFLOP/s", (high, rate / 1e12), ha="right", va=va, fontsize=8)
    axes.annotate(f"copy, {ceilings.copy / 1e9:,.0f} GB/s", (low * 1.2, low * 1.2 * ceilings.copy / 1e12), rotation=30,
                  fontsize=8, va="bottom")  # fmt: skip
    for op in OPS:
        if any(r["item"] == op for r in shown):
            axes.plot([], [], "o", color=PALETTE[OPS.index(op) % len(PALETTE)], label=op)
    for case in dict.fromkeys(r["case"] for r in shown):
        axes.plot([], [], MARKERS.get(case, "x"), color="black", markerfacecolor="none", label=f"{case} case")
    for backend in dict.fromkeys(r["backend"] for r in shown):
        fill = "full" if backend == shown[0]["backend"] else "none"
        axes.plot([], [], "D", color="black", fillstyle=fill, label=backend)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte, at least (bench/gpu/cost.py)")
    axes.set_ylabel("TFLOP/s")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, folder, "roofline")
    return "roofline"


def breakdown(flat: Sequence[Row], folder: Path) -> str | None:
    """The parts of fastsae's step, a bar for each case, in per cent of the step; its ms beside the name."""
    mine = [r for r in flat if r["item"] == "fastsae by part" and r["part"]]
    cases = [(r["case"], r["backend"]) for r in mine if r["part"] == "step"]
    if not cases:
        return None
    times = {((r["case"], r["backend"]), r["part"]): r["ms"] for r in mine}
    totals = {case: sum(times.get((case, f"part {part}"), 0.0) for part in PARTS) for case in cases}
    labels = [f"{case[0]}, {case[1]} ({times[case, 'step']:.3g} ms)" for case in cases]
    figure = Figure(figsize=(7, 0.5 * len(cases) + 1.2))
    axes: Axes = figure.subplots()
    left = [0.0] * len(cases)
    for part in PARTS:
        widths = [100 * times.get((case, f"part {part}"), 0.0) / (totals[case] or 1) for case in cases]
        bars = axes.barh(labels, widths, left=left, color=COLORS[part], label=part)
        marks = [
            f"{times.get((case, f'part {part}'), 0.0):.2g}" if w > 6 else ""
            for case, w in zip(cases, widths, strict=True)
        ]
        axes.bar_label(bars, marks, label_type="center", color="white", fontsize=8)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_xlabel("per cent of the step, op by op (numbers in the bars: ms)")
    axes.legend(ncols=len(PARTS), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, folder, "breakdown")
    return "breakdown"


def scaling(flat: Sequence[Row], folder: Path) -> str | None:
    """fastsae's times as one size grows, both axes logarithmic; a dotted line is linear growth from the first point."""
    mine = [r for r in flat if r["job"].startswith("sweep-") and r["part"]]
    backends = list(dict.fromkeys(r["backend"] for r in mine if r["item"] == "sweep-base"))
    if not backends:
        return None
    figure = Figure(figsize=(11, 2.8))
    for axes, axis in zip(figure.subplots(1, 4), "NDMK", strict=True):
        for color, backend in zip(PALETTE, backends, strict=False):
            line = [
                r for r in mine if r["backend"] == backend and r["item"].startswith(("sweep-base", f"sweep-{axis}-"))
            ]
            line.sort(key=lambda r: r[axis])
            for part, style in (("step", "-"), ("encode", "--"), ("part decode", ":"), ("part update", "-.")):
                points = [(r[axis], r["ms"]) for r in line if r["part"] == part]
                if points:
                    name = f"{part.removeprefix('part ')}, {backend}"
                    axes.plot(*zip(*points, strict=True), f"o{style}", color=color, markersize=3, label=name)
            steps = [(r[axis], r["ms"]) for r in line if r["part"] == "step"]
            if steps:
                (size, ms), sizes = steps[0], [size for size, _ in steps]
                axes.plot(sizes, [ms * s / size for s in sizes], color="#9aa5b1", linewidth=0.8, linestyle="dotted")
                axes.set_xscale("log", base=2)
                axes.set_yscale("log", base=2)
                axes.set_xticks(sizes, [str(size) for size in sizes], rotation=40)
                axes.minorticks_off()
        axes.set_xlabel(axis)
    figure.axes[0].set_ylabel("ms")
    figure.axes[0].legend(frameon=False, fontsize=6)
    save(figure, folder, "scaling")
    return "scaling"


def contestants(flat: Sequence[Row], folder: Path) -> str | None:
    """Tokens per second of whole training steps, the small and the big case side by side."""
    cases = [case for case in ("small", "big") if any(is_of(r["job"], "steps", case) for r in flat)]
    found = {case: [r for r in flat if (is_of(r["job"], "steps", case) or r["job"] == f"more-steps-{case}")
                    and r["part"] == "step" and r["item"] != "fastsae by part"] for case in cases}  # fmt: skip
    found = {case: sorted(rows, key=lambda r: -r["ms"]) for case, rows in found.items() if rows}
    if not found:
        return None
    figure = Figure(figsize=(6 * len(found), 0.35 * max(map(len, found.values())) + 1.2), layout="constrained")
    for axes, (case, rows) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        colors = ["#c2703d" if r["item"].startswith("fastsae") else "#9aa5b1" for r in rows]
        bars = axes.barh([label(r) for r in rows], [r["tokens_per_s"] for r in rows], color=colors)
        axes.bar_label(bars, [f"{r['tokens_per_s']:,.0f}" for r in rows], padding=3, fontsize=8)
        axes.set_xlim(right=1.2 * max(r["tokens_per_s"] for r in rows))
        axes.set_xlabel(f"tokens per second, whole step, {case} case")
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, folder, "contestants")
    return "contestants"


def draw(flat: Sequence[Row], ceilings: Mapping[str, Any], folder: Path) -> list[str]:
    """Every plot for which there are results; returns their names."""
    rates = Ceilings.of(ceilings)
    flat = [{"case": None, "part": "", "backend": None} | dict(row) for row in flat]
    made = (contestants(flat, folder), roofline(flat, rates, folder), breakdown(flat, folder), scaling(flat, folder))
    return [name for name in made if name is not None]
