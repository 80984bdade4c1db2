"""SAEBatch: B independent SAEs of one shape, and BatchTrainStep, which trains all of them at once.

For sweeps of seeds or sparsities over SAEs so small that overhead dominates a single step. One dense product computes
all pre-acts (B, N, M) of x (N, D) or (B, N, D). All B·N·M numbers are computed and stored: above `BATCH_WORTH`, one
fused step after the other is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsae import reference
from fastsae.model import counting, losses
from fastsae.model.parameters import normalize_rows_, of_older, project_rows_
from fastsae.model.rules import Activation, BatchTopK, GroupMax, Matryoshka, TopK
from fastsae.model.sae import SparseAutoencoder, outside_graph
from fastsae.model.settings import Config, RecordsSettings
from fastsae.ops import checks
from fastsae.ops.encode import infinite_as_nan
from fastsae.ops.gradients import moves_little
from fastsae.ops.register import without_autocast
from fastsae.reference import Forward
from fastsae.training.skipped import FirstSkip, say_rows, torch_adam
from fastsae.training.step import check_settings_of, load_named_state, settings_of

BATCH_WORTH = 2**18
"""N·M above which SAEs train faster one by one, each with a FusedTrainStep: `python -m bench.batch` measures it."""
NORMS = ("unit", "forward", "free")
COEFFICIENT = {"relu": "l1", "gated": "l1", "jumprelu": "l0"}


class SAEBatch(RecordsSettings):
    """B SAEs that differ in their seeds and, where `activation` is a list, in their rule's coefficient or k.

    n             B, the number of SAEs.
    activation    one rule for all, or a list of B rules of one kind that differ only in l1 (ReLU, Gated), l0 (JumpReLU)
                  or k (TopK, BatchTopK).
    d_out, pre_bias, tied, loss, ghost, ghost_coef, dead_after: as SparseAutoencoder's; ghost is None or "pull".
    decoder_norm  "unit" and "free" as SparseAutoencoder's. "forward": rows are divided by their norm whenever they are
                  read; the parameters' own norms are free to grow, and only affect how fast the rows turn.
    encoder_norm  "free", or "forward" in the same way.
    init_norm     initial norm of the encoder's rows, and of the decoder's unless decoder_norm is "unit".
    seeds         one for each SAE, 0 to B - 1 by default: initial weights as of SparseAutoencoder(seed=...).

    Parameters: W_enc (B, M, d_in; none when tied), W_dec (B, M, d_out), b_enc (B, M), b_dec (B, d_out), the rule's own
    (B, M). Buffers: tokens_since_fired (B, M) int64, penalty_scale (B,), the rule's own (B,).
    Raises ValueError for settings that do not fit together.
    """

    tokens_since_fired: Tensor
    penalty_scale: Tensor
    ks: Tensor
    threshold: Tensor

    def __init__(
        self,
        n: int,
        d_in: int,
        d_sae: int,
        activation: Activation | Sequence[Activation],
        *,
        d_out: int | None = None,
        pre_bias: bool = True,
        decoder_norm: str = "unit",
        encoder_norm: str = "free",
        tied: bool = False,
        loss: str = "mse",
        init_norm: float = 1.0,
        ghost: str | None = None,
        ghost_coef: float = 1.0,
        dead_after: int = 10_000_000,
        seeds: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        seeds = tuple(range(n) if seeds is None else seeds)
        if n < 1 or len(seeds) != n:
            raise ValueError(
                f"n is {n} and there are {len(seeds)} seeds; expected at least one SAE, and a seed for each"
            )
        for name, value, choices in (
            ("decoder_norm", decoder_norm, NORMS), ("encoder_norm", encoder_norm, NORMS[1:]),
            ("ghost", ghost, (None, "pull")),
        ):  # fmt: skip
            if value not in choices:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(str, choices))}")
        if tied and encoder_norm != "free":
            raise ValueError("a tied encoder uses the decoder's rows, which decoder_norm normalizes; drop encoder_norm")
        if not isinstance(activation, (Activation, Sequence)):
            raise ValueError(f"activation is {activation!r}, expected a rule, as fastsae.TopK(32), or a list of {n}")
        self.rules = (activation,) * n if isinstance(activation, Activation) else tuple(activation)
        self.activation, scale, ks = _common(self.rules, n)
        self.settings: dict[str, Any] = {
            "d_out": d_out, "pre_bias": pre_bias, "decoder_norm": "unit" if decoder_norm == "unit" else "free",
            "tied": tied, "loss": loss, "init_norm": init_norm, "ghost": ghost, "ghost_coef": ghost_coef,
            "dead_after": dead_after, "dtype": dtype,
        }  # fmt: skip
        members = [self._single(d_in, d_sae, rule, seed) for rule, seed in zip(self.rules, seeds, strict=True)]
        first = members[0]
        self.counts = True  # False: the caller counts, such as a step that may be skipped
        self.seeds, self.pre_bias, self.loss = seeds, pre_bias, loss
        self.ghost, self.ghost_coef, self.dead_after = ghost, ghost_coef, dead_after
        self.d_in, self.d_sae, self.d_out = first.d_in, first.d_sae, first.d_out
        self.decoder_norm, self.encoder_norm = decoder_norm, encoder_norm
        for name, _ in first.named_parameters():
            stacked = torch.stack([member.get_parameter(name).detach() for member in members])
            self.register_parameter(name, nn.Parameter(stacked.to(device)))
        self._rule_names = (*self.activation.new_parameters(1), *self.activation.new_buffers())
        for name in self.activation.new_buffers():
            self.register_buffer(name, torch.stack([member.get_buffer(name) for member in members]).to(device))
        self.register_buffer("tokens_since_fired", torch.zeros(n, d_sae, dtype=torch.int64, device=device))
        self.register_buffer("penalty_scale", scale.to(device, first.W_dec.dtype), persistent=False)
        self.register_buffer("ks", ks.to(device), persistent=False)

    @property
    def config(self) -> Config:
        """The settings as JSON, which a state dict records: in "activation", those that differ are lists of B."""
        kept = {name: value for name, value in self.settings.items() if name != "dtype"}
        norms = {"decoder_norm": self.decoder_norm, "encoder_norm": self.encoder_norm}
        sizes = {"n": len(self), "d_in": self.d_in, "d_sae": self.d_sae, "d_out": self.d_out}
        return Config(kept | norms | sizes | {"activation": _together([rule.config() for rule in self.rules])})

    def _of_older(self, state_dict: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
        return of_older(state_dict, prefix, self._rule_names)

    def _single(self, d_in: int, d_sae: int, rule: Activation, seed: int) -> SparseAutoencoder:
        return SparseAutoencoder(d_in, d_sae, rule, **self.settings, seed=seed)

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """The i-th SAE's parameters and rule's buffers by name, as the forward pass reads them; views if possible."""
        named = {**self.weights(), **{name: getattr(self, name) for name in self._rule_names}}
        return {name: t[i].detach() for name, t in named.items()}

    @torch.no_grad()
    def to_sae(self, i: int) -> SparseAutoencoder:
        """The i-th SAE on its own, with its weights as the forward pass reads them and its counters."""
        sae = self._single(self.d_in, self.d_sae, self.rules[i], self.seeds[i]).to(self.tokens_since_fired.device)
        for name, t in {**self[i], "tokens_since_fired": self.tokens_since_fired[i]}.items():
            getattr(sae, name).copy_(t)
        return sae

    def weights(self) -> dict[str, Tensor]:
        """W_enc (unless tied), W_dec, b_enc and b_dec as the forward pass reads them."""
        named: dict[str, Tensor] = {name: p for name, p in self.named_parameters() if name not in self._rule_names}
        for name, norm in (("W_enc", self.encoder_norm), ("W_dec", self.decoder_norm)):
            if norm == "forward" and name in named:
                named[name] = F.normalize(named[name], dim=-1)
        return named

    @property
    def dead(self) -> Tensor:
        """Latents that have not fired for `dead_after` tokens: bool (B, M)."""
        return self.tokens_since_fired >= self.dead_after

    def checked(self, x: Tensor, width: int, name: str) -> Tensor:
        """x as (B, N, width) in the weights' dtype, from that shape or from (N, width), shared by all.

        Raises ValueError or TypeError for another shape or device, and for anything but a dense floating-point tensor.
        """
        checks.dense(name, x, self.tokens_since_fired.device)
        if x.ndim not in (2, 3) or x.shape[-1] != width or (x.ndim == 3 and x.shape[0] != len(self)):
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (N, {width}) or ({len(self)}, N, {width})")
        return x.to(self.get_parameter("W_dec").dtype).expand(len(self), *x.shape[-2:])

    def forward(self, x: Tensor, target: Tensor | None = None) -> Forward:
        """A (B, N, M), recon (B, N, d_out), losses by name (B,), of x (N, d_in) or (B, N, d_in).

        In training mode "loss" includes the ghost loss, and the batch counts, as of `SparseAutoencoder.forward`: at the
        end of the backward pass, once, for each SAE whose loss is finite.
        """
        if not self.training or not self.counts or torch.compiler.is_compiling():
            return self._forward(x, target)
        with counting.as_first_seen(self):
            return self._forward(x, target)

    def _forward(self, x: Tensor, target: Tensor | None) -> Forward:
        if target is None and self.d_out != self.d_in:
            raise ValueError(f"d_out = {self.d_out} is not d_in = {self.d_in}; pass target=")
        x = self.checked(x, self.d_in, "x")
        goal = x if target is None else self.checked(target, self.d_out, "target")
        if goal.shape[-2] != x.shape[-2]:
            raise ValueError(f"target has {goal.shape[-2]} tokens, expected {x.shape[-2]} as x")
        weights, x = self.weights(), infinite_as_nan(x)
        if isinstance(self.activation, (TopK, BatchTopK, GroupMax)):
            out = self._kept_forward(weights, x, goal)
        else:
            rule_state = {name: getattr(self, name) for name in self._rule_names}
            rule: Any = self.activation  # a frozen dataclass, where the protocol has a plain attribute
            out = reference.forward(
                weights, x, rule, rule_state, target=goal, pre_bias=self.pre_bias, loss=self.loss,
                penalty_scale=self.penalty_scale, training=self.training, loss_denominator=self._loss_denominator(goal),
            )  # fmt: skip
        if not self.training:
            return out
        batch = outside_graph("over_processes")(self, self.counted(out.A))
        losses = out.losses
        if self.ghost is not None:
            dead = torch.where(batch.counts, 0, self.tokens_since_fired + batch.tokens) >= self.dead_after
            ghost = self.ghost_loss(x, goal, out.recon.detach(), dead)
            losses = {**losses, "ghost": ghost, "loss": losses["loss"] + self.ghost_coef * ghost}
        if not self.counts:
            return replace(out, losses=losses)
        finite = outside_graph("in_all_processes")(self, losses["loss"].detach().isfinite())
        if not torch.compiler.is_compiling():
            counting.when_passed((out.A, out.recon), lambda: self.count_(batch, finite))
        elif torch.is_grad_enabled():
            self.count_(batch, finite & counting.counts_here(x))
        return replace(out, losses=losses)

    def counted(self, A: Tensor) -> counting.Counted:
        """The counts of a batch's code A (B, N, M)."""
        A, measured = A.detach(), None
        if self.activation.mean_k is not None:
            acts = torch.where(A > 0, A, torch.inf).float()
            measured = acts.amin((-2, -1)) if A.shape[-2] else acts.new_full((len(self),), torch.inf)
        return counting.Counted((A != 0).any(-2), A.shape[-2], measured)

    @torch.no_grad()
    def count_(self, batch: counting.Counted, made: Tensor) -> None:
        """Counts a batch for the SAEs for which made (B,) is true."""
        rule_state = {name: getattr(self, name) for name in self._rule_names}
        if not torch.compiler.is_compiling():
            counting.keep_counters(self, ("tokens_since_fired", *self.activation.new_buffers()))
        since = torch.where(batch.counts, 0, self.tokens_since_fired + batch.tokens)
        self.tokens_since_fired.copy_(torch.where(made[:, None], since, self.tokens_since_fired))
        self.activation.observe(batch.measured, rule_state, made)

    def _kept_forward(self, weights: dict[str, Tensor], x: Tensor, goal: Tensor) -> Forward:
        """`reference.forward` of a rule that keeps some of relu(pre) as it is, with as few autograd nodes as possible.

        (x - b_dec) W_encᵀ is two terms, so that no (B, N, D) gradient of the encoder's input is made for b_dec alone.
        """
        W_dec, b_dec, b_enc = weights["W_dec"], weights["b_dec"][:, None], weights["b_enc"][:, None]
        W_enc = weights.get("W_enc", W_dec)
        if self.pre_bias:
            b_enc = torch.baddbmm(b_enc, b_dec, W_enc.mT, alpha=-1)
        pre = torch.baddbmm(b_enc, x, W_enc.mT)
        A = torch.where(self._kept(pre.detach()), pre, 0)
        recon = torch.baddbmm(b_dec, A, W_dec)
        squared = F.mse_loss(recon, goal, reduction="none").sum((-2, -1))  # its gradient is one pass over the error
        loss = squared / self._loss_denominator(goal)
        return Forward(A, recon, {self.loss: loss, "loss": loss})

    def _loss_denominator(self, goal: Tensor) -> Tensor | int:
        """The divisor of the squared error of goal (B, N, d_out)."""
        return _variance(goal) if self.loss == "fvu" else max(goal.shape[-2], 1)

    def _kept(self, pre: Tensor) -> Tensor:
        """Whether the rule keeps relu(pre) and it is not 0: bool (B, N, M). NaN counts as the largest."""
        rule = self.activation
        by_threshold = isinstance(rule, BatchTopK) and not self.training and not bool((self.threshold < 0).any())
        if self.ks.numel() and not by_threshold:
            return self._kept_of_each(pre)
        if rule == TopK(1):  # one pass; ties go to the first, as in the stable sort
            best = torch.zeros_like(pre, dtype=torch.bool).scatter_(-1, pre.argmax(-1, keepdim=True), True)
            return best.logical_and_(reference.is_above(pre, pre.new_zeros(())))
        if isinstance(rule, TopK) and pre.device.type == "cpu":
            bar = pre.topk(rule.k).values[..., -1:].clamp_min(torch.finfo(pre.dtype).tiny)
            kept = (pre < bar).logical_not_()
            if bool((kept.sum(-1) <= rule.k).all()):  # else there are ties: use the slower stable sort
                return kept
        return rule.dense(pre, {}, {name: getattr(self, name) for name in self._rule_names}, self.training) != 0

    def _kept_of_each(self, pre: Tensor) -> Tensor:
        """`_kept` of a TopK or BatchTopK whose k, `ks` (B,), differs from SAE to SAE."""
        if not isinstance(self.activation, TopK):
            return reference.batch_top_k(pre, self.ks) != 0
        _, places = reference.top_k(torch.relu(pre), pre.shape[-1])
        first = torch.arange(pre.shape[-1], dtype=torch.int64, device=pre.device) < self.ks[:, None, None]
        kept = torch.zeros_like(pre, dtype=torch.bool).scatter_(-1, places, first.expand_as(pre))
        return kept.logical_and_(reference.is_above(pre, pre.new_zeros(())))

    def ghost_loss(self, x: Tensor, target: Tensor, recon: Tensor, dead: Tensor) -> Tensor:
        """Σ_dead softplus(-⟨u, W_enc_i⟩) + softplus(-⟨w, W_dec_i⟩) of each SAE, (B,): `losses.ghost_pull` with an axis.

        dead: bool (B, M). u, w: means of the encoder's input and of target - recon, each token weighted by its squared
        error, held fixed.
        The rows are the raw parameters, also for norm "forward": a row that turns also grows, and turns more slowly.
        """
        if dead.device.type == "cpu" and not bool(dead.any()):  # on a GPU this check would be a host sync
            return recon.new_zeros(len(self))
        named = dict(self.named_parameters())
        W_dec = named["W_dec"]
        W_enc = named.get("W_enc", W_dec)
        with torch.no_grad():
            u, w = losses.error_weighted_means(x, target - recon)
            if self.pre_bias:  # on the mean, because x is a far larger tensor
                u -= named["b_dec"]
        pull = F.softplus(-torch.bmm(W_enc, u[..., None])) + F.softplus(-torch.bmm(W_dec, w[..., None]))
        return torch.where(dead, pull[..., 0], 0).sum(-1)

    def extra_repr(self) -> str:
        kept = {name: value for name, value in self.settings.items() if name not in ("decoder_norm", "dtype")}
        norms = f"decoder_norm={self.decoder_norm!r}, encoder_norm={self.encoder_norm!r}"
        return f"{len(self)}, {self.d_in}, {self.d_sae}, {self.activation!r}, {norms}, " + ", ".join(
            f"{name}={value!r}" for name, value in kept.items()
        )


