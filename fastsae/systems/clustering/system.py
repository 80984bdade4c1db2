"""SAEs that cluster points in the plane: one latent per class; a point's cluster is its active latent.

A point is embedded as similarities to anchors of its distribution, e_j = exp(-‖p - a_j‖² / (2 (v + 1e-5) s²)), v the
anchors' variance summed over axes, s = 2 / classes; a top-1 SAE with unit rows reconstructs that.
Source: the public code RobertHuben/point_cloud_sae. Two faults are not copied: encoder rows are normalized per latent,
and the entropy is right even if cluster ids have gaps.

`BETTER` changes the recipe to do better, without using labels or test points: see `spectral`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsae.model.rules import TopK
from fastsae.systems.clustering import points
from fastsae.training.batch import BatchTrainStep, SAEBatch

ANCHORS, TRAIN, TEST = 1, 2, 3
"""Seeds of the points; a run's own seed draws class weights, layout and the SAE's weights."""
SUCCESS = 0.1
"""An entropy below this counts as a success."""


@dataclass(frozen=True)
class Recipe:
    """Data, embedding, model, loss and schedule; the defaults are the published ones.

    embedding      "anchors", or "spectral" of the training points.
    scale          s of the anchors' embedding, as a multiple of 2 / classes.
    neighbours     ranges of the spectral embedding: number of nearest points, as a share of all.
    more_features  latents beyond one per class; may be negative.
    trained_on     points over all epochs.
    start          initial rows: "random", or "spread" over the training points.
    restarts       SAEs per seed; the one with the least loss on the training points is kept.
    """

    dataset: str = "basic_blobs"
    anchors: int = 100
    train: int = 1000
    test: int = 1000
    embedding: str = "anchors"
    scale: float = 1.0
    neighbours: tuple[float, ...] = (0.01, 0.015, 0.0225)
    more_features: int = 0
    trained_on: int = 500_000
    batch_size: int = 100
    lr: float = 1e-4
    cosine: bool = False
    weight_decay: float = 0.01
    init_norm: float = 0.1
    start: str = "random"
    ghost_coef: float = 0.1
    dead_after: int = 1000
    restarts: int = 1

    @property
    def features(self) -> int:
        return points.CLASSES[self.dataset] + self.more_features

    @property
    def epochs(self) -> int:
        return max(1, self.trained_on // self.train)

    @property
    def steps(self) -> int:
        return self.epochs * math.ceil(self.train / self.batch_size)


STAGES = {
    "rate": "500 steps from 1e-3 by a cosine",
    "spread": "and rows spread over the points",
    "restarts": "and the best of ten by training loss",
}
"""The changes of the better recipe, in order; the spectral embedding is the last."""
RATE: dict[str, Any] = {"lr": 1e-3, "cosine": True, "trained_on": 50_000}
SPREAD: dict[str, Any] = {**RATE, "start": "spread"}
RESTARTS: dict[str, Any] = {**SPREAD, "restarts": 10}
BETTER: dict[str, Any] = {**RESTARTS, "embedding": "spectral"}


@dataclass(frozen=True)
class Clouds:
    """The points of all seeds: anchors (S, anchors, 2), train and test (S, n, 2) with the class of each test point."""

    anchors: Tensor
    train: Tensor
    test: Tensor
    labels: Tensor


def draw(recipe: Recipe, seeds: Sequence[int]) -> Clouds:
    """The clouds of these seeds."""
    drawn = [
        [points.draw(recipe.dataset, n, weights_seed=seed, seed=which) for seed in seeds]
        for n, which in ((recipe.anchors, ANCHORS), (recipe.train, TRAIN), (recipe.test, TEST))
    ]
    anchors, train, test = (torch.stack([cloud.xy for cloud in clouds]) for clouds in drawn)
    return Clouds(anchors, train, test, torch.stack([cloud.labels for cloud in drawn[2]]))


# -- embeddings: of training and of test points -----------------------------------------------------------------------


def squared_distances(xy: Tensor, others: Tensor) -> Tensor:
    """‖p - a‖² of every pair, (S, n, a), without cancellation."""
    return torch.cdist(xy, others, compute_mode="donot_use_mm_for_euclid_dist").square()


def embed(xy: Tensor, anchors: Tensor, s: float) -> Tensor:
    """e_j(p) = exp(-‖p - a_j‖² / (2 (v + 1e-5) s²)),  v = Σ_axes var(a): (S, n, anchors)."""
    v = anchors.var(-2).sum(-1)[:, None, None] if anchors.shape[-2] > 1 else 1.0
    return torch.exp(-squared_distances(xy, anchors) / (2 * (v + 1e-5) * s**2))


def spectral(train: Tensor, test: Tensor, dimensions: int, neighbours: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Training and test points as unit vectors (S, n, len(neighbours)·dimensions): eigenvectors of graph Laplacians.

    Similarities to the training points, exp(-‖p - a‖² / 2h²), are divided by √degree of both points and projected on
    the first eigenvectors of the training points' own; test points are projected in the same way (Nyström). h: the
    median distance to the `neighbours`·n-th nearest point. All points around one peak of the density get nearly the
    same direction, whatever their shape, and different peaks are nearly orthogonal: a top-1 SAE with unit rows can
    separate them.

    Several widths h stand side by side. At any one of them some clouds fall apart or two clusters melt into one, and
    the points alone do not tell at which.
    Source: Ng, Jordan & Weiss 2001 (On Spectral Clustering); Bengio et al. 2004 for new points.
    """
    n = train.shape[-2]
    wide = train.double()
    between, across = squared_distances(wide, wide), squared_distances(test.double(), wide)
    found: list[tuple[Tensor, Tensor]] = []
    for share in neighbours:
        nearby = min(max(2, round(share * n)), n - 1)
        h2 = between.kthvalue(nearby + 1, -1).values.median(-1).values[:, None, None]
        own = torch.exp(-between / (2 * h2))
        degrees = own.sum(1, keepdim=True)
        _, V = torch.linalg.eigh(own / (degrees.mT * degrees).sqrt())
        # A row's own degree only scales it, which normalizing undoes.
        onto = V[..., -dimensions:] / degrees.mT.sqrt()
        found.append((F.normalize(own @ onto, dim=-1), F.normalize(torch.exp(-across / (2 * h2)) @ onto, dim=-1)))
    own_points, new_points = (torch.cat(parts, -1) / math.sqrt(len(found)) for parts in zip(*found, strict=True))
    return own_points.float(), new_points.float()


