"""SparseAutoencoder: x̂ = A W_dec + b_dec,  A = activation((x - b_dec) W_encᵀ + b_enc), as an ordinary `nn.Module`.

Both dictionaries are stored (M, D), one latent per contiguous row. The module works on normalized inputs, and its
loss is measured there; `recon` is in the caller's units. With a rule that fixes how many latents are active, a training
step reads nothing back from the device; with a threshold rule it reads their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastsae import ops, reference
from fastsae.codes import Screen, SparseCodes, check_latents, reads_are_free
from fastsae.model import counting, dense, losses
from fastsae.model.calibrate import Tail, blocks_of, pre_acts, start_rule_
from fastsae.model.initial import geometric_median
from fastsae.model.norm import PER_TOKEN, TokenStats
from fastsae.model.parameters import Parameters
from fastsae.model.placement import axes_of
from fastsae.model.results import ForwardResult, Inputs, Objective
from fastsae.model.rules import Activation, EncodeOptions, HierarchicalTopK, RuleState, Selected
from fastsae.ops import HeldScreen, checks, recorded
from fastsae.ops import ledger as ledgers
from fastsae.ops.products import per_latent
from fastsae.ops.reconstruction import SquaredErrors, squared_errors
from fastsae.ops.sums import fixed_sum
from fastsae.reference import wide

OFF = -1e4
"""The pre-act of a slot that no token owns: below every threshold, and finite."""
SLACK = 64
"""Slots for each token of a threshold rule's code, beside those for what the last step took."""


