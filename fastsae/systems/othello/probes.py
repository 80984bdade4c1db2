"""Linear probes: what of the board can be read off an activation linearly. Their count is what SAEs are measured by.

    softmax over (empty, own, enemy) of three linear maps D -> 64 of LN(x)

The original normalizes over the positions and the width of a game at once, and leaves the model's dropout on; here each
token is normalized alone, and the model has none. Source: RobertHuben/othellogpt_sparse_autoencoders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsae.systems.othello import game


@dataclass(frozen=True)
class Recipe:
    """Published but for the epochs: one there, on many more games."""

    batch: int = 64
    epochs: int = 8
    lr: float = 1e-3
    seed: int = 0


def batches(x: Tensor, running: Tensor, games: int, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of x (G, 52, d) that belong to running games, `games` games at a time in a new order every epoch.

    Yields float32 (n, d), and the games (games,) they are of.
    """
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=order).split(games):
            yield x[chosen][running[chosen]].float(), chosen


class Probe(nn.Module):
    """x (n, D) -> log-odds (n, 3, 64) before the softmax."""

    def __init__(self, d: int):
        super().__init__()
        self.maps = nn.Linear(d, len(game.CLASSES) * game.SQUARES)

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(F.layer_norm(x, x.shape[-1:])).unflatten(-1, (len(game.CLASSES), game.SQUARES))

    @torch.no_grad()
    def scores(self, x: Tensor) -> Tensor:
        """The probabilities, (n, 192), as `metrics.positives` has its columns."""
        return self(x).softmax(1).flatten(1)


def train(
    recipe: Recipe, x: Tensor, labels: Tensor, running: Tensor, advance: Callable[[], object] = lambda: None
) -> Probe:
    """A probe trained on x (G, 52, d) with labels (G, 52, 64) where games are running (G, 52)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        probe = Probe(x.shape[-1])
    optimizer = torch.optim.AdamW(probe.parameters(), lr=recipe.lr)
    for rows, chosen in batches(x, running, recipe.batch, recipe.epochs, recipe.seed):
        loss = F.cross_entropy(probe(rows), labels[chosen][running[chosen]].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        advance()
    return probe
