"""The SAEs of this system on a residual stream: the published recipe, and rules of the engine on the same rows.

Published:  c = ReLU(x Mᵀ + b),  x̂ = c M,  loss = mean (x - x̂)² over d + α ‖c‖₁,   M (M, D) of unit rows

in both places, Xavier uniform and then divided by its norms, b = 0, no decoder bias, Adam at 1e-3, constant. Changed:
α is not given but driven, so that recipes can be compared at one L0; with it b starts from the first batch, at that L0,
and x is scaled by one factor, which α is given without (`alpha`). The published code divides by the rows' norms in the
forward pass and lets them grow; here they stay 1 and the gradient along a row is projected away, which is the same
gradient for a row of norm 1. Source: Cunningham et al. 2023 and its public code, HoagyC/sparse_coding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.data.shards import ShardSource
from fastsae.model.parameters import normalize_rows_
from fastsae.model.rules import Activation, Gated, ReLU, TopK
from fastsae.model.sae import SparseAutoencoder
from fastsae.runs.config import TrainConfig
from fastsae.runs.trainer import Trainer
from fastsae.systems.interpretable_directions.models import Scale
from fastsae.systems.interpretable_directions.toy import seconds_per_multiplication
from fastsae.systems.material import trained_once
from fastsae.systems.results import key_of

RULES = {"published": "published recipe", "dense": "published, α = 0", "topk": "TopK", "gated": "Gated"}
TIED = ("published", "dense")


@dataclass(frozen=True)
class Recipe:
    """rule: of RULES. ratio: latents per dimension. l0: active latents aimed at; "dense" has none."""

    rule: str
    ratio: int
    l0: int = 0
    batch: int = 1024
    lr: float = 1e-3

    @property
    def activation(self) -> Activation:
        rules: dict[str, Callable[[], Activation]] = {
            "published": lambda: ReLU(target_l0=float(self.l0), weighted=False),
            "dense": lambda: ReLU(l1=0.0, weighted=False),
            "topk": lambda: TopK(self.l0),
            "gated": lambda: Gated(target_l0=float(self.l0)),
        }
        return rules[self.rule]()

    def steps(self, scale: Scale) -> int:
        return math.ceil(scale.passes * scale.rows / self.batch)


def new_sae(recipe: Recipe, d: int, seed: int) -> SparseAutoencoder:
    """The SAE before training, which begins with its first batch."""
    published = recipe.rule in TIED
    options: dict[str, Any] = {"tied": True, "pre_bias": False} if published else {}
    sae = SparseAutoencoder(d, recipe.ratio * d, recipe.activation, normalize="constant", seed=seed, **options)
    if published:
        with torch.no_grad():
            # Of each size another seed: the rows of a dictionary would be the first of the next larger one.
            generator = torch.Generator().manual_seed(seed + 1_000_000 * recipe.ratio)
            nn.init.xavier_uniform_(sae.W_dec, generator=generator)
            normalize_rows_(sae.W_dec)
    return sae


def trained(
    recipe: Recipe, scale: Scale, source: ShardSource, seed: int, folder: Path, advance: Callable[[], object]
) -> SparseAutoencoder:
    """An SAE trained on the rows of a source, in eval mode, or read from the folder's cache, where it is kept.

    A training that was stopped goes on from its checkpoint there. `advance` is called once for each of the recipe's
    steps, those that need not be made again included.
    """
    published = recipe.rule in TIED
    config = TrainConfig(
        steps=recipe.steps(scale), batch_size=recipe.batch, lr=recipe.lr,
        decay="constant" if published else "linear", init_b_dec="zero" if published else "mean",
        eval_every=0, log_every=50, keep=1, tensorboard=False, progress=False, seed=seed,
    )  # fmt: skip

    def train(run: Path, count: Callable[[], object]) -> SparseAutoencoder:
        sae = new_sae(recipe, source.d_in, seed)

        def after_step() -> None:
            if published:
                with torch.no_grad():
                    sae.b_dec.zero_()  # a fused step trains every parameter; this one is 0 whenever it is read
            count()

        Trainer(sae, source, config, run, after_step=after_step).run()
        return sae

    return trained_once(path(recipe, scale, seed, folder), recipe.steps(scale), train, advance)


def path(recipe: Recipe, scale: Scale, seed: int, folder: Path) -> Path:
    """Where `trained` stores an SAE."""
    settings = {"recipe": asdict(recipe), "passes": scale.passes, "seed": seed, **scale.settings}
    return folder / "cache" / f"sae-{key_of(settings)}"


def alpha(sae: SparseAutoencoder) -> float:
    """The weight of L1 in the published loss, of x as it is and with the error's mean over d.

    With x = s·y, where the module sees y: mean (x - x̂)² + α ‖c‖₁ = s²/d · (Σ (y - ŷ)² + l1 Σ c/s) for α = l1·s/d.
    """
    return float(sae.penalty_weight) * float(sae.norm.scale) / sae.d_in


@torch.no_grad()
def firings(sae: SparseAutoencoder, source: ShardSource) -> Tensor:
    """On how many of the rows to train on each latent is active: int64 (M,)."""
    counts = torch.zeros(sae.d_sae, dtype=torch.int64)
    for _, rows in source.iterate(4096):
        counts += sae.counts_of(sae.encode(rows))
    return counts


def seconds(recipe: Recipe, scale: Scale) -> float:
    """About how long a training takes here: 4 dense products of a batch with the encoder for every step.

    Six where the steps are dense, as without a penalty.
    """
    multiplications = recipe.batch * recipe.ratio * scale.width**2
    return (6 if recipe.rule == "dense" else 4) * recipe.steps(scale) * multiplications * seconds_per_multiplication()
