"""The SAEs of this system: the published recipe, and rules of the engine on the same activations.

Published:  h = ReLU(x E + b),  x̂ = h Eᵀ,  loss = mean ‖x - x̂‖₂ / D + α · mean ‖h‖₁ / M,   E (D, M)

with the norm of the error, not its square, E and b from N(0, 1), no decoder bias, α = .077, AdamW. Its code divides E
by its norm over the *latents of each input dimension*, where every latent's own norm was meant; `norm="inputs"` does
as the code does and `norm="latents"` as was meant. Source: RobertHuben/othellogpt_sparse_autoencoders (autoencoder.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsae.model.rules import Activation, BatchTopK, JumpReLU, ReLU, TopK
from fastsae.model.sae import SparseAutoencoder
from fastsae.runs.schedules import Schedule
from fastsae.systems.othello.probes import batches
from fastsae.training.optimizers import AdamW
from fastsae.training.step import FusedTrainStep


@dataclass(frozen=True)
class Recipe:
    """Model, loss and schedule; the defaults are the published ones, but for M and the games of a batch.

    rule      "published", or one of the engine's: "l1", "topk", "batch_topk", "jumprelu".
    norm      of the published rule: "inputs" or "latents", see above.
    ratio     M / D. Published: 2.
    alpha     weight of the L1 norm, of "published" as above, of "l1" as of fastsae.ReLU.
    k         active latents: of a token, or on average.
    centre    the SAE sees x with mean 0, estimated on the rows that it is trained on.
    whiten    it sees x with mean 0 and covariance 1, likewise.
    batch     games of a step. Published: 64, of many more games; fewer make as many steps of fewer games.
    decay     the rate falls to 0 over the last fifth.
    """

    rule: str = "published"
    norm: str = "inputs"
    tied: bool = True
    ratio: int = 4
    alpha: float = 0.077
    k: int = 32
    centre: bool = False
    whiten: bool = False
    batch: int = 16
    epochs: int = 4
    lr: float = 1e-3
    decay: bool = False

    def activation(self) -> Activation:
        """The engine's rule. A decoder of unit rows needs no weights in its L1."""
        rules: dict[str, Callable[[], Activation]] = {
            "published": lambda: ReLU(l1=self.alpha, weighted=False),
            "l1": lambda: ReLU(l1=self.alpha, weighted=False),
            "topk": lambda: TopK(self.k),
            "batch_topk": lambda: BatchTopK(self.k),
            "jumprelu": lambda: JumpReLU(
                l0=1.0, threshold=0.1, bandwidth=0.1, penalty_kind="target", target_l0=float(self.k)
            ),
        }
        if self.rule not in rules:
            raise ValueError(f"rule is {self.rule!r}, expected one of {', '.join(rules)}")
        return rules[self.rule]()


@dataclass(frozen=True)
class Whitening:
    """y = (x - mean) forth, x = y back + mean: mean (D,), forth and back (D, D)."""

    mean: Tensor
    forth: Tensor
    back: Tensor

    @staticmethod
    def of(x: Tensor) -> Whitening:
        """From rows x (n, D). Directions with less than 10⁻⁴ of the mean variance are not blown up to 1."""
        mean = x.double().mean(0)
        variances, V = torch.linalg.eigh(torch.cov(x.double().T))
        scale = (variances.clamp(min=0) + 1e-4 * variances.mean()).sqrt()
        return Whitening(mean.float(), (V / scale @ V.T).float(), (V * scale @ V.T).float())

    @staticmethod
    def none(mean: Tensor) -> Whitening:
        """Nothing but the mean (D,) is taken away."""
        same = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
        return Whitening(mean, same, same)


