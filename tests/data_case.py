"""A toy model and corpora for the tests of fastsae.data: small, deterministic, and with an attention sink."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastsae.data import LanguageModel, StreamConfig, TokenCorpus
from fastsae.data import manifest as manifests

VOCABULARY = 50
D_IN = 8
HUGE_TOKEN = 7  # its activations are enormous, as those of a few tokens in a real model are


class ToyLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(D_IN, D_IN)
        self.dropout = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        self.calls += 1
        return (hidden_states + self.dropout(torch.tanh(self.mlp(hidden_states))),)


class ToyModel(nn.Module):
    """Three residual layers over an embedding; position 0 and HUGE_TOKEN have norms hundreds of times the others'."""

    base_model_prefix = "model"

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.config = types.SimpleNamespace(num_hidden_layers=3, max_position_embeddings=64)
        self.embed = nn.Embedding(vocabulary, D_IN)
        self.layers = nn.ModuleList(ToyLayer() for _ in range(3))
        self.unused = nn.Linear(D_IN, D_IN)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.embed.weight.data[HUGE_TOKEN] *= 500

    def forward(self, input_ids: Tensor, use_cache: bool = True) -> Tensor:
        assert not use_cache
        hidden = self.embed(input_ids)
        hidden[:, 0] *= 1000
        for layer in self.layers:
            hidden = layer(hidden_states=hidden)[0]
        return hidden


def toy_model(vocabulary: int = VOCABULARY) -> LanguageModel:
    return LanguageModel(ToyModel(vocabulary), None, "toy")


def toy_corpus(documents: int = 60, length: int = 50, seed: int = 0) -> TokenCorpus:
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (documents, length))
    return TokenCorpus(ids, name="toy text")


def toy_config(**changes: Any) -> StreamConfig:
    return StreamConfig(**{"hook": 2, "window": 16, "windows_per_batch": 4, "holdout": 60, **changes})


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """With the checksum of what it says now, as a program that wrote it so would have given it."""
    content = {name: value for name, value in manifest.items() if name not in ("format", "version", "sha256")}
    return manifest | {"sha256": manifests._digest(content)}
