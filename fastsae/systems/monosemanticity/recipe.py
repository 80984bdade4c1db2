"""SAEs by the recipe of Scaling Monosemanticity, and by other rules at equal L0, on one language model's activations.

f = ReLU(W_e x + b_e),  x̂ = W_d f + b_d,  loss = E[‖x - x̂‖² + λ Σ_i f_i ‖W_d,i‖],  x scaled so that E‖x‖² = D

no pre-bias, free decoder norms, W_e = W_dᵀ of norm .1 at the start, λ rising over the first 5 % of the steps, Adam, a
rate that falls to 0 over the last 20 %, gradient norm clipped to 1, one pass. A latent's activation is f_i ‖W_d,i‖.
Source: Templeton et al. 2024; the initial weights and the rise of λ as three reimplementations have them. Changed: a
higher rate, as the published runs are 400 times as long and the best rate falls with their length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.data.shards import ShardSource
from fastsae.data.stream import StreamConfig
from fastsae.model.rules import Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from fastsae.model.sae import SparseAutoencoder
from fastsae.runs.config import TrainConfig
from fastsae.runs.evaluate import active_entries, evaluate
from fastsae.runs.trainer import Trainer
from fastsae.systems.material import MODEL, TEXT, InModel, Material

HELD_OUT = 16_384
"""Rows held out: the first half chooses among recipes, the second half measures."""
WARMUP = 0.05
"""Share of the steps over which λ rises."""


@dataclass(frozen=True)
class Scale:
    """How large everything is; each can be given as `--scale rows=500000`.

    rows     of activations to train on, once.
    latents  of the SAEs, but for those of the scaling law.
    batch    rows of a step.
    hook     layers after which the residual stream is taken.
    tokens   of held-out text for the cross-entropy.
    """

    rows: int = 2_000_000
    latents: int = 4096
    batch: int = 2048
    hook: int = 15
    tokens: int = 16_384
    model: str = MODEL
    text: str = TEXT

    def __post_init__(self) -> None:
        for name in ("rows", "latents", "batch", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.rows < self.batch:
            raise ValueError(f"rows is {self.rows}, expected at least one batch of {self.batch}")

    @property
    def material(self) -> Material:
        stream = StreamConfig(hook=self.hook, holdout=HELD_OUT, special_tokens="keep")
        return Material(self.model, self.text, stream, self.rows)


@dataclass(frozen=True)
class Recipe:
    """One SAE and its training.

    rule    "published", or one of the engine's at the L0 of a published SAE: "topk", "batch_topk", "jumprelu", "gated".
    weight  λ of "published".
    l0      of the other rules.
    share   of the rows that are seen.
    """

    rule: str = "published"
    weight: float = 5.0
    l0: float = 0.0
    d_sae: int = 4096
    share: float = 1.0
    lr: float = 1e-3


RULES: dict[str, Callable[[float], Activation]] = {
    "topk": lambda l0: TopK(max(1, round(l0))),
    "batch_topk": lambda l0: BatchTopK(max(1, round(l0))),
    "jumprelu": lambda l0: JumpReLU(target_l0=l0),
    "gated": lambda l0: Gated(target_l0=l0),
}


def new_sae(recipe: Recipe, d: int, rows: int, seed: int) -> SparseAutoencoder:
    """The SAE before training. A latent is dead after half of the rows, at most 10 million, without firing."""
    common: dict[str, Any] = {"normalize": "constant", "dead_after": min(10_000_000, max(1, rows // 2)), "seed": seed}
    if recipe.rule == "published":
        rule = ReLU(l1=recipe.weight, weighted=True)
        return SparseAutoencoder(d, recipe.d_sae, rule, pre_bias=False, decoder_norm="free", init_norm=0.1, **common)
    aux: dict[str, Any] = (
        {"aux_k": max(1, min(512, recipe.d_sae // 8))} if recipe.rule in ("topk", "batch_topk") else {}
    )
    return SparseAutoencoder(d, recipe.d_sae, RULES[recipe.rule](recipe.l0), **aux, **common)


def train(
    recipe: Recipe, scale: Scale, source: ShardSource, seed: int, run_dir: Path, advance: Callable[[], object]
) -> SparseAutoencoder:
    """The trained SAE. A run in `run_dir` that was stopped goes on from its newest checkpoint."""
    rows = int(recipe.share * scale.rows)
    steps = steps_of(recipe, scale)
    sae = new_sae(recipe, source.d_in, rows, seed)
    published = recipe.rule == "published"
    config = TrainConfig(
        steps=steps, batch_size=scale.batch, lr=recipe.lr, clip_norm=1.0, seed=seed, eval_every=0, keep=1,
        penalty_warmup=max(1, int(WARMUP * steps)) if published else 0, init_b_dec="zero" if published else "mean",
        tensorboard=False, progress=False,
    )  # fmt: skip
    Trainer(sae, source, config, run_dir, after_step=advance).run()
    return sae


def steps_of(recipe: Recipe, scale: Scale) -> int:
    return max(1, int(recipe.share * scale.rows) // scale.batch)


def strengths(sae: SparseAutoencoder, codes_acts: Tensor, latents: Tensor) -> Tensor:
    """Activations f_i ‖W_d,i‖ (nnz,) of acts (nnz,) of these latents (nnz,)."""
    return codes_acts * sae.W_dec.norm(dim=1)[latents]


@torch.no_grad()
def measure(sae: SparseAutoencoder, held: Tensor, weight: float) -> dict[str, float]:
    """What is measured on held-out rows (n, D), n even or not, and on the training.

    On the second half: l0; l1 = E Σ f_i ‖W_d,i‖; nmse = E‖x - x̂‖² / E‖x‖²; fvu; never, the share of latents that do not
    fire; loss, the training loss at `weight`, in units of E‖x‖² = D. On the first half: chosen_by, its fvu. dead_share:
    the share of latents that had not fired for half of the training.
    """
    first, second = held.tensor_split(2)
    result = evaluate(sae, second)
    l1 = 0.0
    for batch in second.split(4096):
        _, latent, act = active_entries(sae.encode(batch))
        l1 += float(strengths(sae, act, latent).double().sum())
    l1 /= len(second)
    mean_square = float(second.double().square().sum(1).mean())
    in_units = result.mse * sae.d_in / mean_square
    found = {
        "l0": result.l0, "l1": l1, "nmse": result.mse / mean_square, "fvu": result.fvu, "never": result.dead_share,
        "dead_share": float(sae.dead.double().mean()), "loss": in_units + weight * l1,
        "chosen_by": evaluate(sae, first).fvu,
    }  # fmt: skip
    return {name: round(value, 6) for name, value in found.items()}


def in_model(sae: SparseAutoencoder, model: InModel) -> dict[str, float | None]:
    """Cross-entropies with the SAE spliced in, and the shares of it recovered."""
    found = model.loss(sae).to_json()
    return {name: found[name] for name in (
        "ce_untouched", "ce_spliced", "ce_zero", "ce_mean", "kl_spliced", "recovered_over_zero", "recovered_over_mean",
    )}  # fmt: skip


def settings(recipe: Recipe, scale: Scale) -> dict[str, Any]:
    """JSON-able: what a trained SAE depends on, but for its seed."""
    return {**{name: value for name, value in asdict(scale).items() if name != "tokens"}, **asdict(recipe)}