class SparseAutoencoder(Parameters):
    """A sparse autoencoder of `d_sae` latents; with `target=` in its call, a transcoder.

    activation    the rule that selects latents, e.g. `TopK(32)`; see fastsae.model.rules.
    d_out         width of the target; None: d_in.
    pre_bias      subtract b_dec from the input before encoding; needs d_out == d_in. None: yes, but not in a
                  transcoder: off if d_out differs, and switched off, with a warning, by the first target given.
    decoder_norm  "unit": rows of W_dec have norm 1. They start so and the fused step keeps them so; with a torch
                  optimizer call `project_gradients_()` before and `normalize_decoder_()` after its step. "free": no
                  constraint, and both helpers do nothing.
    normalize     "none"; "constant": one factor making the mean of ‖x‖² equal d_in (`calibrate_`); "layer_norm": per
                  token, undone in the reconstruction; "standardize": the same with the standard deviation (n - 1) plus
                  1e-5, as in SAELens and openai's SAEs. None: "constant" if the rule adjusts a penalty to a target L0
                  (from the first training batch if `calibrate_` was not called), else "none".
    tied          the encoder uses the decoder's rows: `W_enc` is None and `encoder_weight` is W_dec.
    skip          a linear path beside the latents: recon += x W_skipᵀ, which starts at 0 (Paulo et al. 2025).
    layers        a row of x and of the target is that many activations of equal width side by side (a crosscoder); a
                  penalty weighted by decoder norm uses Σ_l ‖W_dec_i,l‖ (Lindsey et al. 2024).
    init_norm     initial norm of the encoder's rows, and of the decoder's if its norm is free.
    aux_k         latents per token in the AuxK loss on dead latents; None: no such loss. aux_coef: its weight.
    ghost         ghost gradients for dead latents: "residual" (exp-activated dead latents model half the residual,
                  Jermyn & Templeton 2024) or "pull" (dead rows turn towards tokens with a large error); None: none.
                  ghost_coef: their weight.
    dead_after    tokens without firing after which a latent counts as dead.
    loss          "mse": mean over tokens of the summed squared error; "fvu": the same over the batch's variance.
    rule_dtype    of the rule's own parameters, such as JumpReLU's log_threshold: float32 or float64, whatever `dtype`.
    seed          of the initial weights; None: torch's global generator.

    Parameters: W_enc (M, d_in), W_dec (M, d_out), b_enc (M,), b_dec (d_out,), W_skip (d_out, d_in) with skip, and the
    rule's own (M,). Buffers: tokens_since_fired (M,) int64, the rule's, and, not saved, fired (M,) int64 and
    fired_over () int64: how often each latent fired in how many tokens since `reset_density_`.
    `backend` and `precision` are plain attributes that are passed to the ops; they belong to a run and are not saved.
    Raises ValueError for settings that do not fit together.
    """

    # -- construction -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate_(self, x: Tensor) -> SparseAutoencoder:
        """Estimates the factor of normalize="constant" from sample inputs x (n, d_in); nothing in other modes."""
        self._check_same(x)
        self.norm.calibrate_(self._checked(x, self.d_in, "x"))
        return self

    @torch.no_grad()
    def init_from_(self, x: Tensor, target: Tensor | None = None, how: str = "mean") -> SparseAutoencoder:
        """Sets b_dec to the centre of sample inputs x (n, d_in), or of their targets: "mean" or "geometric_median".

        Call it after `calibrate_`. Raises ValueError for an empty sample or a centre that is not finite. Syncs.
        """
        self._check_same(x)
        if how not in ("mean", "geometric_median"):
            raise ValueError(f"how is {how!r}, expected 'mean' or 'geometric_median'")
        points = self.inputs(x, target).target.double()
        centre = points.mean(0) if how == "mean" else geometric_median(points)
        if not bool(torch.isfinite(centre).all()):
            raise ValueError(f"the {how} of a sample of shape {tuple(x.shape)} is not finite; pass finite activations")
        self.b_dec.copy_(centre)
        return self

    @torch.no_grad()
    def calibrate_threshold_(self, x: Tensor | Iterable[Tensor], batch_size: int = 4096) -> SparseAutoencoder:
        """Sets the inference threshold of a BatchTopK, alone or in a Matryoshka, so that in eval mode the mean L0 on x
        is k.

        x (..., d_in), or an iterable of such blocks, any float dtype and device, in the units that `encode` takes, is
        read once, batch_size rows at a time, in memory that does not grow with it. The threshold is accurate to 1/4096
        of itself, about a thousandth of L0, and is 0 if fewer than k latents a row are above 0. Later training
        continues from it. Dense: it costs as much as a dense encoding of x. Syncs.
        Raises ValueError for another rule, no rows, or rows that are not finite.
        """
        k = self.activation.mean_k
        if k is None:
            raise ValueError(f"{self.activation} has no running threshold to calibrate; only BatchTopK has one")
        tail, n = Tail(self.W_dec.device), 0
        for batch in self.same_blocks(blocks_of(x, batch_size)):
            normal, _ = self._normal(batch)
            for pre in pre_acts(self, normal - self.b_dec if self.pre_bias else normal, self.b_enc):
                tail.add(pre)
            n += batch.shape[0]
        if n == 0:
            raise ValueError("calibrate_threshold_ got no rows, expected some of the training data")
        self.get_buffer("threshold").fill_(tail.bar(k * n, axes_of(self.placement)[1]))
        self.get_buffer("threshold_weight").fill_(1.0)
        return self

    @torch.no_grad()
    def start_(self, x: Tensor, target: Tensor | None = None) -> SparseAutoencoder:
        """Initializes from a batch x (*batch, d_in), once, what the rule takes from data: biases and thresholds, such
        that the mean L0 is near its target; the first weight of its penalty; and the scale of normalize="constant" if
        it is not set yet. The first training batch does this automatically; call `init_from_` before it.

        On x, with the initial weights, every latent's threshold is the same number of its own standard deviations above
        its own mean. A single threshold for all would leave most of them dead if a few directions have most variance.
        Rows that are not finite are left out. A second call does nothing, nor does a rule that needs no data. Syncs.
        Before wrapping the module in DistributedDataParallel, call it at least in the first process, whose state the
        others receive. Also call it before torch.compile(fullgraph=True), since it runs outside the graph. State dicts
        include it.
        Raises ValueError for fewer than two finite rows; RuntimeError if each process would see different rows.
        """
        if self.started:
            return self
        if bool(self.get_buffer("start_done")):  # the first process started it, and DistributedDataParallel copied it
            self.started = self.norm.calibrated = True
            return self
        if counting.several(self):
            raise RuntimeError(
                "the rule's thresholds are not set yet, and each process sees different rows; call sae.start_(x) on a "
                "batch before DistributedDataParallel or fully_shard gets the module"
            )
        self.check_input(x, target)
        self._check_same(x)
        rows = self._checked(x, self.d_in, "x").reshape(-1, self.d_in)
        good = torch.isfinite(rows).all(-1)
        if target is not None:
            target = target.reshape(-1, target.shape[-1])
            good &= torch.isfinite(target).all(-1)
            target = target[good]
        rows = rows[good]
        if len(rows) < 2:
            raise ValueError(f"x of shape {tuple(x.shape)} has {len(rows)} finite rows, expected at least two to start")
        if not self.norm.calibrated:
            self.norm.calibrate_(rows)
        ready = self.inputs(rows, target)
        zero = losses.total_variance(ready.target) / losses.loss_denominator(self.loss, ready.target)
        start_rule_(self, ready.encoder_input, wide(ready.target - self.b_dec), float(zero))
        self.started = True
        return self

    def same_blocks(self, blocks: Iterable[Tensor]) -> Iterable[Tensor]:
        """Blocks of rows on the device. Raises ValueError unless all processes that share this SAE have the same."""
        if self.placement is None:
            return (block.to(self.W_dec.device) for block in blocks)
        return self.placement.same_blocks(blocks, self.W_dec.device)

    def _check_same(self, x: Tensor) -> None:
        """Raises ValueError unless all processes that share this SAE, by fastsae.parallel, were given the same x."""
        if self.placement is not None:
            self.placement.check_same(x)

    # -- the forward pass -------------------------------------------------------------------------------------------

    def _checked(self, x: Tensor, width: int, name: str) -> Tensor:
        """x in the weights' dtype. Raises as `_check`."""
        self._check(x, width, name)
        return x.to(self.W_dec.dtype).resolve_neg()  # an update could not read a lazy negation

    def _check(self, x: Tensor, width: int, name: str) -> None:
        """Raises ValueError or TypeError when the shape, dtype or device of x does not fit."""
        checks.dense(name, x, self.W_dec.device)
        if x.ndim < 2 or x.shape[-1] != width:
            hint = "; for one token pass its row as a batch, x[None]" if x.ndim == 1 else ""
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (*batch, {width}){hint}")

    def check_input(self, x: Tensor, target: Tensor | None) -> None:
        """Raises ValueError or TypeError if the target does not fit x (*batch, d_in)."""
        self._check(x, self.d_in, "x")
        if target is not None:
            self._check(target, self.d_out, "target")
            if target.shape[:-1] != x.shape[:-1]:
                raise ValueError(f"target has shape {tuple(target.shape)}, expected {(*x.shape[:-1], self.d_out)}")
        elif self.d_out != self.d_in:
            raise ValueError(f"d_out = {self.d_out} is not d_in = {self.d_in}; pass target= of shape (*batch, d_out)")

    def _normal(self, x: Tensor) -> tuple[Tensor, TokenStats | None]:
        """x (*batch, d_in) as normalized tokens (N, d_in), and their statistics."""
        flat = self._checked(x, self.d_in, "x").reshape(-1, self.d_in)
        if self.placement is not None:
            self.placement.begin(flat)
        stats = self.norm.statistics(flat)
        return self.norm.normalize(flat, stats), stats

    def inputs(self, x: Tensor, target: Tensor | None = None, *, held: bool = False) -> Inputs:
        """x (*batch, d_in) and its target (*batch, d_out; None: x itself), flattened to tokens and normalized.

        held: encoder_input passes no gradient to b_dec; the encoder computes it instead (`EncodeOptions.pre_bias`).
        """
        self.check_input(x, target)
        normal, stats = self._normal(x)
        goal = normal
        if target is not None:
            goal = self.norm.normalize(self._checked(target, self.d_out, "target").reshape(-1, self.d_out), stats)
        self.settle_pre_bias_(target is not None)
        encoder_input = normal
        if self.pre_bias:
            encoder_input = normal - (self.b_dec.detach() if held else self.b_dec)
        return Inputs(normal, encoder_input, goal, stats)

    def encode_options(self, screen: Screen | HeldScreen | None = None, *, held: bool = False) -> EncodeOptions:
        """How this module's encoder computes; held: as for `inputs`."""
        pre_bias = self.b_dec if held and self.pre_bias else None
        return EncodeOptions(screen, self.precision, self.backend, pre_bias, self.placement)

    def pre_acts(
        self, encoder_input: Tensor, options: EncodeOptions | None = None, capacity: int | None = None
    ) -> Selected:
        """The pre-acts (N, ...) that the rule selects; capacity: None for all of them (see `Activation.select`)."""
        options = options or self.encode_options()
        state = self.selection_state
        return self.rule.select(
            self._for_shards(encoder_input),
            self.encoder_weight,
            self.b_enc,
            state,
            self.training,
            options,
            capacity=capacity,
        )

    def _for_shards(self, encoder_input: Tensor) -> Tensor:
        """The encoder's input, whose gradient is the sum over the shards of the dictionary."""
        return encoder_input if self.placement is None else self.placement.latents.copied(encoder_input)

    def _activated(self, pre: SparseCodes) -> tuple[SparseCodes, Tensor | None]:
        """The code of these pre-acts, and the penalty if the rule has one."""
        rule = self.rule
        if not rule.shaped:
            return pre, None
        rows = self._at_slots(pre, self.rule_state)
        z = wide(pre.acts)
        acts = rule.activate(z, rows)
        norms = z.new_ones(())
        if rule.needs_norms:
            norms = per_latent(self._decoder_norms(), pre, self.backend)
        sparsity = rule.sparsity(z, acts, rows, norms)
        if sparsity is None:
            return replace(pre, acts=acts.to(pre.acts.dtype)), None
        whole = fixed_sum(sparsity)
        whole = whole / max(pre.n_tokens, 1) if self.placement is None else self.placement.mean(whole)
        penalty = rule.penalty(whole)
        return replace(pre, acts=acts.to(pre.acts.dtype)), penalty

    def _at_slots(self, pre: SparseCodes, rule_state: RuleState) -> dict[str, Tensor]:
        """The rule's per-latent values at the slots of a code."""
        return {name: per_latent(t, pre, self.backend) for name, t in self.rule.per_latent(rule_state).items()}

    def _decoder_norms(self) -> Tensor:
        """Σ_l ‖W_dec_i,l‖: (M,), float32 at least."""
        ledger = ledgers.open_ledger(W_dec=self.W_dec)
        if ledger is None:
            return reference.decoder_norms(wide(self.W_dec), self.layers)
        return recorded.decoder_norms(self.W_dec, self.layers, ledger)

    def encode(self, x: Tensor, latents: Tensor | Sequence[int] | None = None) -> SparseCodes:
        """The sparse code of x (*batch, d_in).

        latents (n,): only these, in any order, in a code whose latent i is latents[i], so that `.to_dense()` has n
        columns. Their acts are the same as in the full code. If each latent's act depends only on its own pre-act
        (ReLU, JumpReLU, Gated, and BatchTopK by its threshold), only their rows are read; the other rules select among
        all latents first.
        Raises TypeError or ValueError for latents that are not distinct numbers in [0, d_sae).
        """
        normal, _ = self._normal(x)
        encoder_input = normal - self.b_dec if self.pre_bias else normal
        if latents is None:
            options = self.encode_options(self.resting_screen)
            codes = self._codes(encoder_input, self.encoder_weight, self.selection_state, options)
        else:
            given = latents if isinstance(latents, Tensor) else torch.from_numpy(np.asarray(latents))
            given = given.to(self.W_dec.device, None if given.numel() else torch.int64)  # of an empty list, floats
            codes = self._codes_of(given, encoder_input)
        return codes.with_batch(tuple(x.shape[:-1]))

    def _codes(
        self, encoder_input: Tensor, W_enc: Tensor, rule_state: RuleState, options: EncodeOptions
    ) -> SparseCodes:
        """The code of encoder_input (N, d_in) for the given latents, with their rows of the state."""
        rule = self.rule
        codes = rule.select(
            self._for_shards(encoder_input),
            W_enc,
            rule_state["b_enc"],
            rule_state,
            self.training,
            options,
        ).codes
        if not rule.shaped:
            return codes
        acts = rule.activate(wide(codes.acts), self._at_slots(codes, rule_state)).to(codes.acts.dtype)
        return replace(codes, acts=acts).keep(acts != 0)

    def _codes_of(self, latents: Tensor, encoder_input: Tensor) -> SparseCodes:
        """`encode` of some latents."""
        self.check_whole("encode(latents=...)")
        state = self.selection_state
        if not self.rule.apart(state, self.training):
            options = self.encode_options(self.resting_screen)
            return self._codes(encoder_input, self.encoder_weight, state, options).only(latents)
        check_latents(latents, self.d_sae)
        latents = latents.long()  # indexing takes uint8 for a mask
        own = {name: t[latents] if t.ndim else t for name, t in state.items()}
        return self._codes(encoder_input, self.encoder_weight[latents], own, self.encode_options())

    def decode(self, codes: SparseCodes, like: Tensor | None = None) -> Tensor:
        """The reconstruction (*batch, d_out) of a code.

        like: the input that was encoded; normalize="layer_norm" and "standardize" need it, to undo themselves token by
        token, and so does a skip connection.
        """
        stats = None
        if like is None and (self.norm.mode in PER_TOKEN or self.skip):
            why = "the skip connection reads the" if self.skip else f"normalize={self.norm.mode!r} needs the"
            raise ValueError(f"{why} encoded input: sae.decode(codes, like=x)")
        if self.norm.mode != "none":
            stats = self.norm.statistics(self.b_dec if like is None else self._checked(like, self.d_in, "like"))
        recon = ops.decode(codes, self.W_dec, backend=self.backend)
        recon = (recon if self.placement is None else self.placement.latents.summed(recon)) + self.b_dec
        if self.W_skip is not None and like is not None:
            recon = recon + self.norm.normalize(self._checked(like, self.d_in, "like"), stats) @ self.W_skip.mT
        return self.norm.restore(recon, stats)

    def forward(self, x: Tensor, target: Tensor | None = None) -> ForwardResult:
        """Encode, decode and compute the loss. In training mode this includes the losses on dead latents, and the batch
        counts.

        A batch counts once, at the end of the first backward pass that goes through it, whether or not an optimizer
        steps afterwards: dead-latent counters, densities, BatchTopK's running threshold, an adjusted penalty weight,
        drawn prefixes. Counts are of tokens: m microbatches count by their tokens, and update a running threshold m
        times.
        What does not count: a forward pass alone (under no_grad, in inference mode, or without a backward pass), eval
        mode, a second backward pass of the same graph, one that fails, and a batch whose loss is not finite. A batch
        whose step an optimizer or a GradScaler skips has had its backward pass and counts, unless its loss was not
        finite; a train step knows whether the step was made, and counts only then.

        Activation checkpointing, reentrant or not, counts once and sees the same counters in both runs. Under
        torch.compile a forward pass counts when it runs with gradients enabled, since its graph cannot count later.
        Under DistributedDataParallel the batches of all processes count together, in every process, as one batch: sums,
        and for BatchTopK, where each process keeps the N·k largest of its own N tokens, the threshold follows the mean
        of their smallest acts. Every process has to run the same forward passes in training mode.
        """
        found = self.objective(x, target)
        batch, dtype = tuple(x.shape[:-1]), wide(self.W_dec).dtype
        recon = self.restored(found.error, found.ready, batch)
        assert found.codes is not None
        losses = {name: value.to(dtype) for name, value in found.losses.items()}
        return ForwardResult(found.loss.to(dtype), recon, found.codes.with_batch(batch), losses)

    def restored(self, error: Tensor, ready: Inputs, batch: tuple[int, ...]) -> Tensor:
        """The reconstruction (*batch, d_out) in the target's units, from its error."""
        return self.norm.restore(error + ready.target, ready.stats).reshape(*batch, self.d_out)

    def objective(self, x: Tensor, target: Tensor | None = None, *, for_step: bool = False) -> Objective:
        """The loss of x (*batch, d_in), assembled here for every training step and every loop of a caller.

        for_step: the caller reads no codes and counts the batch itself. A threshold rule may then compute all latents
        densely if many are active (`dense_above`). While a ledger is open, the backward pass overwrites the error.
        """
        if self.training and not self.started:
            if self.placement is not None and self.placement.tokens.size > 1:
                raise RuntimeError(
                    "this SAE takes biases, thresholds or a scale from data, and each process has rows of its own; "
                    "call sae.start_(x) once, with the same rows in all of them, before the first step"
                )
            if torch.compiler.is_compiling():
                from fastsae.model.uncompiled import start

                start(self, x, target)
            else:
                self.start_(x, target)
        if torch.compiler.is_compiling() or not self.training or for_step:
            return self._objective(x, target, for_step)
        with counting.as_first_seen(self):
            return self._objective(x, target, for_step)

    def _objective(self, x: Tensor, target: Tensor | None, for_step: bool) -> Objective:
        rule, ledger, placement = self.rule, self._ledger(), self.placement
        here = None  # in a graph, whose forward pass has to count by itself
        if torch.compiler.is_compiling() and self.training and torch.is_grad_enabled() and not for_step:
            here = counting.counts_here(x)
        held = ledger is not None
        if placement is not None:
            placement.check(held or not self.training, counting.processes_of(self))
        if held and self.training and counting.several(self):
            raise RuntimeError(
                "DistributedDataParallel wraps an SAE that belongs to an optimizer of fastsae.optim, whose sparse "
                "gradients it cannot sum over processes; delete that optimizer and use a torch optimizer"
            )
        ready = self.inputs(x, target, held=held)
        if ledger is not None:
            ledger.set_pre_bias(self.pre_bias)  # a first target may have switched it off
        n = ready.target.shape[0]
        denominator = losses.loss_denominator(self.loss, ready.target, placement)
        centred = self.pre_bias and target is None
        goal = ready.encoder_input if centred else ready.target  # recon - x = A W_dec - (x - b_dec), if centred
        if self.W_skip is not None:
            goal = goal - ready.x @ self.W_skip.mT
        screen: Screen | HeldScreen | None = self.resting_screen
        if ledger is not None and self.training:
            screen = ledger.screen_for(ready.encoder_input)
        options = self.encode_options(screen, held=held)
        weight = self.penalty_weight
        if for_step and held and rule.shaped and self.training and placement is None:
            selected = self._sparse_enough(ready.encoder_input, options)
            if selected is None:
                return self._densely(ready, goal, centred, denominator, weight)
        else:
            selected = self.pre_acts(ready.encoder_input, options)
        pre, overflow = selected
        if ledger is not None and isinstance(screen, Screen) and pre.redone is not None and n:
            ledger.note_redone(pre.redone / n)
        codes, penalty = self._activated(pre)
        bias = None if centred and not held else self.b_dec
        parts = self._parts(rule, codes)
        how: dict[str, Any] = {"overwrite": held, "backend": self.backend}
        if placement is not None:
            how["shards"] = placement.sums_shards
        errors = self._over_tokens(squared_errors(parts, self.W_dec, goal, bias, centred=centred, **how))
        loss = errors.weighted / denominator
        found = {self.loss: errors.last / denominator}
        if len(parts) > 1:
            found["nested"] = loss
        if penalty is not None:
            found["sparsity"] = penalty.double()
            loss = loss + weight * found["sparsity"]
        gate = rule.gate(wide(pre.acts)) if rule.shaped else None
        if gate is not None:
            # With decoder and biases held fixed.
            frozen = goal.detach() if not ready.target.requires_grad else self._gate_goal(ready)
            code = replace(pre, acts=gate.to(pre.acts.dtype))
            fixed = None if centred and not ready.target.requires_grad else self.b_dec.detach()
            gated = self._over_tokens(squared_errors([(code, 1.0)], self.W_dec.detach(), frozen, fixed, **how))
            found["gate"] = gated.weighted / denominator
            loss = loss + found["gate"]
        if rule.shaped and not for_step:
            codes = codes.keep(codes.acts != 0)
        measured = rule.measure(codes.detach()) if self.training else None
        batch = self._over_processes(counting.Counted(self.counts_of(codes), n, measured))
        dead = torch.where(batch.counts > 0, 0, self.tokens_since_fired + batch.tokens) >= self.dead_after
        if self.training:
            more, dead_losses = self.dead_latent_loss(ready, errors.error, dead, denominator, options, held)
            found |= dead_losses
            loss = loss if more is None else loss + more
        count = self._counter(loss, batch)
        if here is not None:
            count(here)
        elif self.training and not for_step and not torch.compiler.is_compiling():
            made = torch.ones_like(loss.detach(), dtype=torch.bool)
            counting.when_passed((pre.acts, errors.error), lambda: count(made))
        return Objective(
            ready, loss, found, errors.error, codes, batch.counts, dead, errors.last, codes.redone, count, overflow
        )

    def _parts(self, rule: Activation, codes: SparseCodes) -> list[tuple[SparseCodes, float]]:
        """`rule.parts`, of the whole dictionary's prefixes or ranks where this process has a part of it."""
        placement = self.placement
        if placement is None or placement.latents.size == 1:
            return rule.parts(codes, self.rule_state)
        whole = placement.in_whole(codes)
        if isinstance(rule, HierarchicalTopK):
            parts = rule.parts_by(placement.ranks(codes, rule.ks[-1]), whole)
        else:
            parts = rule.parts(whole, self.rule_state)
        return [(placement.in_shard(part), weight) for part, weight in parts]

    def _over_tokens(self, errors: SquaredErrors) -> SquaredErrors:
        return errors if self.placement is None else self.placement.over_tokens(errors)

    def _ledger(self) -> ledgers.Ledger | None:
        return ledgers.open_ledger(
            W_dec=self.W_dec, W_enc=self.encoder_weight, b_enc=self.b_enc, b_dec=self.b_dec
        )  # fmt: skip

    def _gate_goal(self, ready: Inputs) -> Tensor:
        """The gate's target minus the parts that latents need not explain, differentiable in x alone."""
        return ready.target if self.W_skip is None else ready.target - (ready.x @ self.W_skip.mT).detach()

    def dead_latent_loss(
        self,
        ready: Inputs,
        error: Tensor,
        dead: Tensor,
        denominator: Tensor | int,
        options: EncodeOptions,
        overwrite: bool = False,
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """AuxK's or the ghost gradients' weighted loss (or None), and the loss by name before its weight.

        error (N, d_out) = recon - target, held fixed. Ghost gradients are dense over the dead latents' rows, and so
        read their number.
        """
        if self.aux_k is not None:
            n_dead = dead.sum() if self.placement is None else self.placement.latents.sum(dead.sum())
            encoder_input = self._for_shards(ready.encoder_input)
            codes = losses.encode_dead(encoder_input, self.encoder_weight, self.b_enc, dead, self.aux_k, options)
            if codes is None:
                return None, {"aux": error.new_zeros((), dtype=torch.float64)}
            aux = losses.aux_k(
                codes, self.W_dec, error, losses.aux_weight(n_dead, self.aux_k), denominator, overwrite=overwrite,
                placement=self.placement, backend=self.backend,
            )  # fmt: skip
            return self.aux_coef * aux, {"aux": aux}
        if self.ghost is None:
            return None, {}
        few = dead.nonzero().squeeze(1)
        if few.numel() == 0 and self.placement is None:
            return None, {"ghost": error.new_zeros((), dtype=torch.float64)}
        rows = (wide(self.encoder_weight[few]), wide(self.b_enc[few]), wide(self.W_dec[few]))
        inputs = wide(self._for_shards(ready.x - self.b_dec if self.pre_bias else ready.x))
        missed = wide(error.detach()).neg()
        ghost = losses.ghost(self.ghost, inputs, missed, rows, denominator, self.placement).double()
        return self.ghost_coef * ghost, {"ghost": ghost}

    # -- threshold rules while many latents are active ----------------------------------------------------------------

    def _sparse_enough(self, encoder_input: Tensor, options: EncodeOptions) -> Selected | None:
        """The pre-acts of a threshold rule, or None where more than `dense_above` of all are active.

        With a `room` nothing is read: the caller reads whether they overflowed, and must not use them then.
        """
        if self.room is not None:
            codes, overflow = self.pre_acts(encoder_input, options, self.room)
            return Selected(codes.masked(OFF), overflow)
        n = encoder_input.shape[0]
        if self.active_share is None:
            self.active_share = dense.sampled_share(self, encoder_input)
        if self.active_share > self.dense_above:
            return None
        # A little more capacity than the last step used; if that overflows, the step is dense.
        for capacity in dict.fromkeys((self.slots_for(n, 1.5), self.most_slots(n))):
            codes, overflow = self.pre_acts(encoder_input, options, capacity)
            if overflow is None or not bool(overflow):
                codes = codes.trimmed() if codes.acts.device.type == "cpu" else codes.masked(OFF)
                self.active_share = float(codes.nnz) / (n * self.d_sae)
                return Selected(codes)
        return None

    def most_slots(self, n: int) -> int:
        """Slots of a threshold rule's code of n tokens, above which a step is dense."""
        pairs = n * self.d_sae
        return min(pairs, int(self.dense_above * pairs) + 1)

    def slots_for(self, n: int, growth: float) -> int:
        """Slots for `growth` times the active latents of n tokens in the last step, and SLACK more for each token."""
        assert self.active_share is not None
        pairs = n * self.d_sae
        return min(self.most_slots(n), int(growth * self.active_share * pairs) + SLACK * n)

    def _densely(
        self, ready: Inputs, goal: Tensor, centred: bool, denominator: Tensor | int, weight: Tensor
    ) -> Objective:
        gate_goal = goal.detach()
        if ready.target.requires_grad:
            gate_goal = self._gate_goal(ready) - self.b_dec.detach() if centred else self._gate_goal(ready)
        total, error, found = dense.objective(self, ready.encoder_input, goal, gate_goal, centred, denominator, weight)
        n = ready.target.shape[0]
        self.active_share = float(found.selected) / (n * self.d_sae)
        batch = counting.Counted(found.counts, n, None)
        dead = torch.where(batch.counts > 0, 0, self.tokens_since_fired + n) >= self.dead_after
        options = self.encode_options(held=True)
        more, dead_losses = self.dead_latent_loss(ready, error, dead, denominator, options)
        loss = total if more is None else total + more
        count = self._counter(loss, batch)
        by_name = {self.loss: found.squares / denominator, **found.losses, **dead_losses}
        return Objective(ready, loss, by_name, error, None, batch.counts, dead, found.squares, None, count)

    # -- dead latents, densities and the decoder's norm ---------------------------------------------------------------

    @property
    def dead(self) -> Tensor:
        """Latents that have not fired for `dead_after` tokens: bool (M,)."""
        return self.tokens_since_fired >= self.dead_after

    def _over_processes(self, batch: counting.Counted) -> counting.Counted:
        """In training, the counts of the batch summed over all processes."""
        if not self.training:
            return batch
        return outside_graph("over_processes")(self, batch)

    def _counter(self, loss: Tensor, batch: counting.Counted) -> Callable[[Tensor], None]:
        """count(made), which counts this batch if made, a 0-d bool, is true and its loss is finite everywhere."""
        rule, (counts, tokens, measured) = self.rule, batch
        finite = loss.detach().isfinite()
        if self.training:
            finite = outside_graph("in_all_processes")(self, finite)

        @torch.no_grad()
        def count(made: Tensor) -> None:
            if not torch.compiler.is_compiling():
                counting.keep_counters(self, ("tokens_since_fired", *self._rule_names[1]))
            made, rule_state = made & finite, self.rule_state
            self.count_fired_(counts, tokens, made)
            active = counts.sum() if self.placement is None else self.placement.latents.sum(counts.sum())
            rule.steer(rule_state, active.double() / tokens, made)
            rule.observe(measured, rule_state, made)

        return count

    def counts_of(self, codes: SparseCodes) -> Tensor:
        """On how many tokens each latent is active in `codes`: int64 (M,)."""
        # Empty slots all point one past the last latent, which is cut off. Whole numbers add up in any order.
        active = codes.occupied() & (codes.acts != 0)
        latents = torch.where(active, codes.indices, self.d_sae).flatten().long()
        if reads_are_free(latents):
            return torch.bincount(latents, minlength=self.d_sae + 1)[:-1]
        return self.fired.new_zeros(self.d_sae + 1).scatter_add_(0, latents, torch.ones_like(latents))[:-1]

    @torch.no_grad()
    def count_fired_(self, counts: Tensor, n_tokens: int | Tensor, made: Tensor | None = None) -> None:
        """tokens_since_fired += n_tokens, then 0 for every latent that was active; counts them for `density`.

        counts: int64 (M,), on how many of these tokens each latent was active. made: 0-d bool, whether these tokens
        count at all; None: they do.
        """
        since = torch.where(counts > 0, 0, self.tokens_since_fired + n_tokens)
        if made is not None:
            counts, n_tokens = counts * made, n_tokens * made
            since = torch.where(made, since, self.tokens_since_fired)
        self.fired.add_(counts)
        self.fired_over.add_(n_tokens)
        self.tokens_since_fired.copy_(since)

    @property
    def density(self) -> Tensor:
        """Share of the training tokens since `reset_density_` on which each latent was active: float64 (M,)."""
        return self.fired.double() / self.fired_over.clamp(min=1)

    @torch.no_grad()
    def reset_density_(self) -> None:
        """Starts a new window of `density`."""
        self.fired.zero_()
        self.fired_over.zero_()


def as_sae(given: object, name: str) -> SparseAutoencoder:
    """`given` if it is a SparseAutoencoder, or the one that torch.compile wrapped, whose parameter names differ.

    Raises TypeError, with what to pass instead, for anything else.
    """
    sae = getattr(given, "_orig_mod", given)
    if isinstance(sae, SparseAutoencoder):
        return sae
    hint = ""
    if isinstance(given, DistributedDataParallel):
        hint = "; pass the module inside it, .module"
    elif isinstance(given, torch.nn.Module) and any(isinstance(m, SparseAutoencoder) for m in given.modules()):
        hint = "; pass the one inside it"
    elif hasattr(given, "to_sae"):
        hint = "; take one SAE of it with .to_sae(i), or train all with a BatchTrainStep"
    raise TypeError(f"{name} is a {type(given).__name__}, expected a SparseAutoencoder{hint}")


def outside_graph(name: str) -> Callable[..., Any]:
    """A function of fastsae.model.counting that communicates with other processes, which no graph can contain."""
    if torch.compiler.is_compiling():
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return lambda _, given: given
        from fastsae.model import uncompiled

        return getattr(uncompiled, name)
    return getattr(counting, name)
