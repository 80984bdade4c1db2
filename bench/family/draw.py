"""The family's table and plots, from its result files and from nothing else: family.md, family.svg, family.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from bench.family import speed
from bench.family.rules import MATRYOSHKA_TARGET
from bench.family.store import read
from bench.plot import milliseconds, table

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
            f"Real activations (SmolLM2-135M, layer 15, D={s['D']}), M={s['M']}, {s['steps']} steps of {s['batch']} "
            f"tokens, learning rate {s['lr']}; the last two columns are against the rule's dense fp32 version over "
            f"the first {s['dense_steps']} steps, on the same batches in the same run:"
        )
        header = ["rule", "L0", "FVU", "dead", "tokens/s", "dense takes", "curves differ by"]
        text.append(table(header, lines))
    return "\n\n".join(text) + "\n"


def figure(folder: Path) -> Figure | None:
    """FVU against L0, a line for each rule; None without results."""
    trained = _entries(folder, "quality")
    if not trained:
        return None
    by_rule: dict[str, list[tuple[float, float]]] = {}
    for key, entry in trained.items():
        by_rule.setdefault(key.rpartition("-")[0], []).append((entry["l0"], entry["fvu"]))
    fig = Figure(figsize=(7.2, 4.4), layout="constrained")
    ax = fig.subplots()
    for (name, points), color, marker in zip(by_rule.items(), COLORS, MARKERS, strict=False):
        xs, ys = zip(*sorted(points), strict=True)
        ax.plot(xs, ys, color=color, marker=marker, markersize=5, linewidth=1.5, label=name)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xlabel("L0: active latents per token, held-out rows")
    ax.set_ylabel("FVU: variance unexplained")
    ax.grid(color="#dddddd", linewidth=0.7)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.legend(frameon=False, ncols=2)
    return fig


def draw(folder: Path) -> list[Path]:
    """Writes what there are results for; returns the files."""
    written = []
    text = tables(folder)
    if text.strip():
        path = folder / "family.md"
        path.write_text(text)
        written.append(path)
    fig = figure(folder)
    if fig is not None:
        with matplotlib.rc_context({"svg.hashsalt": "fastsae"}):
            for kind in ("svg", "png"):
                path = folder / f"family.{kind}"
                fig.savefig(path, dpi=150, metadata={"Date": None} if kind == "svg" else None)
                written.append(path)
    return written
