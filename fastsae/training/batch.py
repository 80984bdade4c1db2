"""SAEBatch: B independent SAEs of one shape trained at once, for seeds, sparsities and SAEs that are tiny.

One dense product serves all of them: x (N, D) or (B, N, D), pre-acts (B, N, M), by `fastsae.reference.forward`. That is
right where a step alone is all overhead. It stores B·N·M numbers and multiplies all of them: from `BATCH_WORTH` on,
fused steps of single SAEs in turn are faster. batch_step.py trains it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsae import reference
from fastsae.model import losses
from fastsae.model.rules import Activation, BatchTopK, Matryoshka, TopK
from fastsae.model.rules.base import RuleState
from fastsae.model.sae import SparseAutoencoder
from fastsae.reference import Forward

BATCH_WORTH = 2**18
"""N·M above which SAEs are better trained in turn, each by a FusedTrainStep: `python -m bench.batch` measures where."""
NORMS = ("unit", "forward", "free")
COEFFICIENT = {"relu": "l1", "gated": "l1", "jumprelu": "l0"}


class SAEBatch(nn.Module):
    """B SAEs that differ in their seeds and, where `activation` is a list, in their rule's coefficient or k.

    n             B, the number of SAEs.
    activation    the rule of all, or a list of B rules of one kind that differ in l1 (ReLU, Gated), l0 (JumpReLU) or k
                  (TopK, BatchTopK) alone.
    d_out, pre_bias, tied, loss, ghost, ghost_coef, dead_after: as SparseAutoencoder's; ghost is None or "pull".
    decoder_norm  "unit" and "free" as SparseAutoencoder's. "forward": rows are divided by their norm whenever they are
                  read; the parameters' own norms, free to grow, then only set how fast the rows turn.
    encoder_norm  "free", or "forward" in the same way.
    init_norm     norm of the encoder's rows at the start, and of a decoder's that is not "unit".
    seeds         one for each SAE, 0 to B - 1 by default: its weights are those of SparseAutoencoder(seed=...).

    Parameters: W_enc (B, M, d_in; none when tied), W_dec (B, M, d_out), b_enc (B, M), b_dec (B, d_out), the rule's own
    (B, M). Buffers: tokens_since_fired (B, M) int64, penalty_scale (B,), the rule's own (B,).
    Raises ValueError for settings that do not fit together.
    """

    tokens_since_fired: Tensor
    penalty_scale: Tensor
    ks: Tensor

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
            raise ValueError("a tied encoder is the decoder's rows, which decoder_norm normalizes; leave encoder_norm")
        self.rules = (activation,) * n if isinstance(activation, Activation) else tuple(activation)
        self.activation, scale, ks = _common(self.rules, n)
        self.settings: dict[str, Any] = {
            "d_out": d_out, "pre_bias": pre_bias, "decoder_norm": "unit" if decoder_norm == "unit" else "free",
            "tied": tied, "loss": loss, "init_norm": init_norm, "ghost": ghost, "ghost_coef": ghost_coef,
            "dead_after": dead_after, "dtype": dtype,
        }  # fmt: skip
        members = [self._single(d_in, d_sae, rule, seed) for rule, seed in zip(self.rules, seeds, strict=True)]
        first = members[0]
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

    def _single(self, d_in: int, d_sae: int, rule: Activation, seed: int) -> SparseAutoencoder:
        return SparseAutoencoder(d_in, d_sae, rule, **self.settings, seed=seed)

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """The i-th SAE's parameters and rule's buffers by name, as the forward pass reads them: views where it can."""
        named = {**self.weights(), **{name: getattr(self, name) for name in self._rule_names}}
        return {name: t[i].detach() for name, t in named.items()}

    @torch.no_grad()
    def to_sae(self, i: int) -> SparseAutoencoder:
        """The i-th SAE on its own, with its weights as the forward pass reads them and its counters."""
        sae = self._single(self.d_in, self.d_sae, self.rules[i], self.seeds[i]).to(self.tokens_since_fired.device)
        for name, t in {**self[i], "tokens_since_fired": self.tokens_since_fired[i]}.items():
            getattr(sae, name).copy_(t)
        return sae

    @property
    def rule(self) -> Any:
        """The rule of all, which reads the members' k where they differ."""
        return self.activation if self.ks.numel() == 0 else _ManyKs(self.activation, self.ks)

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
        """x (B, N, width) from that or from (N, width), which is for all alike. Raises ValueError for another shape."""
        if x.ndim not in (2, 3) or x.shape[-1] != width or (x.ndim == 3 and x.shape[0] != len(self)):
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (N, {width}) or ({len(self)}, N, {width})")
        return x.expand(len(self), *x.shape[-2:])

    def forward(self, x: Tensor, target: Tensor | None = None) -> Forward:
        """A (B, N, M), recon (B, N, d_out), losses by name (B,), of x (N, d_in) or (B, N, d_in).

        In training mode it counts which latents fired, and "loss" has the ghosts' too.
        """
        if target is None and self.d_out != self.d_in:
            raise ValueError(f"d_out = {self.d_out} is not d_in = {self.d_in}; pass target=")
        x = self.checked(x, self.d_in, "x")
        goal = x if target is None else self.checked(target, self.d_out, "target")
        weights = self.weights()
        rule_state = {name: getattr(self, name) for name in self._rule_names}
        out = reference.forward(
            weights, x, self.rule, rule_state, target=goal, pre_bias=self.pre_bias, loss=self.loss,
            penalty_scale=self.penalty_scale, training=self.training,
        )  # fmt: skip
        if not self.training:
            return out
        self.observe_(out.A.detach())
        if self.ghost is None:
            return out
        inputs = x - weights["b_dec"][:, None] if self.pre_bias else x
        ghost = self.ghost_loss(inputs.detach(), (goal - out.recon).detach())
        return replace(out, losses={**out.losses, "ghost": ghost, "loss": out.losses["loss"] + self.ghost_coef * ghost})

    @torch.no_grad()
    def observe_(self, A: Tensor, active: Tensor | None = None) -> None:
        """Counts which latents are active in A (B, N, M), and moves a BatchTopK's threshold, as `observe` does of one.

        active: A != 0, if known.
        """
        fired = (A != 0 if active is None else active).any(-2)
        self.tokens_since_fired.add_(A.shape[-2]).masked_fill_(fired, 0)
        rule = getattr(self.activation, "inner", self.activation)
        if isinstance(rule, BatchTopK):
            rule.move_(self.get_buffer("threshold"), torch.where(A > 0, A, torch.inf).amin((-2, -1)).float())

    def ghost_loss(self, inputs: Tensor, error: Tensor) -> Tensor:
        """Σ_dead softplus(-⟨u, W_enc_i⟩) + softplus(-⟨w, W_dec_i⟩) of each SAE, (B,): `losses.ghost_pull` with an axis.

        u, w: means of inputs (B, N, d_in) and error (B, N, d_out), each token weighted by its squared error. The rows
        are the parameters, not what norm "forward" makes of them: a row that is turned grows along, and turns slower.
        """
        u, w = losses.error_weighted_means(inputs, error)
        W_dec = self.get_parameter("W_dec")
        W_enc = self.W_enc if "W_enc" in self._parameters else W_dec
        pull = F.softplus(-torch.einsum("bmd,bd->bm", W_enc, u)) + F.softplus(-torch.einsum("bmd,bd->bm", W_dec, w))
        return torch.where(self.dead, pull, 0).sum(-1)

    def extra_repr(self) -> str:
        kept = {name: value for name, value in self.settings.items() if name not in ("decoder_norm", "dtype")}
        norms = f"decoder_norm={self.decoder_norm!r}, encoder_norm={self.encoder_norm!r}"
        return f"{len(self)}, {self.d_in}, {self.d_sae}, {self.activation!r}, {norms}, " + ", ".join(
            f"{name}={value!r}" for name, value in kept.items()
        )


