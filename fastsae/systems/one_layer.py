"""A language model of one transformer block, or a few, on bytes: Bricken et al.'s shape, small enough to train here.

d = 128, an MLP of 512 with ReLU, learned positions, pre-LN. Its MLP's activations after the ReLU are at the hook
`HOOK`. The published model reads tokens, not bytes, of a far larger corpus.
Source of the shape: Bricken et al. 2023 (Towards Monosemanticity); heads, positions and schedule are ours.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastsae.atomic import replace_file
from fastsae.data.models import LanguageModel
from fastsae.data.text import TokenCorpus

HOOK = "layers.0.act"
"""The place of the MLP's activations after the ReLU."""
BYTES = 256
SAVE_EVERY = 500
"""Steps between checkpoints."""


@dataclass(frozen=True)
class Recipe:
    """Shape and schedule. share: of the text that the model is trained on, from its start; the rest is held out."""

    blocks: int = 1
    d: int = 128
    mlp: int = 512
    heads: int = 4
    window: int = 256
    batch: int = 16
    steps: int = 3000
    lr: float = 3e-3
    warmup: int = 100
    share: float = 0.9
    seed: int = 0


class Block(nn.Module):
    """x + attention(LN x), then x + down(ReLU(up(LN x)))."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        d = recipe.d
        self.heads = recipe.heads
        self.norm_1, self.norm_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d)
        self.up, self.act, self.down = nn.Linear(d, recipe.mlp), nn.ReLU(), nn.Linear(recipe.mlp, d)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, d))
        return x + self.down(self.act(self.up(self.norm_2(x))))


class OneLayer(nn.Module):
    """ids (n, t <= window) -> logits (n, t, 256)."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.embed, self.place = nn.Embedding(BYTES, recipe.d), nn.Embedding(recipe.window, recipe.d)
        self.layers = nn.ModuleList(Block(recipe) for _ in range(recipe.blocks))
        self.norm, self.unembed = nn.LayerNorm(recipe.d), nn.Linear(recipe.d, BYTES, bias=False)
        for table in (self.embed, self.place):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.place.weight[: input_ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.unembed(self.norm(x))


def bytes_of(paths: Sequence[Path]) -> TokenCorpus:
    """The files' bytes as tokens, in pieces of 4,096."""
    text = b"\n".join(path.read_bytes() for path in paths)
    return TokenCorpus(np.frombuffer(text, dtype=np.uint8), name="bytes")


def trained(
    recipe: Recipe, corpus: TokenCorpus, cache: Path, advance: Callable[[], object] = lambda: None
) -> tuple[LanguageModel, list[float]]:
    """The model, and its loss in nats a byte averaged over each tenth of training.

    Read from the folder `cache`, where it is stored by its settings and text; else trained, going on from a
    checkpoint, and stored there.
    """
    settings = json.dumps({**asdict(recipe), "text": corpus.describe()}, sort_keys=True)
    path = cache / f"one-layer-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.safetensors"
    model = _new(recipe)
    if path.exists():
        model.load_state_dict(load_file(path))
        with safe_open(path, "pt") as file:
            losses = json.loads(file.metadata()["losses"])
    else:
        cache.mkdir(parents=True, exist_ok=True)
        checkpoint = path.with_suffix(".checkpoint")
        losses = _train(model, recipe, corpus, checkpoint, advance)
        about = {"settings": settings, "losses": json.dumps(losses)}
        replace_file(path, lambda partial: save_file(dict(model.state_dict()), partial, about))
        checkpoint.unlink(missing_ok=True)
    return LanguageModel(model.eval().requires_grad_(False), None, path.stem), losses


def _new(recipe: Recipe) -> OneLayer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return OneLayer(recipe)


def _train(
    model: OneLayer, recipe: Recipe, corpus: TokenCorpus, checkpoint: Path, advance: Callable[[], object]
) -> list[float]:
    """Windows at random places of the first `share` of the text; AdamW, a rate that rises and falls by a cosine."""
    pieces = range(int(recipe.share * len(corpus)))
    none = np.zeros(0, dtype=np.int64)  # a text of one piece has none to train on
    text = torch.from_numpy(np.concatenate([none, *(corpus.tokens(piece, None) for piece in pieces)]))
    if len(text) <= recipe.window:
        raise ValueError(f"the text has {len(text)} bytes to train on, a window takes {recipe.window + 1}; give more")
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.01)
    losses: list[float] = []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses = state["losses"]
    offsets = torch.arange(recipe.window + 1)
    for step in range(len(losses), recipe.steps):
        places = torch.from_numpy(np.random.default_rng((recipe.seed, step)).integers(
            len(text) - recipe.window, size=(recipe.batch, 1)))  # fmt: skip
        ids = text[places + offsets]
        rising, falling = min(1.0, (step + 1) / recipe.warmup), (1 + math.cos(math.pi * step / recipe.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * rising * falling
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % SAVE_EVERY == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
            replace_file(checkpoint, lambda partial, state=state: torch.save(state, partial))  # type: ignore[misc]
        advance()
    return [round(float(piece.mean()), 4) for piece in torch.tensor(losses).tensor_split(min(10, len(losses)))]
