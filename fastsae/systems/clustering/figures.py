"""Tables and pictures of the `clustering` system."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from fastsae.systems.clustering import points
from fastsae.systems.clustering import system as clustering
from fastsae.systems.clustering.system import SUCCESS, Experiment, Shown
from fastsae.systems.page import About
from fastsae.systems.pictures import COLOURS, FAINT, INK, MUTED, palette, panels, plane, save, styled
from fastsae.systems.results import Table, interval, median
from fastsae.systems.runner import System

LABELS = {"faithful": "the published recipe", "better": "better recipe", "k_means": "k-means++, best of 10"}
FIRST = "entropy.png"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _measured(record: Mapping[str, Any], recipe: str, metric: str = "entropy", spread: bool = False) -> str:
    """ "median (successes of all)", with the interval of the median where asked."""
    values = record.get(recipe, {}).get(metric)
    if values is None:
        return "-"
    low, high = interval(values)
    between = f" [{low:.3f} – {high:.3f}]" if spread else ""
    return f"{median(values):.3f}{between} ({sum(v < SUCCESS for v in values)}/{len(values)})"


def _published(given: Mapping[str, Any]) -> str:
    share = f" ({given['share'] * 10:.0f}/10)" if "share" in given else ""
    return _number(given.get("median")) + share


def tables(records: Mapping[str, Any]) -> list[Table]:
    """Entropies beside the published ones, each seed's, test loss by latents, the effect of each change."""
    header = ["median entropy (below 0.1)", "published", "ours, faithful", "ours, better", "k-means, published",
              "k-means, ours"]  # fmt: skip
    lines = []
    for name, record in records.items():
        if name.startswith(("features-", "stage-")):
            continue
        given = record["published"]
        faithful, better = _measured(record, "faithful", spread=True), _measured(record, "better")
        ours = _measured(record, "k_means")
        lines.append([record["title"], _published(given), faithful, better, _number(given.get("k_means")), ours])
        if name in points.CLASSES:
            adjoint = [_measured(record, recipe, "adjoint", recipe == "faithful") for recipe in ("faithful", "better")]
            lines.append([f"{record['title']}, adjoint", _number(given.get("adjoint")), *adjoint, "-", "-"])
    found = [Table(header, lines)] if lines else []
    if seeds := _seeds(records):
        found.append(seeds)
    if losses := _losses(records):
        found.append(
            Table(["latents, basic blobs", *map(str, losses)], [["test loss", *(_number(v) for v in losses.values())]])
        )
    if stages := _stages(records):
        found.append(Table(["changes of the recipe, one at a time", *stages[0]], stages[1]))
    return found


def _seeds(records: Mapping[str, Any]) -> Table | None:
    """Every seed's entropy by the better recipe, and by k-means."""
    lines = []
    for name in points.CLASSES:
        for key in ("better", "k_means"):
            if values := records.get(name, {}).get(key, {}).get("entropy"):
                below = f"{sum(value < SUCCESS for value in values)}/{len(values)}"
                lines.append([f"{records[name]['title']}, {LABELS[key]}", below, *(f"{value:.3f}" for value in values)])
    most = max((len(line) for line in lines), default=0)
    header = ["entropy of each seed", f"below {SUCCESS:g}", *(f"seed {i}" for i in range(most - 2))]
    return Table(header, [[*line, *["-"] * (most - len(line))] for line in lines]) if lines else None


def _losses(records: Mapping[str, Any]) -> dict[int, float]:
    """The published recipe's median test loss on basic blobs, by the number of latents."""
    named = {"basic_blobs": points.CLASSES["basic_blobs"], **{f"features-{n}": n for n in range(2, 9)}}
    found = {n: median(records[name]["faithful"]["test_loss"]) for name, n in named.items() if name in records}
    return dict(sorted(found.items())) if len(found) > 1 else {}


def _stages(records: Mapping[str, Any]) -> tuple[list[str], list[list[str]]] | None:
    """The datasets, and each stage's entropies on them."""
    datasets = [d for d in points.CLASSES if f"stage-restarts-{d}" in records and d in records]
    if not datasets:
        return None
    lines = [["the published recipe", *(_measured(records[d], "faithful") for d in datasets)]]
    for stage, title in clustering.STAGES.items():
        one = [records.get(f"stage-{stage}-{d}", {}) for d in datasets]
        lines.append([title, *(_measured(record, "better") for record in one)])
    lines.append(["and the spectral embedding: better", *(_measured(records[d], "better") for d in datasets)])
    on_embedding = [_measured(records[d], "better", "k_means_on_embedding") for d in datasets]
    lines.append(["k-means on that embedding", *on_embedding])
    return [d.replace("_", " ") for d in datasets], lines


# -- pictures ---------------------------------------------------------------------------------------------------------


