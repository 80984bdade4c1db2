"""Rules that activate every latent above a threshold: ReLU, JumpReLU, Gated, and their penalties."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastsae import reference
from fastsae.model.rules.base import Activation, EncodeOptions, RuleState, Sample, Selected, number, select_above
from fastsae.reference import wide

DEFAULT_L0 = 32.0
"""Target L0 of a rule that is given neither a weight nor a target; without a target, thresholds also start there."""
START = 0.1
"""The L1 penalty at the start, as a share of the loss of reconstructing nothing."""
START_L0 = 0.03
"""The same for JumpReLU's penalty, whose gradient does not shrink with the acts: at 0.3, L0 first fell from 10 to 1."""
SMOOTH = 0.9
"""Decay, per batch, of the mean of L0 that the penalty's weight follows."""
INTEGRAL = 0.05
"""By how much the logarithm of the weight rises per batch while L0 is e times its target."""
PROPORTIONAL = 3.0
"""By how much the logarithm of the weight rises when L0 becomes e times what it was."""
REWARD = 10.0
"""How far a weight may fall below 0, in units of its first value, so that a reward stays in proportion to the loss."""
WIDTH = 0.5
"""The kernel's width as a share of the threshold, if no bandwidth is given."""
TINY = 1e-12
"""Below every L0, loss and penalty that is not 0, whose logarithm would not be finite."""


@dataclass(frozen=True)
class _Threshold(Activation):
    """What the rules of this file share: `activate` decides elementwise, on every pre-act, which latents are active."""

    shaped: ClassVar[bool] = True

    def check(self, d_sae: int) -> None:
        pass

    def apart(self, rule_state: RuleState, training: bool) -> bool:
        return True

    def dense(self, pre: Tensor, rows: RuleState, rule_state: RuleState, training: bool) -> Tensor:
        return self.activate(pre, rows)