@dataclass(frozen=True)
class _ManyKs:
    """A TopK or BatchTopK whose k, `ks` (B,), differs from SAE to SAE; all else is the rule's own."""

    inner: Activation
    ks: Tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def dense(self, pre: Tensor, rows: RuleState, rule_state: RuleState, training: bool) -> Tensor:
        """reference.keep_top_k or batch_top_k of each SAE with its k."""
        if isinstance(self.inner, BatchTopK):
            threshold = rule_state["threshold"]
            if not training and not bool((threshold < 0).any()):
                return self.inner.dense(pre, rows, rule_state, training)
            flat, ks = torch.relu(pre).flatten(-2), (self.ks * pre.shape[-2])[:, None]
        else:
            flat, ks = torch.relu(pre), self.ks[:, None, None]
        values, places = reference.top_k(flat, flat.shape[-1])
        kept = torch.arange(flat.shape[-1], device=flat.device) < ks
        return torch.zeros_like(flat).scatter(-1, places, torch.where(kept, values, 0)).view_as(pre)


def _common(rules: tuple[Activation, ...], n: int) -> tuple[Activation, Tensor, Tensor]:
    """One rule for all, each SAE's multiplier of its penalty (n,), and the ks where they differ, else none.

    Raises ValueError for rules that differ in more than a coefficient or k.
    """
    first = rules[0] if rules else None
    if len(rules) != n or any(type(rule) is not type(first) for rule in rules) or first is None:
        raise ValueError(f"activation has {len(rules)} rules, expected one for each of {n} SAEs, all of one kind")
    if isinstance(first, Matryoshka) and first.sampled is not None:
        raise ValueError("a batch cannot draw prefixes anew for each SAE; give Matryoshka fixed groups")
    scale, ks = torch.ones(n, dtype=torch.float64), torch.empty(0, dtype=torch.int64)
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
        return most, scale, torch.tensor(values)
    return most, torch.tensor(values, dtype=torch.float64) / max(values), ks