def _middle(values: Tensor) -> int:
    """The seed of the median value."""
    return int(values.argsort()[len(values) // 2])


@styled
def draw_one(name: str, experiment: Experiment, shown: Shown, folder: Path) -> None:
    """For the four datasets: <name>.png, each latent's acts and decoder, and <name>-clusters.png."""
    if name not in points.CLASSES:
        return
    _draw_latents(name, shown, folder)
    _draw_clusters(name, shown, folder)


def _draw_latents(name: str, shown: Shown, folder: Path) -> None:
    trained, clouds = shown.trained["faithful"], shown.clouds
    entropies = points.entropy(trained.clusters, clouds.labels)
    seed = _middle(entropies)
    xy, anchors, acts, W = clouds.test[seed], clouds.anchors[seed], trained.acts[seed], trained.W_dec[seed]
    latents = W.shape[0]
    figure, grid = panels(latents, columns=min(latents, 6 if latents > 10 else 5))
    for i, axes in enumerate(grid):
        plane(axes)
        on = acts[:, i] > 0
        axes.scatter(xy[~on, 0], xy[~on, 1], s=3, color=FAINT, linewidths=0)
        axes.scatter(
            xy[on, 0], xy[on, 1], s=6, c=acts[on, i], cmap="viridis", vmin=0, vmax=float(acts.max()), linewidths=0
        )
        size = W[i].abs() / W[i].abs().max()
        colours = ["#b2182b" if w > 0 else "#2166ac" for w in W[i].tolist()]
        axes.scatter(
            anchors[:, 0],
            anchors[:, 1],
            marker="^",
            s=2 + 42 * size.square(),
            c=colours,
            alpha=0.75,
            edgecolors="white",
            linewidths=0.3,
        )
        axes.set_title(f"latent {i}, on {int(on.sum())} times")
    figure.suptitle(
        f"{name.replace('_', ' ')}, published recipe, seed {seed}, entropy {float(entropies[seed]):.3f}\n"
        "points: activation (grey: off); triangles: decoder weight of each anchor (red above 0, blue below)",
        fontsize=9.5,
    )
    save(figure, folder / f"{name}.png")


def _draw_clusters(name: str, shown: Shown, folder: Path) -> None:
    clouds = shown.clouds
    found = {LABELS[key]: one.clusters for key, one in shown.trained.items()}
    if shown.k_means is not None:
        found[LABELS["k_means"]] = shown.k_means
    seed = _middle(points.entropy(shown.trained["faithful"].clusters, clouds.labels))
    figure, grid = panels(1 + len(found), columns=1 + len(found), size=(2.4, 2.4))
    colours = palette(int(max(clouds.labels.max(), *(c.max() for c in found.values()))) + 1)
    for axes, (label, clusters) in zip(grid, {"classes": clouds.labels, **found}.items(), strict=True):
        plane(axes)
        matched = _matched(clusters[seed], clouds.labels[seed], len(colours))
        axes.scatter(
            clouds.test[seed, :, 0], clouds.test[seed, :, 1], s=5, c=[colours[int(c)] for c in matched], linewidths=0
        )
        value = float(points.entropy(clusters[seed], clouds.labels[seed]))
        axes.set_title(label if label == "classes" else f"{label}\nentropy {value:.3f}")
    save(figure, folder / f"{name}-clusters.png")


def _matched(clusters: Tensor, labels: Tensor, n: int) -> Tensor:
    """Clusters renamed to the classes with which they share most points, each once, so that colours match."""
    counts = torch.zeros(n, n).index_put_((clusters, labels), torch.ones(len(labels)), accumulate=True)
    names = torch.full((n,), -1)
    for _ in range(n):
        best = int(counts.argmax())
        names[best // n] = best % n
        counts[best // n], counts[:, best % n] = -1, -1
    return names[clusters]


@styled
def draw_all(records: Mapping[str, Any], folder: Path) -> None:
    """entropy.png: every seed of every experiment; elbow.png: test loss against the number of latents."""
    rows = [name for name in records if not name.startswith(("features-", "stage-"))]
    if rows:
        figure, (axes,) = panels(1, size=(7.6, 0.36 * len(rows) + 0.9))
        _draw_entropies(axes, [records[name] for name in rows])
        save(figure, folder / FIRST)
    if losses := _losses(records):
        figure, (axes,) = panels(1, size=(4.6, 2.8))
        axes.plot(list(losses), list(losses.values()), color=COLOURS["faithful"], marker="o", markersize=4)
        axes.axvline(points.CLASSES["basic_blobs"], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate(
            "classes", (points.CLASSES["basic_blobs"], max(losses.values())), (4, -4), color=MUTED,
            textcoords="offset points",
        )  # fmt: skip
        axes.set_xticks(list(losses))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("latents")
        axes.set_ylabel("test loss, median")
        save(figure, folder / "elbow.png")


def _draw_entropies(axes: Axes, records: list[Mapping[str, Any]]) -> None:
    shift = {"faithful": -0.2, "better": 0.0, "k_means": 0.2}
    for row, record in enumerate(records):
        for key, offset in shift.items():
            values = record.get(key, {}).get("entropy")
            if values is None:
                continue
            y = row + offset
            axes.scatter(values, [y] * len(values), s=9, color=COLOURS[key], alpha=0.45, linewidths=0)
            axes.plot([median(values)] * 2, [y - 0.11, y + 0.11], color=COLOURS[key], linewidth=2.2)
        for key, y in (("median", row - 0.2), ("k_means", row + 0.2)):
            if key in record["published"]:
                axes.scatter([record["published"][key]], [y], marker="D", s=16, facecolors="none", edgecolors=INK,
                             linewidths=0.9, zorder=3)  # fmt: skip
    for key in shift:
        axes.scatter([], [], s=14, color=COLOURS[key], label=LABELS[key])
    axes.scatter([], [], marker="D", s=16, facecolors="none", edgecolors=INK, label="published")
    axes.axvline(SUCCESS, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(records)), [record["title"] for record in records])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(records) - 0.5, -0.5)
    axes.set_xscale("symlog", linthresh=0.1, linscale=1.2)
    axes.set_xlim(-0.003, 2)
    axes.set_xticks([0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.2, 0.5, 1, 2])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_xlabel("entropy of the class given the cluster, nats; a dot for each seed, a bar at the median")
    axes.legend(loc="lower center", bbox_to_anchor=(0.42, 1.0), ncols=4, fontsize=8, handletextpad=0.2)


def result(records: Mapping[str, Any]) -> str:
    """The better recipe's medians beside the published ones; "" if a dataset lacks them."""
    if any("better" not in records.get(name, {}) for name in points.CLASSES):
        return ""
    found = [
        f"{_measured(record, 'better')} on {record['title']}, published {_published(record['published'])}"
        for record in map(records.__getitem__, points.CLASSES)
    ]
    return f"Median entropy of the better recipe, and the number of seeds below {SUCCESS:g}: {'; '.join(found)}."


ABOUT = About(
    title="Clustering points in the plane with SAEs",
    sources={"RobertHuben/point_cloud_sae (public code)": "https://github.com/RobertHuben/point_cloud_sae"},
    claim="An SAE with one latent per class clusters points: a point's cluster is its active latent. The entropy of "
    "the class given the cluster is 0 for a perfect clustering; below 0.1 nats counts as a success.",
    here="At full scale. There are four clouds, each of 1,000 training and 1,000 test points: five separate blobs, "
    "eighteen blobs on a grid, blobs with sticks (lollipops), and ten random blobs. Each of ten seeds draws new class "
    "weights, a new layout and new initial weights of the SAE. The published recipe represents each point by its "
    "similarities to 100 anchors, and trains a top-1 SAE with unit rows and ghost gradients for 500 epochs. Two of its "
    "faults are not copied: here encoder rows are normalized per latent, not per anchor, and the entropy is correct "
    "even if cluster numbers have gaps. The better recipe uses neither labels nor test points: it trains for 500 steps "
    "with a learning rate that falls from 1e-3, initializes rows at data points, keeps the best of ten runs by "
    "training loss, and replaces the anchors by a spectral embedding of the training points at three widths. k-means "
    "runs on the points themselves.",
    pictures={
        "lollipops-clusters.png": "Lollipops: the true classes, and the clusters of each recipe. The seed is the "
        "median one of the published recipe.",
        "entropy.png": "Every seed of every experiment: a dot per seed, a bar at the median, and a diamond at the "
        "published figure.",
        "blob_grid-clusters.png": "Eighteen blobs on a grid: the true classes, and the clusters of each recipe.",
        "basic_blobs-clusters.png": "Basic blobs: the true classes, and the clusters of each recipe.",
        "random_blobs-clusters.png": "Random blobs: the true classes, and the clusters of each recipe.",
        **{
            f"{name}.png": f"{name.replace('_', ' ').capitalize()}, published recipe: each latent's activation on the "
            "points, and the decoder weight of each anchor (triangles; red above 0, blue below)."
            for name in points.CLASSES
        },
        "elbow.png": "Test loss of the published recipe by number of latents: the elbow is at the number of classes.",
    },
    unverified=[
        "The repository has no table of results. The figures called published were measured by running its code.",
        "Of the published entropies only the median of ten seeds and the share below 0.1 are stored, not each seed's.",
    ],
    result=result,
)
SYSTEM = System(
    about=ABOUT,
    experiments=clustering.experiments,
    ticks=lambda experiment, seeds: experiment.epochs,  # all seeds at once
    perform=clustering.perform,
    draw_one=draw_one,
    draw_all=draw_all,
    tables=tables,
)
