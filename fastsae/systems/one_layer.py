"""A language model of one transformer block, or a few, on bytes: Bricken et al.'s shape, small enough to train here.

d = 128, an MLP of 512 with ReLU, learned positions, pre-LN. Its MLP's activations after the ReLU are at the hook
`HOOK`. The published model reads tokens, not bytes, of a far larger corpus.
Source of the shape: Bricken et al. 2023 (Towards Monosemanticity); heads, positions and schedule are ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastsae.data.models import LanguageModel
from fastsae.data.text import TokenCorpus
from fastsae.systems import small_gpt
from fastsae.systems.results import key_of
from fastsae.systems.small_gpt import Block

HOOK = "layers.0.act"
"""The place of the MLP's activations after the ReLU."""
BYTES = 256


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


class OneLayer(nn.Module):
    """ids (n, t <= window) -> logits (n, t, 256)."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.embed, self.place = nn.Embedding(BYTES, recipe.d), nn.Embedding(recipe.window, recipe.d)
        self.layers = nn.ModuleList(Block(recipe.d, recipe.mlp, recipe.heads, nn.ReLU()) for _ in range(recipe.blocks))
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
    about = {**asdict(recipe), "text": corpus.describe()}
    path = cache / f"one-layer-{key_of(about)}.safetensors"
    model = _new(recipe)
    losses = small_gpt.kept(
        model, path, json.dumps(about, sort_keys=True), lambda file: _train(model, recipe, corpus, file, advance)
    )
    return LanguageModel(model.requires_grad_(False), None, path.stem), losses


def _new(recipe: Recipe) -> OneLayer:
    return small_gpt.seeded(lambda: OneLayer(recipe), recipe.seed)


def _train(
    model: OneLayer, recipe: Recipe, corpus: TokenCorpus, checkpoint: Path, advance: Callable[[], object]
) -> list[float]:
    """Windows at random places of the first `share` of the text."""
    pieces = range(int(recipe.share * len(corpus)))
    none = np.zeros(0, dtype=np.int64)  # a text of one piece has none to train on
    text = torch.from_numpy(np.concatenate([none, *(corpus.tokens(piece, None) for piece in pieces)]))
    if len(text) <= recipe.window:
        raise ValueError(f"the text has {len(text)} bytes to train on, a window takes {recipe.window + 1}; give more")
    offsets = torch.arange(recipe.window + 1)

    def windows(done: int) -> Iterator[Tensor]:
        for step in range(done, recipe.steps):
            places = np.random.default_rng((recipe.seed, step)).integers(
                len(text) - recipe.window, size=(recipe.batch, 1)
            )
            yield text[torch.from_numpy(places) + offsets]

    return small_gpt.train(
        model, windows, recipe.steps, lr=recipe.lr, weight_decay=0.01, warmup=recipe.warmup, checkpoint=checkpoint,
        advance=advance,
    )  # fmt: skip
