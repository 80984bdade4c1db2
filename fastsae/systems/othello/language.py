"""A small GPT that learns the next move of random Othello games, and its residual streams.

Layer n is the residual stream after n blocks. Source of the form: the public code
RobertHuben/othellogpt_sparse_autoencoders (pre-LN blocks, learned positions, untied unembedding with a bias, queries,
keys and values without). Changed: scores are scaled by 1/√(width of a head); no dropout, since no game is seen
twice; and, as there are far fewer games, smaller batches and a rate of 2e-3 that is warmed up and falls by a cosine.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_model, save_file
from torch import Tensor, nn

from fastsae.atomic import replace_file
from fastsae.systems.othello import game

TRAINING_GAMES, READ_GAMES, SCORED_GAMES = 1_000, 2_000_000, 3_000_000
"""Seeds of the games that the model learns from, that probes and SAEs learn from, and that everything is scored on."""
SAVE_EVERY = 500
"""Steps between checkpoints."""


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


class Block(nn.Module):
    """x + attention(LN x), then x + MLP(LN x)."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, d))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class OthelloGPT(nn.Module):
    """tokens (n, t ≤ 64) -> logits (n, t, 66)."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        if recipe.d % recipe.heads:
            raise ValueError(f"d is {recipe.d}, expected a multiple of heads = {recipe.heads}")
        self.embed, self.place = nn.Embedding(game.VOCABULARY, recipe.d), nn.Embedding(game.WINDOW, recipe.d)
        self.blocks = nn.ModuleList(Block(recipe.d, recipe.heads) for _ in range(recipe.blocks))
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = OthelloGPT(recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    losses: list[float] = []
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses = state["losses"]
    done = len(losses)
    for step, tokens in enumerate(game.stream(recipe.games, TRAINING_GAMES + recipe.seed, recipe.batch)):
        if step >= done:
            rising, falling = min(1.0, (step + 1) / recipe.warmup), (1 + math.cos(math.pi * step / recipe.steps)) / 2
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * rising * falling
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].long().flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
            if checkpoint is not None and (step + 1) % SAVE_EVERY == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
                replace_file(checkpoint, lambda partial, state=state: torch.save(state, partial))  # type: ignore[misc]
        advance()
    pieces = torch.tensor(losses).tensor_split(min(10, len(losses)))
    return model.eval(), [round(float(piece.mean()), 4) for piece in pieces]


def trained(
    recipe: Recipe, cache: Path, advance: Callable[[], object] = lambda: None
) -> tuple[OthelloGPT, list[float]]:
    """The same from the folder `cache`, where it is stored by its settings; trained and stored there if it is not."""
    settings = json.dumps(asdict(recipe), sort_keys=True)
    path = cache / f"model-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.safetensors"
    if path.exists():
        model = OthelloGPT(recipe)
        load_model(model, path)
        with safe_open(path, "pt") as file:
            losses = json.loads(file.metadata()["losses"])
        return model.eval(), losses
    cache.mkdir(parents=True, exist_ok=True)
    checkpoint = path.with_suffix(".checkpoint")
    model, losses = train(recipe, advance, checkpoint)
    tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
    about = {"settings": settings, "losses": json.dumps(losses)}
    replace_file(path, lambda partial: save_file(tensors, partial, about))
    checkpoint.unlink(missing_ok=True)
    return model, losses


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
