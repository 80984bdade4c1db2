"""Parameters: the tensors of a SparseAutoencoder, their initial values, its saved settings; sae.py has the forward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastsae.model.initial import unit_rows
from fastsae.model.norm import InputNorm
from fastsae.model.placement import Placement
from fastsae.model.rules import Activation, activation_from_config
from fastsae.model.rules.threshold import no_log_start
from fastsae.model.settings import (
    EXTRA_STATE,
    Config,
    RecordsSettings,
    check_creation,
    check_rule_dtype,
    check_settings,
    config_of,
)
from fastsae.ops import HeldScreen
from fastsae.ops.ledger import LedgerGradient
from fastsae.reference import decoder_norms, wide
from fastsae.warn import warn

_SETTINGS = (
    "d_in", "d_sae", "d_out", "pre_bias", "decoder_norm", "tied", "skip", "layers", "init_norm", "aux_k", "aux_coef",
    "ghost", "ghost_coef", "dead_after", "loss",
)  # fmt: skip

DENSE_ABOVE = 0.08
"""A threshold rule's training step is dense where more than this share of the latents is active."""


def project_rows_(grad: Tensor, W: Tensor) -> None:
    """grad_i -= ⟨grad_i, W_i⟩ W_i / ‖W_i‖², in place, for rows of (*B, M, D). A row of 0 keeps its gradient."""
    # A row of 0 has no direction to project away: 0 / tiny leaves its gradient alone.
    squares = torch.linalg.vecdot(W, W).clamp_min(torch.finfo(W.dtype).tiny)
    grad.addcmul_(W, (torch.linalg.vecdot(grad, W) / squares).unsqueeze(-1), value=-1)


def normalize_rows_(W: Tensor) -> None:
    """W_i /= ‖W_i‖, in place, for rows of (*B, M, D). A row of 0 stays 0."""
    norms = torch.linalg.vector_norm(W, dim=-1, keepdim=True)
    W.div_(norms.clamp_min(torch.finfo(norms.dtype).tiny))


