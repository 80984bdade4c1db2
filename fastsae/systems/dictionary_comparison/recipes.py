"""The SAEs of this system: two published recipes, the steps from one to the other, and candidates to beat both.

Cunningham:  c = ReLU(M x + b),  x̂ = Mᵀ c,                  rows of M of norm 1, no decoder bias; for MLPs also untied
Bricken:     f = ReLU(W_e (x - b_d) + b_e),  x̂ = W_d f + b_d,   columns of W_d of norm 1, dead latents resampled
both:        loss = mean over tokens of ‖x - x̂‖² / d + α Σ f

fastsae's loss sums the squared error over d, so its weight of the penalty is d·α, and Adam's eps is d times as large.
Here the weight is driven so that L0 is the one asked for; everything else starts as the recipe says.

Adam of Cunningham's code moves M before its rows are normalized. That gradient is orthogonal to the row already, as
the projection that Bricken et al. add makes it, so only the length of a step differs, by the row's norm.
Source: Cunningham et al. 2023 and its public code HoagyC/sparse_coding (FunctionalTiedSAE, FunctionalSAE); Bricken et
al. 2023 (Towards Monosemanticity). Batch and Adam's rate of the second are ours: the rate is not published.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.model import losses
from fastsae.model.parameters import normalize_rows_
from fastsae.model.rules import Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from fastsae.model.sae import Objective, SparseAutoencoder
from fastsae.runs.config import TrainConfig

PUBLISHED, LATE = (0.025, 0.05, 0.075, 0.1), (0.3, 0.45, 0.6, 0.75)
"""Shares of the run after which latents are resampled. Published: steps 25,000 to 100,000 of a million; a run of some
hundreds of steps has no dead latents by then, hence the others."""
SILENT = 0.0125
"""Share of the run after which a silent latent is dead. Published: 12,500 steps of a million."""
RESAMPLE_ROWS = 819_200
"""Inputs whose loss is looked at, as published; a shorter run looks at a tenth of its rows at most."""
SAVE_EVERY = 100
"""Steps between checkpoints, at least."""
START_ROWS = 4096
"""Rows that the start reads: the geometric median, and the penalty's first weight."""


@dataclass(frozen=True)
class Recipe:
    """What a recipe fixes. start: initial weights, "xavier" or "kaiming" (as torch draws them), or "engine": fastsae's.

    rule       "l1", or one of the engine's: "topk", "batch_topk", "gated", "jumprelu".
    centred    a decoder bias, at first the geometric median, subtracted from the input; else there is none.
    resampled  shares of the run after which dead latents are resampled.
    projected  gradients lose their part along the decoder's row before Adam sees them.
    aux        AuxK on dead latents.
    decay      share of the steps, at the end, over which the rate falls to 0 linearly.
    """

    rule: str = "l1"
    tied: bool = False
    centred: bool = True
    start: str = "kaiming"
    resampled: tuple[float, ...] = ()
    projected: bool = True
    aux: bool = False
    lr: float = 1e-3
    decay: float = 0.0

    def activation(self, l0: int) -> Activation:
        """The rule that has this many active latents. A decoder of unit rows needs no weights in its L1."""
        rules: dict[str, Callable[[], Activation]] = {
            "l1": lambda: ReLU(target_l0=float(l0), weighted=False),
            "topk": lambda: TopK(l0),
            "batch_topk": lambda: BatchTopK(l0),
            "gated": lambda: Gated(target_l0=float(l0)),
            "jumprelu": lambda: JumpReLU(target_l0=float(l0)),
        }
        return rules[self.rule]()

    def own_weight(self, sae: SparseAutoencoder) -> float | None:
        """The penalty's weight as the published formulas have it; None where there is none to compare."""
        return float(sae.penalty_weight) / sae.d_in if self.rule == "l1" else None


CUNNINGHAM = Recipe(tied=True, centred=False, start="xavier")
BRICKEN = Recipe(resampled=PUBLISHED)
_UNTIED = replace(CUNNINGHAM, tied=False)
_KAIMING = replace(_UNTIED, start="kaiming")
SWAPS = {
    "cunningham": ("Cunningham et al.", CUNNINGHAM),
    "untied": ("encoder of its own (their other form)", _UNTIED),
    "kaiming": ("and Kaiming for Xavier", _KAIMING),
    "centred": ("and a decoder bias, subtracted from x", replace(_KAIMING, centred=True)),
    "bricken": ("and resampling: Bricken et al.", BRICKEN),
    "unprojected": ("Bricken et al., without projection", replace(BRICKEN, projected=False)),
    "late": ("Bricken et al., resampling at 30 to 75 %", replace(BRICKEN, resampled=LATE)),
    "resampled": ("Cunningham et al., the same resampling", replace(CUNNINGHAM, resampled=LATE)),
}
"""From one recipe to the other, one difference after the other; then three that leave the path."""
CANDIDATES = {
    "topk": Recipe(rule="topk", start="engine", aux=True),
    "batch_topk": Recipe(rule="batch_topk", start="engine", aux=True),
    "batch_topk_decay": Recipe(rule="batch_topk", start="engine", aux=True, decay=0.5),
    "batch_topk_fast": Recipe(rule="batch_topk", start="engine", aux=True, decay=0.5, lr=2e-3),
    "gated": Recipe(rule="gated", start="engine"),
    "jumprelu": Recipe(rule="jumprelu", start="engine"),
}
"""Recipes that may be better than both, by name."""
BETTER = "batch_topk_fast"
"""The candidate with the least FVU on the rows that choose, in runs of 585 and of 976 steps; see LOG.md."""


