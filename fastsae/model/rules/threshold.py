"""Rules that activate every latent above a threshold: ReLU, JumpReLU, Gated, and their penalties."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastsae import reference
from fastsae.model.rules.base import Activation, EncodeOptions, RuleState, Selected, number, select_above
from fastsae.reference import wide


@dataclass(frozen=True)
class _Threshold(Activation):
    """What the rules of this file share: `activate` decides elementwise, on every pre-act, which latents are active."""

    shaped: ClassVar[bool] = True

    def check(self, d_sae: int) -> None:
        pass

    def dense(self, pre: Tensor, rows: RuleState, rule_state: RuleState, training: bool) -> Tensor:
        return self.activate(pre, rows)


@dataclass(frozen=True)
class _WithL1(_Threshold):
    """What ReLU and Gated share: the threshold is 0; l1 weighs Σ acts, each times its row's norm if weighted."""

    l1: float = 1.0
    weighted: bool = False

    def __post_init__(self) -> None:
        number(type(self).__name__, "l1", self.l1)

    @property
    def coef(self) -> float:
        return self.l1

    @property
    def needs_norms(self) -> bool:
        return self.weighted

    def select(
        self,
        x: Tensor,
        W: Tensor,
        b: Tensor,
        rule_state: RuleState,
        training: bool,
        options: EncodeOptions,
        capacity: int | None = None,
    ) -> Selected:
        return select_above(x, W, b, 0.0, options, capacity)


@dataclass(frozen=True)
class ReLU(_WithL1):
    """acts = relu(x Wᵀ + b); penalty l1 · mean over tokens of Σ_i acts_i, or of Σ_i acts_i ‖W_dec_i‖ (weighted).

    Plain L1 needs a decoder of unit norm, or the acts shrink while the decoder grows. Source: Bricken et al. 2023;
    weighted by decoder norm: Templeton et al. 2024 (Scaling Monosemanticity); over layers: Lindsey et al. 2024.
    """

    l1: float = 5.0
    """Weight of the L1 penalty."""
    weighted: bool = True
    """Whether the penalty weights each act by the norm of its decoder's row."""
    kind: ClassVar[str] = "relu"

    def activate(self, pre: Tensor, rows: RuleState) -> Tensor:
        return torch.relu(pre)

    def sparsity(self, pre: Tensor, acts: Tensor, rows: RuleState, norms: Tensor) -> Tensor:
        return acts * norms if self.weighted else acts