def embedded(recipe: Recipe, clouds: Clouds) -> tuple[Tensor, Tensor]:
    """The SAEs' inputs: training and test points, embedded."""
    if recipe.embedding == "spectral":
        return spectral(clouds.train, clouds.test, recipe.features, recipe.neighbours)
    s = 2 / points.CLASSES[recipe.dataset] * recipe.scale
    return embed(clouds.train, clouds.anchors, s), embed(clouds.test, clouds.anchors, s)


# -- model, loss and schedule -----------------------------------------------------------------------------------------


def new_saes(recipe: Recipe, x: Tensor, seeds: Sequence[int]) -> SAEBatch:
    """`restarts` top-1 SAEs for each seed, one after the other, for inputs x (S, n, D)."""
    saes = SAEBatch(
        len(seeds) * recipe.restarts, x.shape[-1], recipe.features, TopK(1),
        decoder_norm="forward", encoder_norm="forward", init_norm=recipe.init_norm,
        ghost="pull" if recipe.ghost_coef else None, ghost_coef=recipe.ghost_coef, dead_after=recipe.dead_after,
        seeds=[1000 * i + seed for seed in seeds for i in range(recipe.restarts)],
    )  # fmt: skip
    if recipe.start == "spread":
        directions = F.normalize(x.repeat_interleave(recipe.restarts, 0), dim=-1)
        rows = points.seed_centres(directions, recipe.features, torch.Generator().manual_seed(0))
        with torch.no_grad():
            for W in (saes.get_parameter("W_enc"), saes.get_parameter("W_dec")):
                W.copy_(recipe.init_norm * rows)
    return saes


