"""SparseAutoencoder: x̂ = A W_dec + b_dec,  A = activation((x - b_dec) W_encᵀ + b_enc), as an ordinary `nn.Module`.

Both dictionaries are stored (M, D), one latent per contiguous row. The module works on normalized inputs, and its
loss is measured there; `recon` is in the caller's units. A training step of the rules that fix how many latents are
active reads nothing back from the device; a threshold rule asks how many there were.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae import ops, reference
from fastsae.codes import Screen, SparseCodes
from fastsae.model import losses
from fastsae.model.initial import geometric_median
from fastsae.model.norm import TokenStats
from fastsae.model.parameters import Parameters
from fastsae.model.rules import Activation, EncodeOptions
from fastsae.ops.backward import per_latent


class ForwardResult(NamedTuple):
    """What `sae(x)` returns.

    recon (*batch, d_out) in the units of the target; codes: the active latents; loss: 0-d, what to minimise; losses:
    its parts before their coefficients: "mse" or "fvu"; of a rule with several reconstructions "nested", their weighted
    sum; of one with a penalty "sparsity"; of Gated "gate"; and in training "aux" or "ghost" where the module has them.
    """

    recon: Tensor
    codes: SparseCodes
    loss: Tensor
    losses: dict[str, Tensor]


class Inputs(NamedTuple):
    """x made ready: x normalized, encoder_input = x - b_dec (pre-bias), target normalized, and the way back."""

    x: Tensor
    encoder_input: Tensor
    target: Tensor
    stats: TokenStats | None


class SparseAutoencoder(Parameters):
    """A sparse autoencoder of `d_sae` latents; with `target=` in its call, a transcoder.

    activation    the rule that picks latents, e.g. `TopK(32)`; see fastsae.model.rules.
    d_out         width of the target; None: d_in.
    pre_bias      subtract b_dec from the input before encoding; needs d_out == d_in. None: yes, unless the target is
                  another tensor: off where d_out differs, and off, with a warning, from the first target given on.
    decoder_norm  "unit": rows of W_dec have norm 1. They start so and the fused step keeps them so; with a torch
                  optimizer call `project_gradients_()` before and `normalize_decoder_()` after its step. "free": no
                  constraint, and both helpers do nothing.
    normalize     "none"; "constant": one factor making the mean of ‖x‖² equal d_in (`calibrate_`); "layer_norm": each
                  token, undone in the reconstruction.
    tied          the encoder reads the decoder's rows: `W_enc` is None and `encoder_weight` is W_dec.
    skip          a linear path beside the latents: recon += x W_skipᵀ, which starts at 0 (Paulo et al. 2025).
    layers        a row of x and of the target is that many activations of equal width side by side (a crosscoder): a
                  penalty weighted by decoder norm takes Σ_l ‖W_dec_i,l‖ (Lindsey et al. 2024).
    init_norm     norm of the encoder's rows at the start, and of the decoder's where it is free.
    aux_k         latents per token in the AuxK loss on dead latents; None: no such loss. aux_coef: its weight.
    ghost         ghost gradients for dead latents: "residual" (exp-activated dead latents model half the residual,
                  Jermyn & Templeton 2024) or "pull" (dead rows turn to where the error is large); None: none.
                  ghost_coef: their weight.
    dead_after    tokens without firing after which a latent counts as dead.
    loss          "mse": mean over tokens of the summed squared error; "fvu": the same over the batch's variance.
    rule_dtype    of the rule's own parameters, such as JumpReLU's log_threshold: float32 or float64, whatever `dtype`.
    seed          of the initial weights; None: torch's global generator.

    Parameters: W_enc (M, d_in), W_dec (M, d_out), b_enc (M,), b_dec (d_out,), W_skip (d_out, d_in) with skip, and the
    rule's own (M,). Buffers: tokens_since_fired (M,) int64, the rule's, and, not saved, fired (M,) int64 and
    fired_over () int64: how often each latent fired in how many tokens since `reset_density_`.
    `backend` and `precision` are plain attributes handed to the ops; they are choices of a run and are not saved.
    Raises ValueError for settings that do not fit together.
    """

    # -- construction -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate_(self, x: Tensor) -> SparseAutoencoder:
        """Estimates the factor of normalize="constant" from sample inputs x (n, d_in); nothing in other modes."""
        self.norm.calibrate_(self._checked(x, self.d_in, "x"))
        return self

    @torch.no_grad()
    def init_from_(self, x: Tensor, target: Tensor | None = None, how: str = "mean") -> SparseAutoencoder:
        """Sets b_dec to the centre of sample inputs x (n, d_in), or of their targets: "mean" or "geometric_median".

        Call it after `calibrate_`. Raises ValueError for an empty sample or a centre that is not finite. Syncs.
        """
        if how not in ("mean", "geometric_median"):
            raise ValueError(f"how is {how!r}, expected 'mean' or 'geometric_median'")
        points = self.inputs(x, target).target.double()
        centre = points.mean(0) if how == "mean" else geometric_median(points)
        if not bool(torch.isfinite(centre).all()):
            raise ValueError(f"the {how} of a sample of shape {tuple(x.shape)} is not finite; pass finite activations")
        self.b_dec.copy_(centre)
        return self

    # -- the forward pass -------------------------------------------------------------------------------------------

    def _checked(self, x: Tensor, width: int, name: str) -> Tensor:
        """x in the weights' dtype. Raises ValueError or TypeError when its shape, dtype or device does not fit."""
        if x.ndim < 2 or x.shape[-1] != width:
            hint = "; for one token pass its row as a batch, x[None]" if x.ndim == 1 else ""
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (*batch, {width}){hint}")
        if not x.is_floating_point():
            raise TypeError(f"{name} has dtype {x.dtype}, expected a floating-point one")
        if x.device != self.W_dec.device:
            raise ValueError(f"{name} is on {x.device}, the SAE on {self.W_dec.device}; move one of them")
        return x.to(self.W_dec.dtype)

    def _normal(self, x: Tensor) -> tuple[Tensor, TokenStats | None]:
        """x (*batch, d_in) as normalized tokens (N, d_in), and their statistics."""
        flat = self._checked(x, self.d_in, "x").reshape(-1, self.d_in)
        stats = self.norm.statistics(flat)
        return self.norm.normalize(flat, stats), stats

    def inputs(self, x: Tensor, target: Tensor | None = None) -> Inputs:
        """x (*batch, d_in) and its target (*batch, d_out; None: x itself), flattened to tokens and made ready."""
        normal, stats = self._normal(x)
        goal = normal
        if target is not None:
            if target.shape[:-1] != x.shape[:-1]:
                raise ValueError(f"target has shape {tuple(target.shape)}, expected {(*x.shape[:-1], self.d_out)}")
            goal = self.norm.normalize(self._checked(target, self.d_out, "target").reshape(-1, self.d_out), stats)
        elif self.d_out != self.d_in:
            raise ValueError(f"d_out = {self.d_out} is not d_in = {self.d_in}; pass target= of shape (*batch, d_out)")
        self.settle_pre_bias_(target is not None)
        return Inputs(normal, normal - self.b_dec if self.pre_bias else normal, goal, stats)

    @property
    def rule(self) -> Activation:
        """`activation`, in training with the k of an annealing (`annealed_k`)."""
        annealed = self.annealed_k if self.training else None
        return self.activation if annealed is None else self.activation.with_k(annealed)

    def encode_options(self, *, screen: Screen | None = None, backend: str | None = None) -> EncodeOptions:
        """How this module's encoder computes."""
        return EncodeOptions(screen, self.precision, backend or self.backend)

    def pre_acts(self, encoder_input: Tensor) -> SparseCodes:
        """The pre-acts (N, ...) that the rule looks at, with room for all of them."""
        rule = self.rule
        return rule.select(
            encoder_input, self.encoder_weight, self.b_enc, self.rule_state, self.training, self.encode_options()
        ).codes

    def _activated(self, pre: SparseCodes) -> tuple[SparseCodes, Tensor | None]:
        """The code of these pre-acts, and the penalty, where the rule has one."""
        rule = self.rule
        if not rule.shaped:
            return pre, None
        rows = {name: per_latent(t, pre, self.backend) for name, t in rule.per_latent(self.rule_state).items()}
        acts = rule.activate(pre.acts, rows)
        norms = pre.acts.new_ones(())
        if rule.needs_norms:
            norms = per_latent(reference.decoder_norms(self.W_dec, self.layers), pre, self.backend)
        sparsity = rule.sparsity(pre.acts, acts, rows, norms)
        penalty = None if sparsity is None else rule.penalty(losses.fixed_sum(sparsity) / max(pre.n_tokens, 1))
        return replace(pre, acts=acts), penalty

    def encode(self, x: Tensor) -> SparseCodes:
        """The sparse code of x (*batch, d_in)."""
        normal, _ = self._normal(x)
        codes, _ = self._activated(self.pre_acts(normal - self.b_dec if self.pre_bias else normal))
        if self.activation.shaped:
            codes = codes.keep(codes.acts != 0)
        return codes.with_batch(tuple(x.shape[:-1]))

    def decode(self, codes: SparseCodes, like: Tensor | None = None) -> Tensor:
        """The reconstruction (*batch, d_out) of a code.

        like: the input that was encoded; normalize="layer_norm" needs it, to undo itself token by token, and so does a
        skip connection.
        """
        stats = None
        if like is None and (self.norm.mode == "layer_norm" or self.skip):
            why = "the skip connection reads the" if self.skip else "normalize='layer_norm' needs the"
            raise ValueError(f"{why} encoded input: sae.decode(codes, like=x)")
        if self.norm.mode != "none":
            stats = self.norm.statistics(self.b_dec if like is None else self._checked(like, self.d_in, "like"))
        recon = ops.decode(codes, self.W_dec, backend=self.backend) + self.b_dec
        if self.W_skip is not None and like is not None:
            recon = recon + self.norm.normalize(self._checked(like, self.d_in, "like"), stats) @ self.W_skip.mT
        return self.norm.restore(recon, stats)

    def forward(self, x: Tensor, target: Tensor | None = None) -> ForwardResult:
        """Encode, decode and measure; in training mode also count which latents fired, and the losses on dead ones."""
        ready = self.inputs(x, target)
        goal, rule = ready.target, self.rule
        pre = self.pre_acts(ready.encoder_input)
        codes, penalty = self._activated(pre)
        over = losses.loss_denominator(self.loss, goal)
        offset = self.b_dec.expand(goal.shape)
        if self.W_skip is not None:
            offset = offset + ready.x @ self.W_skip.mT
        recon = offset
        total: Tensor | float = 0.0
        nested = rule.parts(codes, self.rule_state)
        for part, weight in nested:
            recon = recon + ops.decode(part, self.W_dec, backend=self.backend)
            error = losses.squared_error(recon, goal) / over
            total = total + weight * error
        parts = {self.loss: error}
        loss = torch.as_tensor(total)
        if len(nested) > 1:
            parts["nested"] = loss
        if penalty is not None:
            parts["sparsity"] = penalty
            loss = loss + (rule.coef * self.penalty_scale).to(penalty.dtype) * penalty
        gate = rule.gate(pre.acts)
        if gate is not None:
            frozen = ops.decode(replace(pre, acts=gate), self.W_dec.detach(), backend=self.backend)
            parts["gate"] = losses.squared_error(frozen + offset.detach(), goal) / over
            loss = loss + parts["gate"]
        if rule.shaped:
            codes = codes.keep(codes.acts != 0)
        if self.training:
            rule.observe(codes, self.rule_state)
            self.note_fired_(codes)
            error = goal - recon
            if self.aux_k is not None:
                parts["aux"] = self._aux_loss(ready.encoder_input, error, over)
                loss = loss + self.aux_coef * parts["aux"]
            if self.ghost is not None:
                parts["ghost"] = self.ghost_loss(ready.encoder_input, error.detach(), over)
                loss = loss + self.ghost_coef * parts["ghost"]
        batch = tuple(x.shape[:-1])
        restored = self.norm.restore(recon, ready.stats).reshape(*batch, self.d_out)
        return ForwardResult(restored, codes.with_batch(batch), loss, parts)

    def _aux_loss(self, encoder_input: Tensor, error: Tensor, over: Tensor | int) -> Tensor:
        assert self.aux_k is not None
        dead = self.dead
        codes = losses.encode_dead(
            encoder_input, self.encoder_weight, self.b_enc, dead, self.aux_k,
            precision=self.precision, backend=self.backend,
        )  # fmt: skip
        if codes is None:
            return encoder_input.new_zeros(())
        return losses.aux_k(codes, self.W_dec, error, losses.aux_weight(dead, self.aux_k), over)

    def ghost_loss(self, encoder_input: Tensor, error: Tensor, over: Tensor | int) -> Tensor:
        """The ghost gradients' loss of the dead latents' rows; error (N, d_out) = target - recon, held fixed.

        Its gradient is dense in those rows, which is why it looks at how many there are.
        """
        dead = self.dead.nonzero().squeeze(1)
        assert self.ghost is not None
        rows = (self.encoder_weight[dead], self.b_enc[dead], self.W_dec[dead])
        return losses.ghost(self.ghost, encoder_input, error, rows, over)

    # -- dead latents, densities and the decoder's norm ---------------------------------------------------------------

    @property
    def dead(self) -> Tensor:
        """Latents that have not fired for `dead_after` tokens: bool (M,)."""
        return self.tokens_since_fired >= self.dead_after

    @torch.no_grad()
    def note_fired_(self, codes: SparseCodes) -> None:
        """tokens_since_fired += N, then 0 for every latent that is active in `codes`; counts them for `density`."""
        self.count_fired_(self.counts_of(codes), codes.n_tokens)

    def counts_of(self, codes: SparseCodes) -> Tensor:
        """On how many tokens each latent is active in `codes`: int64 (M,)."""
        # Empty slots all point one past the last latent, which is cut off. Whole numbers add up in any order.
        active = codes.occupied() & (codes.acts != 0)
        latents = torch.where(active, codes.indices, self.d_sae).flatten().long()
        if latents.device.type == "cpu" and not torch.compiler.is_compiling():
            return torch.bincount(latents, minlength=self.d_sae + 1)[:-1]
        return self.fired.new_zeros(self.d_sae + 1).scatter_add_(0, latents, torch.ones_like(latents))[:-1]

    @torch.no_grad()
    def count_fired_(self, counts: Tensor, n_tokens: int) -> None:
        """The same from how often each latent was active, int64 (M,), in so many tokens."""
        self.fired.add_(counts)
        self.fired_over.add_(n_tokens)
        self.tokens_since_fired.add_(n_tokens).masked_fill_(counts > 0, 0)

    @property
    def density(self) -> Tensor:
        """Share of the training tokens since `reset_density_` on which each latent was active: float64 (M,)."""
        return self.fired.double() / self.fired_over.clamp(min=1)

    @torch.no_grad()
    def reset_density_(self) -> None:
        """Begins a new window of `density`."""
        self.fired.zero_()
        self.fired_over.zero_()
