"""Labelled points in the plane, k-means on them, and the entropy of a clustering.

Source of the layouts: the public code RobertHuben/point_cloud_sae; drawn in the same order, so the points are the same.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

CLASSES = {"basic_blobs": 5, "blob_grid": 18, "lollipops": 5, "random_blobs": 10}
"""Each dataset and its number of classes."""
CENTRES = {
    "basic_blobs": ((0, 0), (10, 0), (0, 10), (10, 10), (5, 7)),
    "blob_grid": tuple((5 * (i % 5), 5 * (i // 5)) for i in range(18)),
    "lollipops": ((0, 0), (5, 0), (0, 10)),
}
STICKS = (((-0.2, 0.2), (-10.0, -2.0)), ((7.0, 15.0), (-0.2, 0.2)))
"""The lollipops' sticks: (x from, to), (y from, to)."""
APART = 8.0
"""The least distance between two centres of random blobs."""
LIKELY = 4
"""The largest weight of a class; the smallest is 1."""


@dataclass(frozen=True)
class Points:
    """xy (n, 2) float32 and the class of each, labels (n,) int64, in the order of the classes."""

    xy: Tensor
    labels: Tensor


def class_weights(classes: int, seed: int) -> list[int]:
    """How often each class occurs, relative to the others: each from {1, 2, 3, 4}."""
    drawn = random.Random(seed)
    return [drawn.choice(range(1, LIKELY + 1)) for _ in range(classes)]