@dataclass(frozen=True)
class _Targeted(_Threshold):
    """What the rules with a penalty share: its weight is fixed, or adjusted so that the mean L0 is target_l0.

    The adjusted weight is exp(`log_coef`), a buffer. It starts from the first batch, at START of the loss of
    reconstructing nothing, over the penalty: in the units of the data and of the loss. After every batch

        m   = the mean of the batches' L0, their weights decaying by SMOOTH and divided by their sum
        e   = log(m / target_l0), held within ±3
        log_coef += INTEGRAL · (e held within ±1) + PROPORTIONAL · (e - e of the batch before)

    so a factor in L0 changes the weight by a factor, whatever the sizes of both. L0 responds to a weight by drifting,
    not at once: without the second term (proportional, as the weight sees it) the two would oscillate. If the logarithm
    of L0 falls by a·d in a batch whose weight is e^d times the one that holds L0, the loop's poles are the roots of
    s² + a·PROPORTIONAL·s + a·INTEGRAL. They are real, so that L0 does not oscillate, for a >= 4·INTEGRAL /
    PROPORTIONAL² = 1 / 45, and the slower one is near INTEGRAL / PROPORTIONAL: an error decays in some 60 batches.

    If the squared error alone holds L0 below its target, no penalty is small enough. A rule that `rewards` lets the
    weight fall below 0; w is its first weight (log_start = log w):

        weight = exp(log_coef)                              where log_coef >= log_start
                 w · (2 - exp(log_start - log_coef))        below: the same value and slope there, 0 at log(w / 2)

    The weight is clamped to at least -REWARD · w, and log_coef with it, so that it can turn around at once.
    """

    @property
    def fixed(self) -> float | None:
        """The penalty's fixed weight, or None."""
        raise NotImplementedError

    @property
    def first_share(self) -> float:
        """The weighted penalty at the start, as a share of the loss of reconstructing nothing."""
        return START

    @property
    def rewards(self) -> bool:
        """Whether the adjusted weight may fall below 0."""
        return False

    @property
    def asked_l0(self) -> float | None:
        target: float | None = self.target_l0  # type: ignore[attr-defined]
        return target

    @property
    def coef(self) -> float:
        return 1.0 if self.fixed is None else self.fixed

    @property
    def from_data(self) -> bool:
        return self.fixed is None

    def settle(self, name: str, fixed: float | None, target: float | None) -> None:
        """A rule without a weight and a target gets the target DEFAULT_L0. Raises ValueError for bad numbers."""
        rule = type(self).__name__
        if fixed is None and target is None:
            object.__setattr__(self, "target_l0", DEFAULT_L0)
        if fixed is not None:
            number(rule, name, fixed)
        if target is not None:
            number(rule, "target_l0", target, positive=True)

    def check(self, d_sae: int) -> None:
        if self.asked_l0 is not None and self.asked_l0 > d_sae:
            raise ValueError(
                f"{type(self).__name__} has target_l0 = {self.asked_l0}, expected at most d_sae = {d_sae}; give another"
            )

    def new_buffers(self) -> dict[str, Tensor]:
        started = {"start_done": torch.zeros((), dtype=torch.int64, device="cpu")}
        driven = ("log_coef", "l0_mean", "l0_weight")
        if self.fixed is not None:
            return started if self.from_data else {}
        started |= {name: torch.zeros((), dtype=torch.float64, device="cpu") for name in driven}
        if self.rewards:
            started["log_start"] = no_log_start(torch.device("cpu"))
        return started

    def weight(self, rule_state: RuleState) -> Tensor | float:
        if self.fixed is not None:
            return self.fixed
        log_coef = rule_state["log_coef"]
        if not self.rewards:
            return log_coef.exp()
        start = rule_state["log_start"]
        return torch.where(log_coef >= start, log_coef.exp(), start.exp() * (2 - (start - log_coef).exp()))

    @torch.no_grad()
    def start(self, rule_state: RuleState, sample: Sample) -> None:
        self.start_thresholds(rule_state, sample, sample.bar(self.asked_l0 or DEFAULT_L0))

    def start_thresholds(self, rule_state: RuleState, sample: Sample, bar: float) -> None:
        """Sets biases and thresholds so that a latent is active `bar` standard deviations above its mean."""
        raise NotImplementedError

    @torch.no_grad()
    def stretch(self, rule_state: RuleState, factor: float) -> None:
        rule_state["b_enc"].mul_(factor)

    @torch.no_grad()
    def start_weight(self, rule_state: RuleState, zero: float, penalty: float) -> None:
        if self.fixed is None:
            # A batch of one repeated token may have no finite loss: use 1 instead, and the controller does the rest.
            zero, penalty = (max(v, TINY) if math.isfinite(v) else 1.0 for v in (zero, penalty))
            first = math.log(self.first_share * zero / penalty)
            for name in ("log_coef", "log_start") if self.rewards else ("log_coef",):
                rule_state[name].fill_(first)
        rule_state["start_done"].fill_(1)

    @torch.no_grad()
    def steer(self, rule_state: RuleState, l0: Tensor, made: Tensor) -> None:
        if self.fixed is not None or self.asked_l0 is None:
            return
        made = made & l0.isfinite()  # an empty batch has none
        mean, weight = rule_state["l0_mean"], rule_state["l0_weight"]
        heavier = SMOOTH * weight + (1 - SMOOTH)
        # The first share is exactly 1: the first mean is the first batch's L0.
        share = torch.where(weight == 0, 1.0, (1 - SMOOTH) / heavier)
        now = torch.lerp(mean, l0, share)
        error = (now.clamp_min(TINY) / self.asked_l0).log().clamp(-3, 3)
        before = torch.where(weight == 0, error, (mean.clamp_min(TINY) / self.asked_l0).log().clamp(-3, 3))
        change = INTEGRAL * error.clamp(-1, 1) + PROPORTIONAL * (error - before)
        rule_state["log_coef"].add_(torch.where(made, change, 0.0))
        if self.rewards:
            rule_state["log_coef"].clamp_min_(rule_state["log_start"] - math.log(2 + REWARD))
        mean.copy_(torch.where(made, now, mean))
        weight.copy_(torch.where(made, heavier, weight))


def no_log_start(device: torch.device) -> Tensor:
    """The `log_start` of a weight that never falls below 0: not started, or saved by an older version. 0-d float64."""
    return torch.full((), -math.inf, dtype=torch.float64, device=device)


@dataclass(frozen=True)
class _WithL1(_Targeted):
    """What ReLU and Gated share: the threshold is 0; the penalty is Σ acts, each times its row's norm if weighted."""

    l1: float | None = None
    weighted: bool = False
    target_l0: float | None = None

    def __post_init__(self) -> None:
        self.settle("l1", self.l1, self.target_l0)
        if self.l1 is not None and self.target_l0 is not None:
            raise ValueError(
                f"{type(self).__name__} has l1 = {self.l1} and target_l0 = {self.target_l0}: the target drives l1; "
                "give one of them"
            )

    @property
    def fixed(self) -> float | None:
        return self.l1

    @property
    def needs_norms(self) -> bool:
        return self.weighted

    def start_thresholds(self, rule_state: RuleState, sample: Sample, bar: float) -> None:
        rule_state["b_enc"].sub_((sample.mean + bar * sample.std).to(rule_state["b_enc"].dtype))

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

    Plain L1 needs a decoder of unit norm; otherwise acts shrink while the decoder grows. Source: Bricken et al. 2023;
    weighted by decoder norm: Templeton et al. 2024 (Scaling Monosemanticity); over layers: Lindsey et al. 2024.
    """

    l1: float | None = None
    """Fixed weight of the L1 penalty. Left out: it is adjusted to reach target_l0."""
    weighted: bool = True
    """Whether the penalty weights each act by the norm of its decoder's row."""
    target_l0: float | None = None
    """Active latents per token; the penalty's weight is adjusted to reach it. Left out: 32, or as many as its fixed
    weight leaves."""
    kind: ClassVar[str] = "relu"

    def activate(self, pre: Tensor, rows: RuleState) -> Tensor:
        return torch.relu(pre)

    def sparsity(self, pre: Tensor, acts: Tensor, rows: RuleState, norms: Tensor) -> Tensor:
        return acts * norms if self.weighted else acts