def train(recipe: Recipe, x: Tensor, seeds: Sequence[int], advance: Callable[[], object] = lambda: None) -> SAEBatch:
    """SAEs trained on x (S, n, D), each seed in its own order; `advance` is called after every epoch."""
    saes = new_saes(recipe, x, seeds)
    step = BatchTrainStep(
        saes, recipe.lr, optimizer="adamw", weight_decay=recipe.weight_decay, measure=False,
        schedule=(lambda i: (1 + math.cos(math.pi * i / recipe.steps)) / 2) if recipe.cosine else None,
    )  # fmt: skip
    order = torch.Generator().manual_seed(0)
    of = torch.arange(len(seeds)).repeat_interleave(recipe.restarts)[:, None]
    for _ in range(recipe.epochs):
        for rows in torch.rand(len(saes), recipe.train, generator=order).argsort(1).split(recipe.batch_size, dim=1):
            step(x[of, rows])
        advance()
    return saes.eval()


# -- metric -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """The SAE kept for each seed: clusters and adjoint (S, n) of the test points, acts (S, n, M), W_dec (S, M, D)."""

    clusters: Tensor
    adjoint: Tensor
    acts: Tensor
    W_dec: Tensor
    train_loss: Tensor
    test_loss: Tensor
    dead: Tensor


@torch.no_grad()
def best(recipe: Recipe, saes: SAEBatch, x: Tensor, test: Tensor) -> Trained:
    """For each seed, the clusters of the test points by the SAE with the least loss on the training points.

    A point without an active latent belongs to cluster 0. Adjoint: the cluster is the largest ⟨e, W_dec_i⟩ instead.
    """
    S, R = len(x), recipe.restarts
    losses = saes(x.repeat_interleave(R, 0)).losses["mse"]
    kept = losses.view(S, R).argmin(1) + R * torch.arange(S)
    out = saes(test.repeat_interleave(R, 0))
    W_dec = saes.weights()["W_dec"][kept]
    dead = saes.dead.sum(-1)[kept]
    adjoint = (test @ W_dec.mT).argmax(-1)
    acts = out.A[kept]
    return Trained(acts.argmax(-1), adjoint, acts, W_dec, losses[kept], out.losses["mse"][kept], dead)


def run(
    recipe: Recipe, clouds: Clouds, seeds: Sequence[int], advance: Callable[[], object] = lambda: None
) -> tuple[Trained, dict[str, Any]]:
    """Trains and measures: lists with one number for each seed; entropies in nats."""
    x, test = embedded(recipe, clouds)
    trained = best(recipe, train(recipe, x, seeds, advance), x, test)
    measured = {
        "entropy": points.entropy(trained.clusters, clouds.labels),
        "adjoint": points.entropy(trained.adjoint, clouds.labels),
        "train_loss": trained.train_loss,
        "test_loss": trained.test_loss,
        "dead": trained.dead,
    }
    if recipe.embedding == "spectral":  # how much of the gain comes from the embedding
        centres = points.k_means(x, recipe.features)
        measured["k_means_on_embedding"] = points.entropy(points.nearest(test, centres), clouds.labels)
    return trained, {name: [round(v, 6) for v in value.tolist()] for name, value in measured.items()}


def k_means(recipe: Recipe, clouds: Clouds) -> tuple[Tensor, dict[str, Any]]:
    """Clusters of the test points by k-means++ with ten restarts on the training points, and their entropy."""
    clusters = points.nearest(clouds.test, points.k_means(clouds.train, recipe.features))
    return clusters, {"entropy": [round(v, 6) for v in points.entropy(clusters, clouds.labels).tolist()]}


# -- experiments ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """Recipes by name, "faithful" and "better" or one of them, to run on the same clouds, and the published figures."""

    title: str
    recipes: dict[str, Recipe]
    published: dict[str, Any]
    k_means: bool = True

    @property
    def settings(self) -> dict[str, Any]:
        return {name: asdict(recipe) for name, recipe in self.recipes.items()}

    @property
    def epochs(self) -> int:
        return sum(recipe.epochs for recipe in self.recipes.values())