@dataclass(frozen=True)
class JumpReLU(_Threshold):
    """acts = pre where pre > θ, else 0, with θ = exp(log_threshold) per latent, learnt through a kernel of `bandwidth`.

    penalty_kind  "l0": l0 · mean L0, whose gradient reaches θ alone. "tanh": l0 · mean of
                  Σ tanh(tanh_scale·acts·‖W_dec‖), which trains encoder and decoder too.
                  "target": l0 · (mean L0 / target_l0 - 1)².
    log_threshold and its gradient are float32 at least, whatever the weights are: the steps of an optimizer are smaller
    than bfloat16's spacing. Pre-acts have the weights' dtype: with narrow weights choose a bandwidth of several
    spacings of that dtype at the threshold, or the kernel sees only rounding.
    Source: Rajamanoharan et al. 2024 (arXiv 2407.14435); tanh: Conerly et al. 2025 (Transformer Circuits, January
    update), Lieberum et al. 2024 for θ's start; target: the trainer of dictionary_learning.
    """

    l0: float = 1e-3
    """Weight of the L0 penalty."""
    threshold: float = 1e-3
    """Threshold at the start, the same for all latents."""
    bandwidth: float = 1e-3
    """Width of the kernel through which the threshold learns."""
    penalty_kind: Literal["l0", "tanh", "target"] = "l0"
    """L0 itself, a tanh that trains the weights too, or the squared distance from a target."""
    target_l0: float | None = None
    """The target of penalty_kind target: active latents per token."""
    tanh_scale: float = 4.0
    """How steep the tanh of penalty_kind tanh is."""
    kind: ClassVar[str] = "jumprelu"

    def __post_init__(self) -> None:
        number("JumpReLU", "l0", self.l0)
        for name in ("threshold", "bandwidth", "tanh_scale"):
            number("JumpReLU", name, getattr(self, name), positive=True)
        if self.penalty_kind not in ("l0", "tanh", "target"):
            raise ValueError(f"JumpReLU has penalty_kind = {self.penalty_kind!r}, expected 'l0', 'tanh' or 'target'")
        if (self.penalty_kind == "target") != (self.target_l0 is not None):
            raise ValueError(
                f"JumpReLU has penalty_kind = {self.penalty_kind!r} and target_l0 = {self.target_l0}; "
                "target_l0 goes with 'target', and 'target' needs it"
            )
        if self.target_l0 is not None:
            number("JumpReLU", "target_l0", self.target_l0, positive=True)

    @property
    def coef(self) -> float:
        return self.l0

    @property
    def needs_norms(self) -> bool:
        return self.penalty_kind == "tanh"

    @property
    def penalty_is_mean(self) -> bool:
        return self.target_l0 is None

    def check(self, d_sae: int) -> None:
        if self.target_l0 is not None and self.target_l0 > d_sae:
            raise ValueError(f"JumpReLU has target_l0 = {self.target_l0}, expected at most d_sae = {d_sae}")

    def new_parameters(self, d_sae: int) -> dict[str, Tensor]:
        return {"log_threshold": torch.full((d_sae,), math.log(self.threshold), dtype=torch.float32, device="cpu")}

    def select(
        self,
        x: Tensor,
        W: Tensor,
        b: Tensor,
        rule_state: RuleState,
        training: bool,
        options: EncodeOptions,
        capacity: int | None = None,
    ) -> Selected:
        # In training also the band below the threshold: its latents are inactive, but θ's gradient needs them.
        bar = rule_state["log_threshold"].detach().exp() - (self.bandwidth / 2 if training else 0.0)
        return select_above(x, W, b, bar, options, capacity)

    def considered(self, pre: Tensor, rows: RuleState) -> Tensor:
        return pre > rows["threshold"] - self.bandwidth / 2

    def per_latent(self, rule_state: RuleState) -> dict[str, Tensor]:
        return {"threshold": rule_state["log_threshold"].exp()}

    def activate(self, pre: Tensor, rows: RuleState) -> Tensor:
        threshold = rows["threshold"].expand_as(pre)
        return reference.jump_relu(wide(pre), threshold, self.bandwidth).to(pre.dtype)

    def sparsity(self, pre: Tensor, acts: Tensor, rows: RuleState, norms: Tensor) -> Tensor:
        if self.penalty_kind == "tanh":
            return torch.tanh(self.tanh_scale * wide(acts) * norms)
        return reference.heaviside(wide(pre), rows["threshold"].expand_as(pre), self.bandwidth)

    def penalty(self, mean: Tensor) -> Tensor:
        return (mean / self.target_l0 - 1).square() if self.target_l0 is not None else mean


@dataclass(frozen=True)
class Gated(_WithL1):
    """acts = relu(exp(r_mag)·(x Wᵀ) + b_mag) where the gate x Wᵀ + b_enc is above 0, else 0.

    The gate learns from its own losses: l1 · mean of Σ relu(gate) (weighted: times ‖W_dec‖), and the squared error of
    reconstructing the target from relu(gate) with the decoder held fixed. r_mag and b_mag are float32 at least.
    Source: Rajamanoharan et al. 2024 (arXiv 2404.16014), eq. 5 to 8.
    """

    l1: float = 1.0
    """Weight of the L1 penalty on the gate."""
    weighted: bool = False
    """Whether the penalty weights each act by the norm of its decoder's row."""
    kind: ClassVar[str] = "gated"

    def new_parameters(self, d_sae: int) -> dict[str, Tensor]:
        return {name: torch.zeros(d_sae, dtype=torch.float32, device="cpu") for name in ("r_mag", "b_mag")}

    def per_latent(self, rule_state: RuleState) -> dict[str, Tensor]:
        return {name: rule_state[name] for name in ("b_enc", "r_mag", "b_mag")}

    def activate(self, pre: Tensor, rows: RuleState) -> Tensor:
        return reference.gated(wide(pre), wide(rows["b_enc"]), rows["r_mag"], rows["b_mag"]).to(pre.dtype)

    def sparsity(self, pre: Tensor, acts: Tensor, rows: RuleState, norms: Tensor) -> Tensor:
        return torch.relu(pre) * norms if self.weighted else torch.relu(pre)

    def gate(self, pre: Tensor) -> Tensor:
        return torch.relu(pre)