@dataclass(frozen=True)
class JumpReLU(_Targeted):
    """acts = pre where pre > θ, else 0, with θ = exp(log_threshold) per latent, learnt through a kernel of `bandwidth`.

    penalty_kind  "l0": l0 · mean L0, whose gradient reaches θ alone. "tanh": l0 · mean of
                  Σ tanh(tanh_scale·acts·‖W_dec‖), which trains encoder and decoder too.
                  "target": l0 · (mean L0 / target_l0 - 1)².
    Without a fixed l0, the gradient of "l0" and "target" reaches the encoder too, through the same kernel. The adjusted
    weight of "l0" may fall below 0, where the squared error alone keeps fewer latents active than target_l0.
    log_threshold and its gradient are float32 at least, whatever the weights are: the steps of an optimizer are smaller
    than bfloat16's spacing. Pre-acts have the weights' dtype: with narrow weights choose a bandwidth of several
    spacings of that dtype at the threshold, or the kernel sees only rounding.
    Source: Rajamanoharan et al. 2024 (arXiv 2407.14435); tanh: Conerly et al. 2025 (Transformer Circuits, January
    update), Lieberum et al. 2024 for θ's start; target: the trainer of dictionary_learning.
    """

    l0: float | None = None
    """Fixed weight of the L0 penalty. Left out: it is adjusted to reach target_l0."""
    threshold: float | None = None
    """Threshold at the start, the same for all latents. Left out: from the first batch, so that L0 is target_l0."""
    bandwidth: float | None = None
    """Width of the kernel through which the threshold learns. Left out: half of each latent's threshold."""
    penalty_kind: Literal["l0", "tanh", "target"] = "l0"
    """L0 itself, a tanh that trains the weights too, or the squared distance from target_l0."""
    target_l0: float | None = None
    """Target for the active latents per token: the penalty's weight is adjusted to reach it, or penalty_kind target
    penalizes the distance from it. Left out: 32, or, with a fixed weight, none."""
    tanh_scale: float = 4.0
    """How steep the tanh of penalty_kind tanh is."""
    kind: ClassVar[str] = "jumprelu"

    def __post_init__(self) -> None:
        for name in ("threshold", "bandwidth", "tanh_scale"):
            if getattr(self, name) is not None:
                number("JumpReLU", name, getattr(self, name), positive=True)
        if self.penalty_kind not in ("l0", "tanh", "target"):
            raise ValueError(f"JumpReLU has penalty_kind = {self.penalty_kind!r}, expected 'l0', 'tanh' or 'target'")
        if self.penalty_kind == "target" and self.target_l0 is None:
            raise ValueError("JumpReLU has penalty_kind = 'target' and target_l0 = None; 'target' needs a target_l0")
        self.settle("l0", self.l0, self.target_l0)
        if self.penalty_kind != "target" and self.l0 is not None and self.target_l0 is not None:
            raise ValueError(
                f"JumpReLU has l0 = {self.l0} and target_l0 = {self.target_l0}: the target drives l0; give one of "
                "them, or penalty_kind='target', which has a fixed weight"
            )

    @property
    def fixed(self) -> float | None:
        return self.l0

    @property
    def from_data(self) -> bool:
        return self.l0 is None or self.threshold is None

    @property
    def needs_norms(self) -> bool:
        return self.penalty_kind == "tanh"

    @property
    def penalty_is_mean(self) -> bool:
        return self.penalty_kind != "target"

    @property
    def first_share(self) -> float:
        return START_L0

    @property
    def rewards(self) -> bool:
        # A count of active latents is bounded, and its gradient vanishes once a pre-act leaves the kernel. A reward for
        # acts, such as a negative L1, would be unbounded, and one for their tanh would enlarge active acts.
        return self.fixed is None and self.penalty_kind == "l0"

    def new_parameters(self, d_sae: int) -> dict[str, Tensor]:
        start = math.log(self.threshold or 1.0)
        return {"log_threshold": torch.full((d_sae,), start, dtype=torch.float32, device="cpu")}

    def start_thresholds(self, rule_state: RuleState, sample: Sample, bar: float) -> None:
        if self.threshold is not None:
            return
        b_enc, log_threshold = rule_state["b_enc"], rule_state["log_threshold"]
        b_enc.sub_(sample.mean.to(b_enc.dtype))
        # A constant latent would start at log 0.
        log_threshold.copy_((max(bar, TINY) * sample.std).clamp_min(TINY).log())

    @property
    def rescales(self) -> bool:
        return self.threshold is None

    def stretch(self, rule_state: RuleState, factor: float) -> None:
        super().stretch(rule_state, factor)
        rule_state["log_threshold"].add_(math.log(factor))

    def start_weight(self, rule_state: RuleState, zero: float, penalty: float) -> None:
        # At the target the squared distance is 0 and gives no scale; its slope is 2 where that of L0 / target_l0 is 1.
        super().start_weight(rule_state, zero, 0.1 if self.penalty_kind == "target" else penalty)

    def steer(self, rule_state: RuleState, l0: Tensor, made: Tensor) -> None:
        if self.penalty_kind != "target":  # there the penalty's own slope drives L0
            super().steer(rule_state, l0, made)

    def width(self, threshold: Tensor) -> Tensor | float:
        """The kernel's width around each threshold; a share of it follows the inputs' scale by itself."""
        return WIDTH * threshold.detach() if self.bandwidth is None else self.bandwidth

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
        bar = rule_state["log_threshold"].detach().exp()
        bar = bar - self.width(bar) / 2 if training else bar
        return select_above(x, W, b, bar, options, capacity)

    def considered(self, pre: Tensor, rows: RuleState) -> Tensor:
        return reference.is_above(pre, rows["threshold"] - self.width(rows["threshold"]) / 2)

    def per_latent(self, rule_state: RuleState) -> dict[str, Tensor]:
        return {"threshold": rule_state["log_threshold"].exp()}

    def activate(self, pre: Tensor, rows: RuleState) -> Tensor:
        threshold = rows["threshold"].expand_as(pre)
        return reference.jump_relu(wide(pre), threshold, self.width(threshold)).to(pre.dtype)

    def sparsity(self, pre: Tensor, acts: Tensor, rows: RuleState, norms: Tensor) -> Tensor:
        if self.penalty_kind == "tanh":
            return torch.tanh(self.tanh_scale * wide(acts) * norms)
        threshold = rows["threshold"].expand_as(pre)
        # A threshold moves by at most the learning rate per step, and the encoder's rows move faster: a weight that
        # holds an L0 must act on both. Through θ alone SmolLM2 stayed at L0 12.7 (target 10) while the weight kept
        # rising.
        return reference.heaviside(wide(pre), threshold, self.width(threshold), through=self.l0 is None)

    def penalty(self, mean: Tensor) -> Tensor:
        if self.penalty_kind != "target":
            return mean
        assert self.target_l0 is not None
        return (mean / self.target_l0 - 1).square()