def _pair(recipe: Recipe) -> dict[str, Recipe]:
    return {"faithful": recipe, "better": replace(recipe, **BETTER)}


@dataclass(frozen=True)
class Shown:
    """The data of one experiment's pictures: clouds, SAEs by recipe, k-means' clusters (S, n) or None."""

    clouds: Clouds
    trained: dict[str, Trained]
    k_means: Tensor | None


def perform(
    experiment: Experiment, seeds: Sequence[int], advance: Callable[[], object] = lambda: None,
    folder: Path | None = None,
) -> tuple[dict[str, Any], Shown]:  # fmt: skip
    """Runs every recipe of an experiment, and k-means; returns the record to store, and the pictures' data.

    folder: where results go. Not used: nothing here is worth a cache.
    """
    recipe = next(iter(experiment.recipes.values()))
    clouds = draw(recipe, seeds)
    record: dict[str, Any] = {"title": experiment.title, "published": experiment.published}
    trained = {}
    for name, one in experiment.recipes.items():
        trained[name], record[name] = run(one, clouds, seeds, advance)
    clusters = None
    if experiment.k_means:
        clusters, record["k_means"] = k_means(recipe, clouds)
    return record, Shown(clouds, trained, clusters)


def experiments(quick: bool = False) -> dict[str, Experiment]:
    """Every experiment by name, in order. quick: with so few points and steps that figures mean nothing."""
    basic, random_blobs = Recipe(), Recipe("random_blobs")
    published: dict[str, dict[str, Any]] = {
        "basic_blobs": {"median": 0.006, "share": 1.0, "k_means": 0.006},
        "blob_grid": {"median": 0.305, "share": 0.0, "adjoint": 0.263, "k_means": 0.092},
        "lollipops": {"median": 0.199, "share": 0.0, "k_means": 0.200},
        "random_blobs": {"median": 0.050, "share": 0.7, "k_means": 0.045},
    }
    found = {name: Experiment(name.replace("_", " "), _pair(Recipe(name)), published[name]) for name in points.CLASSES}
    found["anchors-1000"] = Experiment(
        "random blobs, 1000 anchors",
        {"faithful": replace(random_blobs, anchors=1000)},
        {"median": 0.039, "share": 0.9},
        False,
    )
    for scale, median in ((0.1, 1.24), (0.5, 0.296), (2.0, 0.000), (3.0, 0.156)):
        found[f"scale-{scale:g}"] = Experiment(
            f"basic blobs, embedding ×{scale:g}", {"faithful": replace(basic, scale=scale)}, {"median": median}, False
        )
    for n in (20, 50, 100, 200):
        found[f"train-{n}"] = Experiment(
            f"basic blobs, {n} points to train on", _pair(replace(basic, train=n)), {"median": 0.018} if n == 50 else {}
        )
    for recipe, given in ((basic, {"median": 0.128}), (random_blobs, {})):
        found[f"no-ghosts-{recipe.dataset}"] = Experiment(
            f"{recipe.dataset.replace('_', ' ')}, no ghost gradients",
            {"faithful": replace(recipe, ghost_coef=0.0)}, given, False,
        )  # fmt: skip
    for more in (-3, -2, -1, 1, 2, 3):
        found[f"features-{5 + more}"] = Experiment(
            f"basic blobs, {5 + more} latents", {"faithful": replace(basic, more_features=more)}, {}, False
        )
    for dataset in ("blob_grid", "lollipops"):
        for name, change in (("rate", RATE), ("spread", SPREAD), ("restarts", RESTARTS)):
            title = f"{dataset.replace('_', ' ')}, {STAGES[name]}"
            found[f"stage-{name}-{dataset}"] = Experiment(
                title, {"better": replace(Recipe(dataset), **change)}, {}, False
            )
    if quick:
        small: dict[str, Any] = {"anchors": 30, "train": 60, "test": 60, "trained_on": 1200, "restarts": 2}
        for name, experiment in found.items():
            recipes = {
                key: replace(recipe, **{field: min(most, getattr(recipe, field)) for field, most in small.items()})
                for key, recipe in experiment.recipes.items()
            }
            found[name] = replace(experiment, recipes=recipes)
    return found
