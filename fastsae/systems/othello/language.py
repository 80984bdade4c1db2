"""A small GPT that learns the next move of random Othello games, and its residual streams.

Layer n is the residual stream after n blocks. Source of the form: the public code
RobertHuben/othellogpt_sparse_autoencoders (pre-LN blocks, learned positions, untied unembedding with a bias, queries,
keys and values without). Changed: scores are scaled by 1/√(width of a head); no dropout, since no game is seen
twice; and, as there are far fewer games, smaller batches and a rate of 2e-3 that is warmed up and falls by a cosine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastsae.systems import small_gpt
from fastsae.systems.othello import game
from fastsae.systems.results import key_of
from fastsae.systems.small_gpt import Block

TRAINING_GAMES, READ_GAMES, SCORED_GAMES = 1_000, 2_000_000, 3_000_000
"""Seeds of the games that the model learns from, that probes and SAEs learn from, and that everything is scored on."""


@dataclass(frozen=True)
class Recipe:
    """Shape and schedule of the model. games: how many it sees, each once; batch: games of a step."""

    blocks: int = 6
    d: int = 128
    heads: int = 8
    games: int = 200_000
    batch: int = 16
    lr: float = 2e-3
    weight_decay: float = 0.01
    warmup: int = 200
    seed: int = 0

    @property
    def steps(self) -> int:
        return math.ceil(self.games / self.batch)


class OthelloGPT(nn.Module):
    """tokens (n, t ≤ 64) -> logits (n, t, 66)."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        if recipe.d % recipe.heads:
            raise ValueError(f"d is {recipe.d}, expected a multiple of heads = {recipe.heads}")
        self.embed, self.place = nn.Embedding(game.VOCABULARY, recipe.d), nn.Embedding(game.WINDOW, recipe.d)
        self.blocks = nn.ModuleList(
            Block(recipe.d, 4 * recipe.d, recipe.heads, nn.GELU()) for _ in range(recipe.blocks)
        )
        self.norm, self.unembed = nn.LayerNorm(recipe.d), nn.Linear(recipe.d, game.VOCABULARY)
        for table in (self.embed, self.place):
            nn.init.normal_(table.weight, std=0.02)

    def streams(self, tokens: Tensor) -> list[Tensor]:
        """The residual stream after 0, 1, ... blocks: each (n, t, d)."""
        x = self.embed(tokens.long()) + self.place.weight[: tokens.shape[1]]
        found = [x]
        for block in self.blocks:
            found.append(block(found[-1]))
        return found

    def forward(self, tokens: Tensor) -> Tensor:
        return self.unembed(self.norm(self.streams(tokens)[-1]))


def train(
    recipe: Recipe, advance: Callable[[], object] = lambda: None, checkpoint: Path | None = None
) -> tuple[OthelloGPT, list[float]]:
    """A trained model, and its loss in nats averaged over each tenth of training; `advance` is called after every step.

    Loss: cross-entropy over all 64 positions, END and PAD included. checkpoint: a file from which a stopped training
    goes on, with the same result.
    """
    model = small_gpt.seeded(lambda: OthelloGPT(recipe), recipe.seed)
    losses = _train(model, recipe, advance, checkpoint)
    return model.eval(), losses


def _train(model: OthelloGPT, recipe: Recipe, advance: Callable[[], object], checkpoint: Path | None) -> list[float]:
    def games(done: int) -> Iterator[Tensor]:
        for step, tokens in enumerate(game.stream(recipe.games, TRAINING_GAMES + recipe.seed, recipe.batch)):
            if step < done:
                advance()  # drawn again, since later games depend on it
            else:
                yield tokens

    return small_gpt.train(
        model, games, recipe.steps, lr=recipe.lr, weight_decay=recipe.weight_decay, warmup=recipe.warmup,
        checkpoint=checkpoint, advance=advance,
    )  # fmt: skip


def trained(
    recipe: Recipe, cache: Path, advance: Callable[[], object] = lambda: None
) -> tuple[OthelloGPT, list[float]]:
    """The same from the folder `cache`, where it is stored by its settings; trained and stored there if it is not."""
    settings = json.dumps(asdict(recipe), sort_keys=True)
    model = small_gpt.seeded(lambda: OthelloGPT(recipe), recipe.seed)
    path = cache / f"model-{key_of(asdict(recipe))}.safetensors"
    return model, small_gpt.kept(model, path, settings, lambda file: _train(model, recipe, advance, file))


@torch.no_grad()
def legal_rate(model: OthelloGPT, tokens: Tensor) -> dict[str, float]:
    """How often the most likely token is legal, and how much probability is on legal ones, where a move is possible.

    tokens (n, 65). Every position with a next move counts, from the second move on. chance: the same for a model that
    knows which squares are played, but not the rules.
    """
    own, enemy = game.replay(tokens[:, : game.MOST_MOVES])
    allowed = game.bits(game.legal(own, enemy))
    counted = (tokens[:, : game.MOST_MOVES] < game.SQUARES) & allowed.any(-1)
    free = ~game.bits(own | enemy)
    top = mass = 0.0
    for rows in torch.arange(len(tokens)).split(256):
        odds = model(tokens[rows, : game.MOST_MOVES]).softmax(-1)
        here = counted[rows]
        squares = torch.nn.functional.pad(allowed[rows], (0, game.VOCABULARY - game.SQUARES))
        top += float(squares.gather(-1, odds.argmax(-1, keepdim=True)).squeeze(-1)[here].sum())
        mass += float((odds * squares).sum(-1)[here].sum())
    n = int(counted.sum())
    chance = (allowed.sum(-1) / free.sum(-1).clamp(min=1))[counted].mean()
    return {"top_1": round(top / n, 5), "mass": round(mass / n, 5), "chance": round(float(chance), 5), "positions": n}


@torch.no_grad()
def activations(model: OthelloGPT, tokens: Tensor) -> list[Tensor]:
    """Layers 1, 2, ...: float16 (n, 52, d), at the tokens whose boards are labelled.

    float16 has 11 bits, far more than SAEs or probes need, and halves the files. Raises ValueError where it overflows.
    """
    parts = [
        [layer[:, game.FIRST : game.LAST].half() for layer in model.streams(tokens[rows, : game.LAST])[1:]]
        for rows in torch.arange(len(tokens)).split(256)
    ]
    layers = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
    if not all(bool(layer.isfinite().all()) for layer in layers):
        raise ValueError("activations are not finite in float16; train the model at a lower rate")
    return layers