class Parameters(RecordsSettings):
    """The parameters, buffers and settings of an SAE; SparseAutoencoder's docstring says what each means."""

    W_enc: nn.Parameter | None
    W_skip: nn.Parameter | None
    tokens_since_fired: Tensor
    fired: Tensor
    fired_over: Tensor
    penalty_scale: Tensor

    norm: InputNorm
    started: bool
    """Whether the rule has been initialized from the first training batch. A host flag: reading it does not sync."""

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        activation: Activation,
        *,
        d_out: int | None = None,
        pre_bias: bool | None = None,
        decoder_norm: str = "unit",
        normalize: str | None = None,
        tied: bool = False,
        skip: bool = False,
        layers: int = 1,
        init_norm: float = 1.0,
        aux_k: int | None = None,
        aux_coef: float = 1 / 32,
        ghost: str | None = None,
        ghost_coef: float = 1.0,
        dead_after: int = 10_000_000,
        loss: str = "mse",
        dtype: torch.dtype | None = None,
        rule_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ):
        super().__init__()
        self.d_in, self.d_sae, self.d_out = d_in, d_sae, d_in if d_out is None else d_out
        self.activation = activation
        self.pre_bias = self.d_out == d_in if pre_bias is None else pre_bias
        # Open: not decided yet, neither by the user nor by training. A target of another width decides at once.
        self._pre_bias_open = pre_bias is None and self.d_out == d_in
        self._pre_bias_asked = not self._pre_bias_open
        self.decoder_norm, self.tied, self.skip = decoder_norm, tied, skip
        self.layers, self.init_norm = layers, init_norm
        self.aux_k, self.aux_coef, self.ghost, self.ghost_coef = aux_k, aux_coef, ghost, ghost_coef
        self.dead_after, self.loss = dead_after, loss
        check_settings(self)
        check_creation(dtype, seed)
        check_rule_dtype(activation, rule_dtype)
        self.rule_dtype = rule_dtype
        self.backend: str | None = None
        self.annealed_k: int | None = None  # set by the training step, not saved
        self.precision = "exact"
        self._resting = HeldScreen()
        self.dense_above = DENSE_ABOVE
        self.active_share: float | None = None  # of the last step of a threshold rule
        self.room: int | None = None  # slots of a threshold rule's code in a CUDA graph; set by the training step
        self.placement: Placement | None = None  # set by fastsae.parallel: what this process has of a larger SAE
        factory: dict[str, Any] = {"dtype": dtype, "device": device}
        if normalize is None:  # a common unit: biases and thresholds learn at the same pace at any scale of the inputs
            normalize = "constant" if activation.from_data and activation.asked_l0 is not None else "none"
        self.norm = InputNorm(normalize, **factory)
        self.W_dec = nn.Parameter(torch.empty(d_sae, self.d_out, **factory))
        self.register_parameter("W_enc", None if tied else nn.Parameter(torch.empty(d_sae, d_in, **factory)))
        self.b_enc = nn.Parameter(torch.empty(d_sae, **factory))
        self.b_dec = nn.Parameter(torch.empty(self.d_out, **factory))
        self.register_parameter("W_skip", nn.Parameter(torch.empty(self.d_out, d_in, **factory)) if skip else None)
        wider = torch.promote_types(rule_dtype, self.W_dec.dtype)
        self._rule_names = tuple(activation.new_parameters(d_sae)), tuple(activation.new_buffers())
        for name, start in activation.new_parameters(d_sae).items():
            self.register_parameter(name, nn.Parameter(torch.empty_like(start, dtype=wider, device=self.W_dec.device)))
        for name, start in activation.new_buffers().items():
            self.register_buffer(name, torch.empty_like(start, device=self.W_dec.device))
        self.register_buffer("tokens_since_fired", torch.zeros(d_sae, dtype=torch.int64, device=device))
        self.begin_counts_(device)
        self.reset_parameters(seed)

    def begin_counts_(self, device: torch.device | str | None = None) -> None:
        """Creates the buffers that are not saved: the counters of `density`, and the penalty's multiplier.

        A schedule sets the multiplier during a step; otherwise it is 1.
        """
        fired = torch.zeros(self.d_sae, dtype=torch.int64, device=device)
        over = torch.zeros((), dtype=torch.int64, device=device)
        one = torch.ones((), dtype=torch.float64, device=device)
        for name, t in (("fired", fired), ("fired_over", over), ("penalty_scale", one)):
            self.register_buffer(name, t, persistent=False)

    def train(self, mode: bool = True) -> Self:
        """As of nn.Module. In eval mode the encoder holds a low-precision copy (`ops.HeldScreen`), dropped here."""
        self._resting = HeldScreen()
        return super().train(mode)

    @property
    def resting_screen(self) -> HeldScreen | None:
        """The encoder's copy in eval mode, when its weights rest; None in training mode."""
        # By __dict__: a module pickled whole by an earlier version has none.
        return self.__dict__.get("_resting") if self.rule.screened and not self.training else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`.to(...)` and similar. The rule's parameters get `rule_dtype`, or the weights' dtype if that is wider; its
        buffers keep theirs. Raises RuntimeError, before anything changes, where gradients wait as terms for a step.
        """
        if waiting := [name for name, p in self.named_parameters() if isinstance(p.grad, LedgerGradient)]:
            raise RuntimeError(
                f"{', '.join(waiting)} have gradients pending in an optimizer of fastsae.optim, which cannot be moved "
                "or cast; call its step() or zero_grad() first"
            )
        learnt, remembered = self._rule_names
        kept = {name: getattr(self, name).detach() for name in (*learnt, *remembered, "penalty_scale")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            now = getattr(self, name)
            wanted = torch.promote_types(self.rule_dtype, self.W_dec.dtype) if name in learnt else before.dtype
            if now.dtype != wanted and not now.is_meta:
                now.data = before.to(now.device, wanted)
                now.grad = None  # it has the other dtype, and may have been rounded
        return self

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """W_dec: random directions; W_enc: the same rows (its own where the widths differ); biases and W_skip 0.

        Row norms: `init_norm`, or 1 for a decoder of unit norm. The rule's parameters and buffers get initial values.

        Drawn on the CPU, so that a seed gives the same weights on every device; of an SAE on several processes each
        gets its rows of them. Source: Gao et al. 2024, section 2.4.
        """
        nn.init.zeros_(self.b_enc)
        nn.init.zeros_(self.b_dec)
        self.tokens_since_fired.zero_()
        self.fired.zero_()
        self.fired_over.zero_()
        self.penalty_scale.fill_(1.0)
        if self.W_skip is not None:
            nn.init.zeros_(self.W_skip)
        rule = self.activation
        self.started = not rule.from_data
        for name, start in {**rule.new_parameters(self.d_sae), **rule.new_buffers()}.items():
            getattr(self, name).copy_(start)
        if self.W_dec.is_meta:
            return
        generator = None if seed is None else torch.Generator().manual_seed(int(seed))
        part = (0 if self.placement is None else self.placement.first, self.d_sae)
        self.W_dec.copy_(unit_rows(self.n_latents, self.d_out, self.W_dec.dtype, generator, *part))
        if self.W_enc is not None:
            other = self.d_in != self.d_out
            drawn = unit_rows(self.n_latents, self.d_in, self.W_enc.dtype, generator, *part) if other else self.W_dec
            self.W_enc.copy_(drawn)
            self.W_enc.mul_(self.init_norm)
        if self.decoder_norm == "free":
            self.W_dec.mul_(self.init_norm)

    def settle_pre_bias_(self, target_given: bool) -> None:
        """Decides a pre_bias that was left None: the first target turns it off; training without a target keeps it on.

        Called with every batch, before anything is computed from `pre_bias`. Warns when it turns pre_bias off, and
        once when the first target comes too late, after training without one.
        """
        if not target_given:
            if self.training:
                self._pre_bias_open = False  # not read here: torch.compile would recompile after the first batch
            return
        if self._pre_bias_asked:
            return
        was_open, self._pre_bias_asked, self._pre_bias_open = self._pre_bias_open, True, False
        if was_open:
            self.pre_bias = False
        if not torch.compiler.is_compiling():  # a warning is a graph break
            what = "is now off" if was_open else "stays on, because this SAE was trained without a target before"
            warn(
                f"a target was given and pre_bias was left None: it {what}. Pass pre_bias=False (b_dec is a mean of "
                "targets, not of x) or pre_bias=True at construction",
                UserWarning,
            )

    @property
    def config(self) -> Config:
        """The settings as JSON: what `from_config` needs to build an SAE that `state_dict()` fits.

        "pre_bias" is null if it was left None and neither a target nor training has decided it yet.
        """
        settings = {name: getattr(self, name) for name in _SETTINGS}
        settings["pre_bias"] = None if self._pre_bias_open else self.pre_bias
        rule_state = {"activation": self.activation.config(), "normalize": self.norm.mode}
        return Config(settings | rule_state | {"rule_dtype": str(self.rule_dtype).removeprefix("torch.")})

    # -- the state dict records the settings --------------------------------------------------------------------------

    def _recorded(self) -> dict[str, Any]:
        """The settings, and of a part of an SAE also which: rows of other latents must not be taken for its own."""
        p = self.placement
        if p is None or p.own == p.d_sae:
            return self.config
        return self.config | {"part": f"{p.first} to {p.first + p.own} of {p.d_sae}"}

    def set_extra_state(self, state: Tensor) -> None:
        """Takes pre_bias from the state if this SAE left it open; `load_state_dict` checks the other settings.

        Raises ValueError for what `get_extra_state` did not write.
        """
        decided = config_of(state).get("pre_bias")
        if self._pre_bias_open and decided is not None:
            self.pre_bias, self._pre_bias_open, self._pre_bias_asked = decided, False, True

    def _of_older(self, state_dict: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
        return of_older(state_dict, prefix, self._rule_names[1])

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self.fired.is_meta and not self.W_dec.is_meta:  # assign=True gave a module on meta all that is saved
            self.begin_counts_(self.W_dec.device)
        if prefix + EXTRA_STATE not in state_dict:
            self._pre_bias_open = False  # saved before pre_bias could be open
        if prefix + "start_done" in state_dict and not state_dict[prefix + "start_done"].is_meta:
            self.started = not self.activation.from_data or bool(state_dict[prefix + "start_done"])
        elif prefix + "b_enc" in state_dict:
            self.started = True  # biases and thresholds are the state's; data is not to overwrite them

    @classmethod
    def from_config(cls, config: dict[str, Any], **factory: Any) -> Self:
        """An SAE with the settings of `config`; `factory`: dtype, device, seed. Raises ValueError for bad settings."""
        if not isinstance(config, dict) or "activation" not in config:
            raise ValueError(f"got the settings {config!r}, expected an object with d_in, d_sae, activation, ...")
        given = {**config, "activation": activation_from_config(config["activation"])}
        if isinstance(given.get("rule_dtype"), str):
            given["rule_dtype"] = getattr(torch, given["rule_dtype"], given["rule_dtype"])
        try:
            return cls(**given, **factory)
        except TypeError as error:
            raise ValueError(f"the settings do not fit a SparseAutoencoder: {error}") from error

    @property
    def n_latents(self) -> int:
        """The latents of the whole SAE, of which this process may have d_sae."""
        return self.d_sae if self.placement is None else self.placement.d_sae

    def check_whole(self, what: str) -> None:
        """Raises RuntimeError if this process has a part of an SAE only, for what needs all of it."""
        if self.placement is not None:
            raise RuntimeError(
                f"{what} reads all rows and latents, and this process has a part of them; call it before parallelize, "
                "or on fastsae.parallel.gathered(sae)"
            )

    @property
    def encoder_weight(self) -> nn.Parameter:
        """The dictionary that the encoder reads (M, d_in): W_enc, or W_dec when tied."""
        return self.W_dec if self.W_enc is None else self.W_enc

    @property
    def rule(self) -> Activation:
        """`activation`; in training with k = `annealed_k`, if that is set."""
        annealed = self.annealed_k if self.training else None
        return self.activation if annealed is None else self.activation.with_k(annealed)

    @property
    def rule_state(self) -> dict[str, Tensor]:
        """The rule's parameters and buffers, and b_enc, by name."""
        return {"b_enc": self.b_enc, **{name: getattr(self, name) for names in self._rule_names for name in names}}

    @property
    def selection_state(self) -> dict[str, Tensor]:
        """`rule_state`, and what else the rule's `select` and `dense` read: "norms" if it selects by them."""
        if not self.activation.selects_by_norm:
            return self.rule_state
        return self.rule_state | {"norms": decoder_norms(wide(self.W_dec.detach()), self.layers)}

    @property
    def rule_parameters(self) -> dict[str, nn.Parameter]:
        """The rule's trained parameters, by name."""
        return {name: getattr(self, name) for name in self._rule_names[0]}

    @property
    def penalty_weight(self) -> Tensor:
        """The weight of the rule's penalty in the loss, the schedule's multiplier included: 0-d float64, a copy."""
        return self.rule.weight(self.rule_state) * self.penalty_scale

    @torch.no_grad()
    def project_gradients_(self) -> None:
        """grad_i -= ⟨grad_i, W_dec_i⟩ W_dec_i / ‖W_dec_i‖² where the decoder has unit norm; before optimizer.step()."""
        if self.decoder_norm == "unit" and self.W_dec.grad is not None:
            project_rows_(self.W_dec.grad, self.W_dec)

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """W_dec_i /= ‖W_dec_i‖ where the decoder has unit norm; after optimizer.step(). A row of 0 stays 0."""
        if self.decoder_norm == "unit":
            normalize_rows_(self.W_dec)

    def extra_repr(self) -> str:
        settings = [f"{name}={getattr(self, name)!r}" for name in _SETTINGS]
        return ", ".join([*settings, f"activation={self.activation!r}"])


