"""A small training run that several test files start, kill, break and compare."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.data.live import LiveSource
from fastsae.data.tensor import TensorSource
from fastsae.model.rules import TopK
from fastsae.model.sae import SparseAutoencoder
from fastsae.runs.trainer import TrainConfig, Trainer
from tests.data_case import toy_config, toy_corpus, toy_model

D_IN, D_SAE, K, BATCH = 24, 96, 6, 48


def rows(n: int = 700) -> Tensor:
    """Correlated, off-centre rows (n, D_IN) with a few strong dimensions, as activations have."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(n, 12, generator=generator).relu()
    return hidden @ torch.randn(12, D_IN, generator=generator) + 0.1 * torch.randn(n, D_IN, generator=generator) + 1


def source(kind: str = "tensor") -> Any:
    """600 rows of a tensor, shuffled; or ("live") an endless stream from a toy language model."""
    if kind == "live":
        return LiveSource(toy_model(), toy_corpus(), toy_config(), buffer_rows=400)
    return TensorSource(rows(), holdout=100, seed=3)


class Hooked:
    """A source that calls before(n, batch) ahead of the n-th batch (from 1) and serves what it returns, if not None."""

    def __init__(self, inner: Any, before: Callable[[int, Tensor], Tensor | None]):
        self.inner, self.before, self.calls = inner, before, 0
        self.d_in, self.n_tokens = inner.d_in, inner.n_tokens

    @property
    def stats(self) -> dict[str, Any]:
        return self.inner.stats

    def next_batch(self, n: int) -> Tensor:
        self.calls += 1
        batch = self.inner.next_batch(n)
        changed = self.before(self.calls, batch)
        return batch if changed is None else changed

    def held_out(self) -> Tensor:
        return self.inner.held_out()

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


def hooked(inner: Any, before: Callable[[int, Tensor], Tensor | None]) -> Any:
    """`Hooked` under the inner source's class name: a run directory records that name and may be shared with it."""
    return type(type(inner).__name__, (Hooked,), {})(inner, before)


def module(**settings: Any) -> SparseAutoencoder:
    # AuxK with latents that die soon, so that every part of the state matters.
    usual = {"d_in": D_IN, "d_sae": D_SAE, "activation": TopK(K), "seed": 1, "aux_k": 8, "dead_after": 300}
    return SparseAutoencoder(**{**usual, **settings})


def config(**settings: Any) -> TrainConfig:
    # One thread: so little work is slower on two threads, and much slower on a busy machine.
    quiet = {"tensorboard": False, "progress": False, "threads": 1}
    usual = {"steps": 30, "batch_size": BATCH, "lr": 5e-3, "log_every": 1, "eval_every": 10, "checkpoint_every": 7}
    usual |= {"keep": 3, "warmup": min(5, settings.get("steps") or 5)}
    return TrainConfig(**{**quiet, **usual, **settings})


def trainer(
    run_dir: Path, hook: Callable[[int, Tensor], Tensor | None] | None = None, kind: str = "tensor", **settings: Any
) -> Trainer:
    data = source(kind)
    sae, data = module(d_in=data.d_in), data if hook is None else hooked(data, hook)
    return Trainer(sae, data, config(**settings), run_dir)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def saved_bytes(checkpoint: Path) -> dict[str, bytes]:
    """What must be equal bit by bit: weights, dead-latent counters and Adam's moments."""
    return {name: (checkpoint / name).read_bytes() for name in ("sae.safetensors", "optimizer.safetensors")}


def curve(run_dir: Path) -> list[tuple[Any, ...]]:
    """metrics.jsonl without the columns that are times."""
    names = ("step", "tokens", "loss", "mse", "fvu", "l0", "dead", "lr", "grad_norm")
    return [tuple(line[name] for name in names) for line in lines(run_dir / "metrics.jsonl")]