class BatchTrainStep:
    """`metrics = step(x)`: gradient, projection of a unit decoder's, Adam or AdamW, renormalization, for all at once.

    batch: an SAEBatch, or torch.compile of one, which then computes its forward pass.
    lr, betas, eps, weight_decay, optimizer ("adam", "adamw"): as torch's. They are elementwise, so the SAEs do not
    affect each other. schedule: multiplier of lr from the number of updates done.
    measure: also return mse, fvu, l0 and dead (latents). independent: as FusedTrainStep's.
    skipped: int64 (B,), the steps that left an SAE unchanged because its loss or one of its gradients was not finite;
    see fastsae.training.step. The other SAEs still take the step, and the first skip warns; this reads one bool back.
    Adam's step count, for bias correction, is shared: a step that only some skip counts for those too.
    Raises ValueError for another optimizer, for weight decay with adam, and for float16 weights.
    """

    def __init__(
        self,
        batch: SAEBatch,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optimizer: str = "adam",
        schedule: Callable[[int], float] | None = None,
        measure: bool = True,
        independent: bool = False,
    ):
        self._forward = batch
        batch = getattr(batch, "_orig_mod", batch)  # torch.compile's wrapper changes the parameters' names
        if not isinstance(batch, SAEBatch):
            raise TypeError(f"batch is a {type(batch).__name__}, expected an SAEBatch; FusedTrainStep trains one SAE")
        self.optimizer = torch_adam(optimizer, batch.parameters(), lr, betas, eps, weight_decay, fused=True)
        self.skipped = torch.zeros(len(batch), dtype=torch.int64, device=batch.get_parameter("W_dec").device)
        self.batch, self.lr, self.schedule, self.measure, self.step = batch, lr, schedule, measure, 0
        self.independent, self.first_skip = independent, FirstSkip()

    def __call__(self, x: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
        """One update on x (N, d_in), the same for all, or (B, N, d_in).

        Returns (B,) tensors: "loss" and its parts, with `measure` "mse", "fvu", "l0", "dead", from before the update;
        "skipped". Raises RuntimeError in one of several processes, unless `independent`.
        """
        checks.one_process(self.independent)
        batch = self.batch
        checks.gradients_possible()
        n = batch.checked(x, batch.d_in, "x").shape[-2]
        if n == 0:
            raise ValueError(f"x has shape {tuple(x.shape)}: an empty batch cannot train; skip it")
        losses.check_tokens(batch.loss, n)
        if self.schedule is not None:
            self.optimizer.param_groups[0]["lr"] = self.lr * self.schedule(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad(), without_autocast(x.device.type):
            batch.counts, counts = False, batch.counts
            try:
                out = self._forward(x, target)
            finally:
                batch.counts = counts
            out.losses["loss"].sum().backward()
        metrics = {name: value.detach() for name, value in out.losses.items()}
        with torch.no_grad(), without_autocast(x.device.type):
            made = self._may_step(out.losses["loss"])
            self.skipped += ~made
            batch.count_(batch.counted(out.A), made)
            if self.measure:
                goal = (x if target is None else target).to(out.recon.dtype)
                squares = (out.recon - goal).square().sum((-2, -1))
                metrics |= {
                    "mse": squares / max(x.shape[-2], 1),
                    "fvu": squares / _variance(goal),
                    "l0": (out.A != 0).sum((-2, -1), dtype=out.A.dtype) / max(x.shape[-2], 1),
                    "dead": batch.dead.sum(-1),
                }
            stays = None if bool(made.all()) else (~made).nonzero().squeeze(1)
            if stays is not None:
                self.first_skip(lambda: self._say(stays, x))
            if stays is None or len(stays) < len(batch):
                self._update(stays)
                self.step += 1
        return metrics | {"skipped": self.skipped.clone()}

    def _may_step(self, loss: Tensor) -> Tensor:
        """Which SAEs may make this step: bool (B,)."""
        group, W = self.optimizer.param_groups[0], self.batch.get_parameter("W_dec")
        lr = torch.tensor(group["lr"], dtype=torch.float64, device=W.device)
        made = loss.isfinite() & moves_little(
            "adam", group, W, lr=lr, step=torch.full_like(self.skipped, self.step + 1)
        )
        for p in self.batch.parameters():
            if p.grad is not None:
                made = made & torch.linalg.vector_norm(p.grad.flatten(1), dim=1).isfinite()
        return made

    @staticmethod
    def _say(stays: Tensor, x: Tensor) -> str:
        """Which SAEs skipped the step, and which rows of x (N, d_in) or (B, N, d_in) may be at fault."""
        which = ", ".join(str(i) if x.ndim == 2 else f"{i} ({say_rows(x[i])})" for i in stays.tolist())
        return f" of SAE {which}" + (f"; {say_rows(x)}" if x.ndim == 2 else "")

    def _update(self, stays: Tensor | None) -> None:
        """One step of all SAEs except those with these indices."""
        parameters = [p for p in self.batch.parameters() if p.grad is not None]  # a frozen one has none
        W = self.batch.get_parameter("W_dec")
        kept = [] if stays is None else [p[stays].clone() for p in parameters]
        moments = [] if stays is None else [self._moments_of(p, stays) for p in parameters]
        if self.batch.decoder_norm == "unit" and W.grad is not None:
            project_rows_(W.grad, W)
        self.optimizer.step()
        if self.batch.decoder_norm == "unit":
            normalize_rows_(W)
        if stays is not None:
            for p, old, held in zip(parameters, kept, moments, strict=True):
                p[stays] = old
                for name, moment in held.items():
                    self.optimizer.state[p][name][stays] = moment

    def _moments_of(self, p: Tensor, which: Tensor) -> dict[str, Tensor]:
        """Copies; before the first step they are 0."""
        names = ("exp_avg", "exp_avg_sq")
        state = self.optimizer.state.get(p) or dict.fromkeys(names, torch.zeros_like(p))
        return {name: state[name][which].clone() for name in names}

    def state_dict(self) -> dict[str, Any]:
        """{"step", "skipped", "optimizer", "settings"}: resuming needs this and the batch's own state."""
        return {
            "step": self.step, "skipped": self.skipped.clone(), "optimizer": self.optimizer.state_dict(),
            "settings": settings_of(self.optimizer, self.batch.config),
        }  # fmt: skip

    @checks.reading_a_state("a step of a batch")
    def load_state_dict(self, state: dict[str, Any], allow_other_config: bool = False) -> None:
        """Restores what `state_dict` returned. Raises ValueError, and changes nothing, if it has other settings or does
        not fit this batch.

        allow_other_config: as for FusedTrainStep.
        """
        if not allow_other_config:
            check_settings_of(state, self.state_dict())
        checks.at_least_0("step of the state", state["step"])
        skipped = state.get("skipped", torch.zeros_like(self.skipped))  # older states have none
        checks.shape("skipped of the state", skipped, self.skipped.shape)
        names, saved = [name for name, _ in self.batch.named_parameters()], state["optimizer"]
        groups = [{**group, "params": [names[i] for i in group["params"]]} for group in saved["param_groups"]]
        moments = {names[i]: held for i, held in saved["state"].items()}
        load_named_state(self.batch, self.optimizer, {"state": moments, "param_groups": groups})
        self.step = state["step"]
        self.skipped.copy_(skipped)


def _common(rules: tuple[Activation, ...], n: int) -> tuple[Activation, Tensor, Tensor]:
    """One rule for all, each SAE's multiplier of its penalty (n,), and the ks if they differ (else empty).

    Raises ValueError for rules that differ in more than a coefficient or k.
    """
    first = rules[0] if rules else None
    if len(rules) != n or any(type(rule) is not type(first) for rule in rules) or first is None:
        raise ValueError(f"activation has {len(rules)} rules, expected one for each of {n} SAEs, all of one kind")
    if waiting := [rule for rule in rules if rule.from_data]:
        raise ValueError(
            f"a batch of SAEs cannot adjust a penalty or start thresholds from data, got {waiting[0]}; give l1 "
            "(ReLU, Gated), or l0 and threshold (JumpReLU)"
        )
    if first.selects_by_norm:
        raise ValueError(f"a batch of SAEs selects by acts alone, got {first}; leave weighted out")
    if isinstance(first, Matryoshka) and first.sampled is not None:
        raise ValueError("a batch of SAEs cannot draw prefixes; give Matryoshka fixed groups")
    scale = torch.ones(n, dtype=torch.float64, device="cpu")
    ks = torch.empty(0, dtype=torch.int64, device="cpu")
    if all(rule == first for rule in rules):
        return first, scale, ks
    name = COEFFICIENT.get(first.kind, "k" if isinstance(first, (TopK, BatchTopK)) else "")
    if not name or any(replace(rule, **{name: getattr(first, name)}) != first for rule in rules):  # type: ignore[type-var]
        can = f"in {name} alone" if name else "in their seeds alone"
        raise ValueError(
            f"SAEs of one batch with {type(first).__name__} can differ {can}, got {list(dict.fromkeys(rules))}"
        )
    values = [getattr(rule, name) for rule in rules]
    most = rules[values.index(max(values))]
    if name == "k":
        return most, scale, torch.tensor(values, dtype=torch.int64, device="cpu")
    return most, torch.tensor(values, dtype=torch.float64, device="cpu") / max(values), ks


def _together(values: list[Any]) -> Any:
    """One value if all are equal, else a list; for dicts, name by name."""
    if all(value == values[0] for value in values):
        return values[0]
    if isinstance(values[0], dict):
        return {name: _together([value[name] for value in values]) for name in values[0]}
    return values


def _variance(target: Tensor) -> Tensor:
    """Σ_n ‖target_n - mean‖², (B,), float32 at least: a mean of 30 deviations, in bfloat16, would be all rounding."""
    target = reference.wide(target)
    mean = target.mean(-2, keepdim=True)
    return losses.unless_rounding((target - mean).square().sum((-2, -1)), mean.squeeze(-2), target.shape[-2])