class Held(SparseAutoencoder):
    """An SAE of which `hold` rewrites parameters whenever they are read: what the recipe keeps and no fused step does.

    A fused step trains every parameter. A checkpoint may hold what has not been rewritten yet; it is when it is read.
    """

    hold: Callable[[SparseAutoencoder], None] = staticmethod(lambda sae: None)

    def objective(self, x: Tensor, target: Tensor | None = None, *, for_step: bool = False) -> Objective:
        self.hold(self)
        return super().objective(x, target, for_step=for_step)


def new_sae(recipe: Recipe, x: Tensor, d_sae: int, l0: int, rows: int, seed: int) -> Held:
    """The SAE before training on so many rows, of which x (n, d) are some."""
    engine = recipe.start == "engine"
    sae = Held(
        x.shape[1], d_sae, recipe.activation(l0), pre_bias=recipe.centred, tied=recipe.tied,
        decoder_norm="unit" if recipe.projected else "free", normalize="constant" if engine else "none",
        aux_k=min(x.shape[1] // 2, d_sae) if recipe.aux else None, dead_after=max(1, round(SILENT * rows)), seed=seed,
    )  # fmt: skip
    if recipe.centred:
        sae.calibrate_(x).init_from_(x, how="geometric_median")
    if not engine:
        start_weights_(sae, recipe.start, seed)
        start_penalty_(sae, x)
    return hold_(recipe, sae)


def hold_(recipe: Recipe, sae: Held) -> Held:
    """Makes the SAE keep what this recipe keeps."""

    @torch.no_grad()
    def hold(sae: SparseAutoencoder) -> None:
        if not recipe.centred:
            sae.b_dec.zero_()
        if not recipe.projected:
            normalize_rows_(sae.W_dec)

    sae.hold = hold  # type: ignore[method-assign]
    return sae


@torch.no_grad()
def start_weights_(sae: SparseAutoencoder, start: str, seed: int) -> None:
    """Weights of nn.Linear for both dictionaries ("kaiming"), or Xavier's; then the decoder's rows have norm 1."""
    generator = torch.Generator().manual_seed(seed)
    d, m = sae.d_in, sae.d_sae
    bounds = {"kaiming": (d**-0.5, m**-0.5), "xavier": 2 * ((6 / (d + m)) ** 0.5,)}[start]
    for W, bound in zip((sae.W_enc, sae.W_dec), bounds, strict=True):
        if W is not None:
            nn.init.uniform_(W, -bound, bound, generator=generator)
    normalize_rows_(sae.W_dec)


@torch.no_grad()
def start_penalty_(sae: SparseAutoencoder, x: Tensor) -> None:
    """Starts the driven weight of the penalty from rows x (n, d), as the engine does; biases and weights stay."""
    zero = float(losses.total_variance(x)) / len(x)
    sae.activation.start_weight(sae.rule_state, zero, float(sae.encode(x).acts.sum(dtype=torch.float64)) / len(x))
    sae.started = True


def train_config(recipe: Recipe, d: int, rows: int, batch: int, seed: int) -> TrainConfig:
    """One pass over so many rows."""
    steps = max(1, rows // batch)
    at = {max(1, round(share * steps)) for share in recipe.resampled}
    decay: dict[str, Any] = {"decay": "linear", "decay_fraction": recipe.decay} if recipe.decay else {}
    return TrainConfig(
        steps=steps, batch_size=batch, lr=recipe.lr, eps=1e-8 if recipe.start == "engine" else 1e-8 * d,
        resample_at=tuple(sorted(at)), resample_rows=min(RESAMPLE_ROWS, max(batch, rows // 10)),
        **{"decay": "constant", **decay}, init_b_dec="zero", seed=seed, log_every=max(1, steps), eval_every=0,
        checkpoint_every=max(SAVE_EVERY, steps // 8), keep=1, tensorboard=False, progress=False,
    )  # fmt: skip