class Trained:
    """A trained SAE, and how it reads x (n, D)."""

    def __init__(self, recipe: Recipe, sae: SparseAutoencoder, whitening: Whitening):
        self.recipe, self.sae, self.whitening = recipe, sae.eval(), whitening

    @torch.no_grad()
    def acts(self, x: Tensor) -> Tensor:
        """(n, M), dense."""
        y = (x - self.whitening.mean) @ self.whitening.forth
        if self.recipe.rule == "published":
            return published_acts(self.recipe, self.sae, y)[0]
        return torch.cat([self.sae.encode(rows).to_dense() for rows in y.split(4096)])

    @torch.no_grad()
    def measures(self, x: Tensor, acts: Tensor) -> dict[str, float]:
        """FVU = Σ‖x - x̂‖² / Σ‖x - x̄‖² in x's own units, active latents per token, and the share never active here."""
        if self.recipe.rule == "published":
            y = acts @ published_weight(self.recipe, self.sae.W_dec)
        else:
            y = self.sae.norm.restore(acts @ self.sae.W_dec + self.sae.b_dec, self.sae.norm.statistics(x))
        error = x - y @ self.whitening.back - self.whitening.mean
        fvu = error.square().sum() / (x - x.mean(0)).square().sum()
        active = acts != 0
        return {
            "fvu": round(float(fvu), 4),
            "l0": round(float(active.sum(1).double().mean()), 2),
            "dead_share": round(1 - float(active.any(0).double().mean()), 4),
        }


def published_weight(recipe: Recipe, W: Tensor) -> Tensor:
    """A dictionary (M, D) as the published forward pass uses it."""
    return F.normalize(W, dim=0 if recipe.norm == "inputs" else 1)


def published_acts(recipe: Recipe, sae: SparseAutoencoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """h (n, M), and the decoder's weight (M, D).

    By dense products: half of the latents are active at the start, where gathering them takes three times as long.
    """
    W_dec = published_weight(recipe, sae.W_dec)
    W_enc = W_dec if sae.W_enc is None else published_weight(recipe, sae.W_enc)
    return torch.relu(F.linear(x, W_enc, sae.b_enc)), W_dec


def published_loss(recipe: Recipe, sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """mean ‖x - x̂‖₂ / D + α · mean ‖h‖₁ / M."""
    h, W_dec = published_acts(recipe, sae, x)
    return torch.linalg.vector_norm(x - h @ W_dec, dim=-1).mean() / x.shape[-1] + recipe.alpha * h.abs().mean()


def train(
    recipe: Recipe, x: Tensor, running: Tensor, seed: int, advance: Callable[[], object] = lambda: None
) -> Trained:
    """An SAE trained on x (G, 52, D) where games are running (G, 52); `advance` is called after every step."""
    d = x.shape[-1]
    seen = x[running].float()
    if recipe.whiten:
        whitening = Whitening.of(seen)
    else:
        whitening = Whitening.none(seen.mean(0) if recipe.centre else torch.zeros(d, dtype=seen.dtype, device=x.device))
    published = recipe.rule == "published"
    options: dict[str, Any] = {"pre_bias": False, "decoder_norm": "free"} if published else {"normalize": "constant"}
    sae = SparseAutoencoder(d, recipe.ratio * d, recipe.activation(), tied=recipe.tied, seed=seed, **options)
    if published:
        start_published_(sae, seed)
        optimizer = AdamW(sae, lr=recipe.lr)  # its update is the same whether the gradients come as terms or dense
    else:
        first = x[:200][running[:200]].float()
        sae.calibrate_((first - whitening.mean) @ whitening.forth)
        steps = recipe.epochs * -(-len(x) // recipe.batch)
        schedule = Schedule(steps, decay="linear") if recipe.decay else None
        fused = FusedTrainStep(sae, lr=recipe.lr, schedule=schedule)
    for rows, _ in batches(x, running, recipe.batch, recipe.epochs, seed):
        y = (rows - whitening.mean) @ whitening.forth if recipe.whiten or recipe.centre else rows
        if published:
            published_loss(recipe, sae, y).backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            fused(y)
        advance()
    return Trained(recipe, sae, whitening)


@torch.no_grad()
def start_published_(sae: SparseAutoencoder, seed: int) -> None:
    """Dictionaries and encoder bias from N(0, 1). b_dec stays 0: nothing in the loss reads it."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (sae.W_enc, sae.W_dec, sae.b_enc):
        if tensor is not None:
            tensor.normal_(generator=generator)
    sae.b_dec.zero_()
