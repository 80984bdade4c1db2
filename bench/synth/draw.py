"""synth.md and synth.svg, with a PNG beside it, from synth.json and from nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.family.store import read
from bench.plot import milliseconds, save, table
from bench.synth.run import ALLOWED, is_off
from bench.synth.trainers import RULES

SAMPLES = 200_000_000
"""What the published SAEs were trained on."""
METRICS = {"f1_score": "F1", "mcc": "MCC", "uniqueness": "uniqueness", "explained_variance": "explained variance"}
PUBLISHED = {
    "BatchTopK": (0.7316, 0.7574, 0.9837, 0.7923),
    "Matryoshka": (0.8793, 0.7927, 0.9987, 0.7792),
    "JumpReLU": (0.7317, 0.7527, 0.9885, 0.7951),
}
"""METRICS at L0 25, means of five seeds. Source: docs/synth_sae_bench.md of SAELens, which has no TopK."""
LOOKS = {"fastsae": ("#c2703d", "o"), "sae-lens": ("#3b6fb6", "s"), "published": ("#7a7a7a", "D")}


def by_length(entries: dict[str, dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The entries of each run (equal settings but for the rule), the longest run first, rules in their order."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for entry in entries.values():
        settings = {**entry["settings"], "rule": ""}
        runs.setdefault(repr(sorted(settings.items())), []).append(entry)
    for run in runs.values():
        run.sort(key=lambda entry: RULES.index(entry["settings"]["rule"]))
    return sorted(runs.values(), key=lambda run: -run[0]["settings"]["samples"])


def lines(run: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each trainer of each rule, and one for what was published."""
    rows = []
    for entry in run:
        rule, k = entry["settings"]["rule"], entry["settings"]["k"]
        ours = entry["trainers"]["fastsae"]
        for name, found in entry["trainers"].items():
            mark = " †" if is_off(found, k) else ""
            step = found["step"]
            rows.append([
                rule, f"**{name}**" if name == "fastsae" else f"{name} {entry['versions'][name]}",
                *(f"{found[metric]:.3f}" for metric in METRICS), f"{found['sae_l0']:.1f}{mark}",
                f"{found['dead_latents']:,}", milliseconds(step["ms"]),
                f"{milliseconds(step['p20'])} – {milliseconds(step['p80'])}",
                f"{step['ms'] / ours['step']['ms']:.1f}×", milliseconds(found["cpu_step"]["ms"]),
                f"{found['cpu_step']['ms'] / ours['cpu_step']['ms']:.1f}×",
            ])  # fmt: skip
        if rule in PUBLISHED:
            shown = [f"*{value:.3f}*" for value in PUBLISHED[rule]]
            rows.append([rule, f"*published, {SAMPLES / 1e6:.0f}M samples*", *shown, "*25*", *["-"] * 6])
    return rows


def about(run: list[dict[str, Any]]) -> str:
    """Where, how long and on what the run was; and how far it is from the published one."""
    entry, s = run[0], run[0]["settings"]
    trained = s["samples"] // s["batch"] * s["batch"]
    world = (
        f"the saved model {s['world']}" if s["world"] else "the published settings (the published samples have others)"
    )
    busy = "" if entry["others"] is None else f" Other programs took {entry['others']:.0%} of all cores meanwhile."
    short = (
        f"**{trained:,} samples are {trained / SAMPLES:.2%} of the {SAMPLES / 1e6:.0f}M behind the published rows, so "
        "these figures say nothing about who reaches the published ones: compare the two trainers with each other.** "
        if trained < SAMPLES else ""
    )  # fmt: skip
    seconds = "; ".join(
        f"{e['settings']['rule']} " + ", ".join(f"{n} {f['seconds']:,.0f}" for n, f in e["trainers"].items())
        for e in run
    )
    return (
        f"{trained:,} samples in batches of {s['batch']:,}, {s['features']:,} features in {s['D']} dimensions made "
        f"from {world}, M={s['M']}, learning rate {s['lr']}, metrics on {s['eval_samples']:,} held-out samples. {short}"
        f"{entry['device']}, {entry['threads']} threads, torch {entry['versions']['torch']}, SAELens in "
        f"{'bf16 autocast' if s['autocast'] else 'fp32'}, commit {entry['commit']}, {entry['date'][:10]}.{busy} "
        f"The trainers took turns on the same batches (digest {entry['digest']}). Seconds of all steps: {seconds}; the "
        f"generator {entry['generator_seconds']:,.0f}, once for all of them."
    )


def text(entries: dict[str, dict[str, Any]]) -> str:
    """The Markdown of every run."""
    header = [
        "rule", "trainer", *METRICS.values(), "L0", "dead", "ms a step", "p20 – p80", "takes", "CPU ms a step", "takes"
    ]  # fmt: skip
    blocks = ["# SynthSAEBench-16k: fastsae beside SAELens"]
    for run in by_length(entries):
        blocks += [about(run), table(header, lines(run))]
    blocks.append(
        f"*takes*: how many times fastsae's time. †: more than {ALLOWED:.0%} off the L0 asked for, so neither quality "
        "nor time stands beside the others. Published: SAELens's documentation, L0 25, five seeds."
    )
    return "\n\n".join(blocks) + "\n"


def figure(run: list[dict[str, Any]]) -> Figure:
    """A panel for each of three metrics and one for the time of a step; a row for each rule."""
    drawn = Figure(figsize=(10, 0.55 * len(run) + 1.5), layout="constrained")
    panels = drawn.subplots(1, 4, sharey=True)
    names = [entry["settings"]["rule"] for entry in run][::-1]
    for axes, metric in zip(panels, ("f1_score", "mcc", "explained_variance", "step"), strict=True):
        for trainer, (color, marker) in LOOKS.items():
            points = []
            for y, entry in enumerate(run[::-1]):
                rule, found = entry["settings"]["rule"], entry["trainers"].get(trainer)
                if found is not None:
                    points.append((found["step"]["ms"] if metric == "step" else found[metric], y))
                elif metric != "step" and rule in PUBLISHED:
                    points.append((PUBLISHED[rule][list(METRICS).index(metric)], y))
            if points:
                xs, ys = zip(*points, strict=True)
                face = "none" if trainer == "published" else color
                label = f"published, {SAMPLES / 1e6:.0f}M samples" if trainer == "published" else trainer
                axes.plot(xs, ys, marker, color=color, markerfacecolor=face, markersize=7, label=label)
        axes.set_xlabel(METRICS.get(metric, "ms a step"))
        axes.margins(x=0.1, y=0.2)
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, frameon=False, ncols=3, loc="outside upper center")
    return drawn


def draw(folder: Path) -> list[Path]:
    """Writes table and plot (of the longest run), if there are results; returns the files."""
    path = folder / "synth.json"
    entries = read(path)["entries"] if path.exists() else {}
    if not entries:
        return []
    (folder / "synth.md").write_text(text(entries))
    save(figure(by_length(entries)[0]), folder, "synth")
    return [folder / name for name in ("synth.md", "synth.svg", "synth.png")]