def shares(n: int, weights: list[int]) -> list[int]:
    """n points split by weight, rounded down; the first class gets the remainder."""
    counts = [n * weight // sum(weights) for weight in weights]
    counts[0] += n - sum(counts)
    return counts


def random_layout(classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Centres N(0, (3√classes)² I), each at least APART from those before, and covariances PᵀP + I/2, P uniform in ±2.

    (classes, 2) and (classes, 2, 2).
    """
    generator = torch.Generator().manual_seed(seed)
    centres = torch.zeros(0, 2)
    while len(centres) < classes:
        centre = torch.randn(1, 2, generator=generator) * 3 * classes**0.5
        if bool((torch.cdist(centre, centres) > APART).all()):
            centres = torch.cat([centres, centre])
    P = 4 * (torch.rand(classes, 2, 2, generator=generator) - 0.5)
    return centres, P.mT @ P + 0.5 * torch.eye(2)


def draw(dataset: str, n: int, *, weights_seed: int, seed: int) -> Points:
    """n points of a dataset: `seed` for the points, `weights_seed` for the classes' weights and random blobs' layout.

    Raises ValueError for an unknown dataset or n < 1.
    """
    if dataset not in CLASSES:
        raise ValueError(f"dataset is {dataset!r}, expected one of {', '.join(CLASSES)}")
    if n < 1:
        raise ValueError(f"n is {n}, expected at least 1 point")
    counts = shares(n, class_weights(CLASSES[dataset], weights_seed))
    if dataset == "random_blobs":
        centres, covariances = random_layout(CLASSES[dataset], weights_seed)
        roots = torch.linalg.cholesky(covariances)
    else:
        centres = torch.tensor(CENTRES[dataset], dtype=torch.float32)
        roots = torch.eye(2).expand(len(centres), 2, 2)
    generator = torch.Generator().manual_seed(seed)
    xy = [
        centre + torch.randn(count, 2, generator=generator) @ root.mT
        for count, centre, root in zip(counts, centres, roots, strict=False)
    ]
    for count, ((left, right), (bottom, top)) in zip(counts[len(centres) :], STICKS, strict=False):
        corner, size = torch.tensor([left, bottom]), torch.tensor([right - left, top - bottom])
        xy.append(corner + size * torch.rand(count, 2, generator=generator))
    return Points(torch.cat(xy), torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)))


def entropy(clusters: Tensor, labels: Tensor) -> Tensor:
    """Σ_c (n_c / n)·H(class | cluster c), in nats: 0 if every cluster has one class only.

    clusters (*B, n): any whole numbers of at least 0, with gaps or without; labels (*B, n). Returns float64 (*B,).
    Raises ValueError if there is no point, or the shapes differ.
    """
    if clusters.shape != labels.shape or clusters.shape[-1] == 0:
        raise ValueError(
            f"clusters have shape {tuple(clusters.shape)}, labels {tuple(labels.shape)}: expected one of each for "
            "every point, and at least one point"
        )
    rows, columns = int(clusters.max()) + 1, int(labels.max()) + 1
    cells = (clusters * columns + labels).flatten(0, -2) if clusters.ndim > 1 else (clusters * columns + labels)[None]
    counts = torch.zeros(len(cells), rows * columns, dtype=torch.float64)
    counts = counts.scatter_add_(1, cells, torch.ones_like(counts[:, :1]).expand(cells.shape))
    counts = counts.unflatten(1, (rows, columns))
    # Σ_c n_c H_c = Σ_c n_c ln n_c - Σ_cy n_cy ln n_cy; xlogy is 0 at 0.
    of_clusters, of_cells = counts.sum(-1), counts
    total = torch.xlogy(of_clusters, of_clusters).sum(-1) - torch.xlogy(of_cells, of_cells).sum((-2, -1))
    return (total / clusters.shape[-1]).clamp_min(0).reshape(clusters.shape[:-1])


def nearest(xy: Tensor, centres: Tensor) -> Tensor:
    """The nearest of centres (*B, k, d) to each of xy (*B, n, d): int64 (*B, n)."""
    return torch.cdist(xy, centres).argmin(-1)


def seed_centres(xy: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k of the points xy (R, n, d), each with probability ∝ its squared distance to the earlier ones: (R, k, d).

    Of 2 + ⌊ln k⌋ candidates, it takes the one that leaves the least distance. Source: Arthur & Vassilvitskii 2007
    (k-means++), with the greedy choice of its section 5.
    """
    runs, n, _ = xy.shape
    tries = 2 + int(torch.tensor(float(k)).log())
    each = torch.arange(runs)
    chosen = [xy[each, torch.randint(n, (runs,), generator=generator)]]
    closest = (xy - chosen[0][:, None]).square().sum(-1)
    for _ in range(k - 1):
        drawn = torch.multinomial(closest.clamp_min(1e-12), tries, replacement=True, generator=generator)
        candidates = xy[each[:, None], drawn]
        left = torch.minimum(closest[:, None], torch.cdist(candidates, xy).square())
        best = left.sum(-1).argmin(-1)
        chosen.append(candidates[each, best])
        closest = left[each, best]
    return torch.stack(chosen, 1)


def k_means(xy: Tensor, k: int, *, restarts: int = 10, iterations: int = 100, seed: int = 0) -> Tensor:
    """Centres (B, k, d) of point sets xy (B, n, d): Lloyd's iteration from k-means++, the best of `restarts`.

    An empty cluster keeps its centre. Raises ValueError if there are fewer points than clusters.
    """
    if xy.shape[-2] < k:
        raise ValueError(f"k-means got k = {k} clusters of {xy.shape[-2]} points; give at least k points")
    sets, _, width = xy.shape
    runs = xy.repeat_interleave(restarts, 0)
    centres = seed_centres(runs, k, torch.Generator().manual_seed(seed))
    for _ in range(iterations):
        member = torch.nn.functional.one_hot(nearest(runs, centres), k).to(xy.dtype)
        counts = member.sum(1)[..., None]
        moved = torch.where(counts > 0, member.mT @ runs / counts.clamp_min(1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    inertia = torch.cdist(runs, centres).amin(-1).square().sum(-1).view(sets, restarts)
    return centres.view(sets, restarts, k, width)[torch.arange(sets), inertia.argmin(1)]