@dataclass(frozen=True)
class Gated(_WithL1):
    """acts = relu(exp(r_mag)·(x Wᵀ) + b_mag) where the gate x Wᵀ + b_enc is above 0, else 0.

    The gate learns from its own losses: l1 · mean of Σ relu(gate) (weighted: times ‖W_dec‖), and the squared error of
    reconstructing the target from relu(gate) with the decoder held fixed. r_mag and b_mag are float32 at least.
    Source: Rajamanoharan et al. 2024 (arXiv 2404.16014), eq. 5 to 8.
    """

    l1: float | None = None
    """Fixed weight of the L1 penalty on the gate. Left out: it is adjusted to reach target_l0."""
    weighted: bool = False
    """Whether the penalty weights each act by the norm of its decoder's row."""
    target_l0: float | None = None
    """Active latents per token; the penalty's weight is adjusted to reach it. Left out: 32, or as many as its fixed
    weight leaves."""
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

    def start_thresholds(self, rule_state: RuleState, sample: Sample, bar: float) -> None:
        # What passes the gate keeps its size: gate - b_enc + b_mag is the pre-act less its mean.
        rule_state["b_mag"].copy_(rule_state["b_enc"] - sample.mean)
        super().start_thresholds(rule_state, sample, bar)

    def stretch(self, rule_state: RuleState, factor: float) -> None:
        super().stretch(rule_state, factor)
        rule_state["b_mag"].mul_(factor)
