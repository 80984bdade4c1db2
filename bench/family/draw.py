"""The family's tables and plots, from its result files and from nothing else; and its section of docs/benchmarks.md.

family.md, quality.svg (FVU against L0), speed.svg (how long the dense versions take), each with a PNG beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.family import speed
from bench.family.rules import MATRYOSHKA_TARGET
from bench.family.store import read
from bench.plot import milliseconds, pictures, save, table, with_numbers

BEGIN, END = "<!-- family: begin (python -m bench.family --part draw) -->", "<!-- family: end -->"
NO_RESULTS = "No results yet: `python -m bench.family` measures this machine and fills in this section."
COLORS = ("#3b6fb6", "#c2703d", "#5aa469", "#8a5aa4", "#b0a04f", "#b64a5a", "#4aa3a8", "#7a7a7a")
MARKERS = "os^Dv<>P"


def _entries(folder: Path, part: str) -> dict[str, dict[str, Any]]:
    path = folder / f"{part}.json"
    return read(path)["entries"] if path.exists() else {}


def speed_lines(entries: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A row for each rule: its step, the dense ones over it, the target."""
    lines = []
    for name, entry in entries.items():
        if "dense fp32" not in entry.get("times", {}):
            continue
        ours = entry["times"]["fastsae"]
        ratios = [f"{entry['times'][other]['ms'] / ours['ms']:.1f}×" for other in ("dense fp32", "dense bf16")]
        target = "-" if entry["target"] is None else f"{entry['target']}×"
        if "TopK" in entry["times"]:
            over = ours["ms"] / entry["times"]["TopK"]["ms"]
            target = f"{over:.2f}× TopK's time, at most {MATRYOSHKA_TARGET}×"
        spread = f"{milliseconds(ours['p20'])} – {milliseconds(ours['p80'])}"
        lines.append([name, f"{entry['l0']:.0f}", milliseconds(ours["ms"]), spread, *ratios, target])
    return lines


