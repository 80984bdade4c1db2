"""Both trainers behind one interface: a step on a batch, a state that can be saved, and the SAE as the metrics take it.

Both start from the weights that SAELens draws, at its learning rate, without decay. What differs is each one's own:

             SAELens                                          fastsae
 selection   pre-acts times the norm of their decoder row     plain pre-acts
 gradients   clipped to a global norm of 1                    not clipped
 Matryoshka  every error has weight 1; one AuxK per level     weights with sum 1; one AuxK
 JumpReLU    quadratic penalty on each sample's L0            penalty on the mean L0, its weight driven

Published JumpReLUs had a tanh penalty driven by a controller that is not part of SAELens.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from torch import Tensor

import fastsae
from bench.synth.world import Settings
from fastsae.codes import SparseCodes
from fastsae.model.rules import Activation

RULES = ("TopK", "BatchTopK", "Matryoshka", "JumpReLU")
DEAD_AFTER = 1000
"""Batches without firing after which both trainers count a latent as dead: SAELens's default."""


def prefixes(M: int) -> list[int]:
    """Where a Matryoshka's prefixes end: 128, 512, 2048 and all of 4,096 as published; of another M the same parts."""
    return [M // 32, M // 8, M // 2, M]


class SAELens:
    """sae_lens's SAETrainer on its training SAE, stepped as its own loop `fit` steps it."""

    name = "sae-lens"

    def __init__(self, rule: str, settings: Settings, first: Tensor):
        """first: a batch, for the factor that scales JumpReLU's inputs."""
        import sae_lens
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        common: dict[str, Any] = {"d_in": settings.D, "d_sae": settings.M, "device": settings.device}
        if rule == "JumpReLU":
            # Sizes as in the published runs; the penalty is the one that SAELens has for a target L0.
            config: Any = sae_lens.JumpReLUTrainingSAEConfig(
                **common, normalize_activations="expected_average_only_in", decoder_init_norm=0.5,
                jumprelu_init_threshold=0.5, jumprelu_bandwidth=2.0, jumprelu_ste_to_input=True,
                jumprelu_sparsity_loss_mode="quadratic", target_l0=float(settings.k), l0_coefficient=0.2,
            )  # fmt: skip
            kind: Any = sae_lens.JumpReLUTrainingSAE
        elif rule == "Matryoshka":
            config = sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(
                **common, k=settings.k, matryoshka_widths=prefixes(settings.M), use_matryoshka_aux_loss=True
            )
            kind = sae_lens.MatryoshkaBatchTopKTrainingSAE
        elif rule == "BatchTopK":
            config = sae_lens.BatchTopKTrainingSAEConfig(**common, k=settings.k)
            kind = sae_lens.BatchTopKTrainingSAE
        else:
            config = sae_lens.TopKTrainingSAEConfig(**common, k=settings.k)
            kind = sae_lens.TopKTrainingSAE
        torch.manual_seed(settings.seed)
        self.sae = kind(config)
        run = SAETrainerConfig(
            total_training_samples=settings.steps * settings.batch, train_batch_size_samples=settings.batch,
            lr=settings.lr, lr_end=settings.lr, device=settings.device, autocast=settings.autocast,
            dead_feature_window=DEAD_AFTER,
        )  # fmt: skip
        self.trainer = SAETrainer(run, self.sae, data_provider=iter(()))
        if config.normalize_activations == "expected_average_only_in":
            with contextlib.redirect_stderr(io.StringIO()):  # a progress bar over one batch
                self.trainer.activation_scaler.estimate_scaling_factor(settings.D, iter([first]), 1)

    def step(self, x: Tensor) -> None:
        self.trainer.maybe_reset_sparsity()
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    def judged(self) -> Any:
        """The SAE on raw inputs: what `fit` makes of it at its end."""
        scaler = self.trainer.activation_scaler
        if scaler.scaling_factor is not None:
            self.sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
            scaler.scaling_factor = None
        return self.sae

    PLAIN = ("n_training_steps", "n_training_samples", "n_frac_active_samples")
    COUNTS = ("act_freq_scores", "n_forward_passes_since_fired")

    def state(self) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "sae": self.sae.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "schedules": {name: s.state_dict() for name, s in trainer.coefficient_schedulers.items()},
            "scale": trainer.activation_scaler.scaling_factor,
            **{name: getattr(trainer, name) for name in (*self.PLAIN, *self.COUNTS)},
        }

    def load(self, state: dict[str, Any]) -> None:
        trainer = self.trainer
        self.sae.load_state_dict(state["sae"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        for name, schedule in trainer.coefficient_schedulers.items():
            schedule.load_state_dict(state["schedules"][name])
        trainer.activation_scaler.scaling_factor = state["scale"]
        for name in (*self.PLAIN, *self.COUNTS):
            setattr(trainer, name, state[name])


def rule_of(rule: str, settings: Settings) -> Activation:
    """fastsae's rule of that name at L0 k."""
    ends = prefixes(settings.M)
    groups = tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
    return {
        "TopK": fastsae.TopK(settings.k),
        "BatchTopK": fastsae.BatchTopK(settings.k),
        "Matryoshka": fastsae.Matryoshka(fastsae.BatchTopK(settings.k), groups=groups),
        "JumpReLU": fastsae.JumpReLU(target_l0=float(settings.k)),
    }[rule]


class Ours:
    """FusedTrainStep, from the weights of `start`: W_enc (D, M), W_dec (M, D), rows of one norm."""

    name = "fastsae"

    def __init__(self, rule: str, settings: Settings, start: Any):
        self.sae = fastsae.SparseAutoencoder(
            settings.D, settings.M, rule_of(rule, settings), decoder_norm="free", aux_k=settings.D // 2, aux_coef=1.0,
            dead_after=DEAD_AFTER * settings.batch, device=settings.device, seed=settings.seed,
        )  # fmt: skip
        with torch.no_grad():
            self.sae.encoder_weight.copy_(start.W_enc.T)
            self.sae.W_dec.copy_(start.W_dec)
        self._step = fastsae.FusedTrainStep(self.sae, lr=settings.lr)

    def step(self, x: Tensor) -> None:
        self._step(x)

    def judged(self) -> Judged:
        return Judged(self.sae)

    def state(self) -> dict[str, Any]:
        return {"sae": self.sae.state_dict(), "step": self._step.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.sae.load_state_dict(state["sae"])
        self._step.load_state_dict(state["step"])


class Judged:
    """An SAE of fastsae as SAELens's metrics call one: latents are dense, (N, M).

    eval() makes BatchTopK select by batch, which is what its counterpart does when these metrics are taken of it.
    """

    def __init__(self, sae: fastsae.SparseAutoencoder):
        self.sae, self.W_dec = sae, sae.W_dec.detach()

    def eval(self) -> None:
        self.sae.eval()
        if self.sae.activation.mean_k is not None:
            self.sae.get_buffer("threshold").fill_(-1.0)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        return self.sae.encode(x).to_dense()

    @torch.no_grad()
    def decode(self, acts: Tensor) -> Tensor:
        return self.sae.decode(SparseCodes.from_dense(acts))
