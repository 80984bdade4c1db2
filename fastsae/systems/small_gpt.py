"""The small language models that systems train here: a block, the training, and the file that a model is kept in.

othello/language.py and one_layer.py say what a model is made of and what it learns from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastsae.atomic import replace_file

SAVE_EVERY = 500
"""Steps between checkpoints."""
Model = TypeVar("Model", bound=nn.Module)


class Block(nn.Module):
    """x + attention(LN x), then x + down(act(up(LN x))): pre-LN, causal; queries, keys and values without a bias."""

    def __init__(self, d: int, mlp: int, heads: int, act: nn.Module):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d)
        self.up, self.act, self.down = nn.Linear(d, mlp), act, nn.Linear(mlp, d)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, d))
        return x + self.down(self.act(self.up(self.norm_2(x))))


def seeded(make: Callable[[], Model], seed: int) -> Model:
    """A model whose initial weights depend on the seed alone; torch's own generator stays where it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def train(
    model: nn.Module, batches: Callable[[int], Iterable[Tensor]], steps: int, *, lr: float, weight_decay: float,
    warmup: int, checkpoint: Path | None, advance: Callable[[], object],
) -> list[float]:  # fmt: skip
    """Trains a model to predict the next token; returns its loss in nats, averaged over each tenth of the steps.

    batches     the ids (n, t + 1) of every step from a given one on.
    checkpoint  a file from which a stopped training goes on, with the same result; None: none.
    advance     called after every step that is made.
    AdamW; the rate rises linearly over `warmup` steps and falls by a cosine; gradients are clipped to a norm of 1.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    losses: list[float] = []
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses = state["losses"]
    for step, ids in enumerate(batches(len(losses)), len(losses)):
        rising, falling = min(1.0, (step + 1) / warmup), (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr * rising * falling
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].long().flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if checkpoint is not None and (step + 1) % SAVE_EVERY == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
            replace_file(checkpoint, lambda partial, state=state: torch.save(state, partial))  # type: ignore[misc]
        advance()
    return [round(float(piece.mean()), 4) for piece in torch.tensor(losses).tensor_split(min(10, len(losses)))]


def kept(model: nn.Module, path: Path, settings: str, make: Callable[[Path], list[float]]) -> list[float]:
    """Loads a model's weights from `path`, in eval mode; returns its losses.

    If the file is not there, make(checkpoint) trains the model, and it is stored, with its settings.
    """
    if path.exists():
        model.load_state_dict(load_file(path))
        with safe_open(path, "pt") as file:
            losses = json.loads(file.metadata()["losses"])
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint = path.with_suffix(".checkpoint")
        losses = make(checkpoint)
        about = {"settings": settings, "losses": json.dumps(losses)}
        replace_file(path, lambda partial: save_file(dict(model.state_dict()), partial, about))
        checkpoint.unlink(missing_ok=True)
    model.eval()
    return losses