def quality_lines(entries: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A row for each run, in the order of the rules."""
    lines = []
    for key, entry in entries.items():
        times = entry.get("times")
        faster = "-" if times is None else f"{times['dense fp32']['ms'] / times['fastsae']['ms']:.1f}×"
        off = "-" if entry.get("off") is None else f"{entry['off']:.3%}"
        lines.append([
            key.rpartition("-")[0], f"{entry['l0']:.1f}", f"{entry['fvu']:.4f}", f"{entry['dead_share']:.1%}",
            f"{entry['tokens_per_s']:,.0f}", faster, off,
        ])  # fmt: skip
    return lines


def tables(folder: Path) -> str:
    """Both tables and what the other entries say, as Markdown."""
    timed, trained = _entries(folder, "speed"), _entries(folder, "quality")
    text = []
    if lines := speed_lines(timed):
        case = next(iter(timed.values()))["settings"]["case"]
        text.append(f"A whole training step, N={case['N']}, D={case['D']}, M={case['M']}, random inputs and weights:")
        header = ["rule", "L0", "ms", "p20 – p80", "dense fp32 takes", "dense bf16 takes", "target"]
        text.append(table(header, lines))
    densities = [entry for key, entry in timed.items() if key.startswith("crossing-")]
    if densities:
        where = speed.crossing(densities)
        rows = [[f"{e['density']:.1%}", *(milliseconds(e["times"][way]["ms"]) for way in ("sparse", "dense"))]
                for e in densities]  # fmt: skip
        crossing = "one way is faster at all of them" if where is None else f"they are equal at {where:.1%}"
        text.append(f"ReLU's step at other densities, the sparse and the dense way ({crossing}):")
        text.append(table(["latents active", "sparse, ms", "dense, ms"], rows))
    if "ragged" in timed:
        entry = timed["ragged"]
        over = entry["times"]["BatchTopK"]["ms"] / entry["times"]["TopK"]["ms"]
        text.append(
            f"With rows of very uneven scale, BatchTopK's longest token has {entry['longest']:,.0f} latents, the mean "
            f"{entry['l0']:.0f}; its step takes {over:.2f}× as long as TopK's of the same size."
        )
    if lines := quality_lines(trained):
        s = next(iter(trained.values()))["settings"]
        text.append(
            f"Real activations (SmolLM2-135M, layer 15), M={s['M']}, {s['steps']} steps of {s['batch']} "
            f"tokens, learning rate {s['lr']}; the last two columns are against the dense fp32 version of the rule, "
            f"over the first {s['dense_steps']} steps, on the same batches in the same run:"
        )
        header = ["rule", "L0", "FVU", "dead", "tokens/s", "dense takes", "curves differ by"]
        text.append(table(header, lines))
    return "\n\n".join(text) + "\n"


def quality_figure(entries: dict[str, dict[str, Any]]) -> Figure:
    """FVU against L0, a line for each rule."""
    by_rule: dict[str, list[tuple[float, float]]] = {}
    for key, entry in entries.items():
        by_rule.setdefault(key.rpartition("-")[0], []).append((entry["l0"], entry["fvu"]))
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for (name, points), color, marker in zip(by_rule.items(), COLORS, MARKERS, strict=False):
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, color=color, marker=marker, markersize=5, linewidth=1.5, label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("L0: active latents per token, held-out rows")
    axes.set_ylabel("FVU: variance unexplained, held-out rows")
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=2)
    return figure


def speed_figure(entries: dict[str, dict[str, Any]]) -> Figure:
    """How many times as long the dense versions take, a pair of bars for each rule, and the target as a mark."""
    names = [name for name, entry in entries.items() if "dense fp32" in entry.get("times", {})][::-1]
    figure = Figure(figsize=(7.2, 0.6 * len(names) + 1.1), layout="constrained")
    axes = figure.subplots()
    for other, color, up in (("dense fp32", "#3b6fb6", 0.19), ("dense bf16", "#9db7da", -0.19)):
        ratios = [entries[n]["times"][other]["ms"] / entries[n]["times"]["fastsae"]["ms"] for n in names]
        bars = axes.barh([i + up for i in range(len(names))], ratios, height=0.36, color=color, label=other)
        axes.bar_label(bars, [f"{ratio:.1f}×" for ratio in ratios], padding=4, fontsize=9)
    targets = [(entries[n]["target"], i + 0.19) for i, n in enumerate(names) if entries[n]["target"] is not None]
    if targets:
        xs, ys = zip(*targets, strict=True)
        axes.plot(xs, ys, "k|", markersize=14, markeredgewidth=2, label="target of fp32")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("dense step over fastsae's, whole training step")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.45, 1.0))
    return figure


def draw(folder: Path) -> list[Path]:
    """Writes every output that has results; returns the files."""
    written = []
    text = tables(folder)
    if text.strip():
        path = folder / "family.md"
        path.write_text(text)
        written.append(path)
    for part, make in (("quality", quality_figure), ("speed", speed_figure)):
        entries = _entries(folder, part)
        if any("fvu" in entry or "dense fp32" in entry["times"] for entry in entries.values()):
            save(make(entries), folder, part)
            written += [folder / f"{part}.{kind}" for kind in ("svg", "png")]
    return written


def section(results_folder: Path, page: Path) -> str:
    """The section of docs/benchmarks.md: every device's tables and plots."""
    blocks = []
    for folder in sorted(results_folder.glob("*/family")):
        text = tables(folder).strip()
        blocks += [f"### {folder.parent.name}: the family", text, *pictures(folder, page)] if text else []
    return "\n\n".join(blocks) or NO_RESULTS


def renew_page(results_folder: Path, page: Path) -> None:
    """Puts the section between the page's markers. Raises ValueError where they are missing."""
    page.write_text(with_numbers(page.read_text(), section(results_folder, page), BEGIN, END))