def of_older(state_dict: Mapping[str, Any], prefix: str, buffers: Collection[str]) -> Mapping[str, Any]:
    """The state with the threshold_weight and log_start that a module with these buffers has and an older one lacks."""
    more: dict[str, Tensor] = {}
    for name, beside, old in (
        ("threshold_weight", "threshold", weight_of_old),
        ("log_start", "log_coef", lambda log_coef: no_log_start(log_coef.device)),
    ):
        if name in buffers and prefix + beside in state_dict and prefix + name not in state_dict:
            more[prefix + name] = old(state_dict[prefix + beside])
    return {**state_dict, **more} if more else state_dict


def weight_of_old(threshold: Tensor) -> Tensor:
    """The threshold_weight of a state that was saved before there was one: float32, of the threshold's shape.

    Such a threshold is a plain mean, with decay 0.999 by default, and may be far behind: L0 1 for k = 16 after 300
    steps. It stays as it is, as a mean of full weight, with a warning; an unset one (-1) has no weight.
    """
    known = torch.zeros_like(threshold, dtype=torch.bool) if threshold.is_meta else threshold >= 0
    if not known.is_meta and bool(known.any()):
        warn(
            f"this state's BatchTopK threshold {threshold.tolist()} is from an older fastsae, whose running mean was "
            "slow: L0 may be far from k at inference. Set it with sae.calibrate_threshold_(x) on rows of the data",
            UserWarning,
        )
    return known.to(threshold.dtype)
