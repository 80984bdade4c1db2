"""SAELens' training classes, and its trainer.

Their losses are theirs: the base class's methods run, on acts that are lazy. What is replaced is where they would read
all (N, M) of them: the encoder, the decoder, penalties on acts, and the losses on dead latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from sae_lens.saes.batchtopk_sae import BatchTopK, BatchTopKTrainingSAE
from sae_lens.saes.gated_sae import GatedTrainingSAE
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.standard_sae import StandardTrainingSAE
from sae_lens.saes.topk_sae import TopKTrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from fastsae import ops, reference
from fastsae.codes import SparseCodes
from fastsae.ops.products import per_latent
from fastsae.swapped.base import OverModule, coo, decoded, scaled, token_mean, token_sums, values
from fastsae.swapped.lazy import LazyActs, Source, kept_of, lazy_pre_acts, spread
from fastsae.swapped.saelens import SwappedSAE, SwappedTopK, check_activation, make_contiguous
from fastsae.swapped.trainers import follow, fused


class SwappedTraining(SwappedSAE):
    """What the training classes share."""

    __slots__ = ()

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.densely():
            return super().encode_with_hidden_pre(x)  # type: ignore[misc]
        acts, x, source = self.encoded(x)
        return self.hook_sae_acts_post(acts), self.hidden_pre(x, source)  # type: ignore[attr-defined]

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)  # type: ignore[misc]
        make_contiguous(state_dict)


class AuxOnDead:
    """The auxiliary loss of TopKTrainingSAE, on the rows of dead latents alone."""

    __slots__ = ()

    def calculate_topk_aux_loss(
        self: Any, sae_in: Tensor, sae_out: Tensor, hidden_pre: Tensor, dead_neuron_mask: Tensor | None
    ) -> Tensor:
        normal = self.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm")
        source = kept_of(hidden_pre)
        dead = 0 if dead_neuron_mask is None else int(dead_neuron_mask.sum())
        if dead == 0 or normal or source is None:  # nothing, an error, or dense pre-acts: the library's
            return super().calculate_topk_aux_loss(  # type: ignore[misc]
                sae_in=sae_in, sae_out=sae_out, hidden_pre=hidden_pre, dead_neuron_mask=dead_neuron_mask
            )
        wanted = sae_in.shape[-1] // 2
        missed = (sae_in - sae_out).detach()
        codes = self.encoder_inputs(source.x).among(dead_neuron_mask, min(wanted, dead), source.scale)
        modelled = self.reshape_fn_out(decoded(codes, self.rows("W_dec"), hidden_pre.shape), self.d_head)
        loss = (modelled - missed).pow(2).sum(dim=-1).mean()
        return self.cfg.aux_loss_coefficient * min(dead / wanted, 1.0) * loss


class SwappedTopKTrainingSAE(OverModule, AuxOnDead, SwappedTraining, SwappedTopK, TopKTrainingSAE):
    """TopKTrainingSAE. A training step's `feature_acts` are sparse COO where the configuration asks for it."""

    def training_forward_pass(self, step_input: Any) -> Any:
        output = super().training_forward_pass(step_input)
        acts = output.feature_acts
        raw = acts.kept if self.cfg.use_sparse_activations and isinstance(acts, LazyActs) else None
        if raw is not None:
            norms = self.norms()
            output.feature_acts = coo(raw if norms is None else scaled(raw, norms), tuple(acts.shape))
        return output


class SwappedBatchTopKTrainingSAE(OverModule, AuxOnDead, SwappedTraining, BatchTopKTrainingSAE):
    """BatchTopKTrainingSAE."""

    @classmethod
    def check(cls, module: Any) -> None:
        check_activation(module, BatchTopK)

    def latents_per_token(self) -> int:
        return max(1, round(self.activation_fn.k))

    def select(self, flat: Tensor, scale: Tensor | None) -> SparseCodes:
        return self.encoder_inputs(flat).batch_topk(int(self.activation_fn.k * flat.shape[0]), scale)

    def update_topk_threshold(self, acts_topk: Tensor) -> None:
        raw = kept_of(acts_topk)
        if raw is not None:  # it reads the positive acts alone, in any order
            norms = self.norms()
            acts_topk = values(raw if norms is None else scaled(raw, norms))
        super().update_topk_threshold(acts_topk)


class SwappedMatryoshkaTrainingSAE(SwappedBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE):
    """MatryoshkaBatchTopKTrainingSAE: each prefix is decoded from the slots that it adds."""

    def _iterable_decode(
        self, feature_acts: Tensor, include_outer_loss: bool = False
    ) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
        raw = self.own_code(feature_acts)
        if raw is None:
            yield from super()._iterable_decode(feature_acts, include_outer_loss)
            return
        before, recons = 0, self.b_dec
        for width in self.cfg.matryoshka_widths if include_outer_loss else self.cfg.matryoshka_widths[:-1]:
            part = raw.keep((raw.indices >= before) & (raw.indices < width))
            recons = ops.decode(part, self.rows("W_dec")) + recons
            before = width
            yield width, self.run_time_activation_norm_fn_out(recons)

    def calculate_matryoshka_aux_loss(
        self, sae_in: Tensor, sae_out: Tensor, feature_acts: Tensor, hidden_pre: Tensor,
        dead_neuron_mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        source = kept_of(hidden_pre)
        if dead_neuron_mask is None or source is None or not bool(dead_neuron_mask.any()):
            return super().calculate_matryoshka_aux_loss(
                sae_in=sae_in, sae_out=sae_out, feature_acts=feature_acts, hidden_pre=hidden_pre,
                dead_neuron_mask=dead_neuron_mask,
            )  # fmt: skip
        wanted, before, found = sae_in.shape[-1] // 2, 0, []
        encoder = self.encoder_inputs(source.x)
        for width, partial in self._iterable_decode(feature_acts, include_outer_loss=True):
            dead = torch.zeros_like(dead_neuron_mask)
            dead[before:width] = dead_neuron_mask[before:width]
            before, number = width, int(dead.sum())
            if number == 0:
                continue
            codes = encoder.among(dead, min(wanted, number), source.scale)
            error = ops.decode(codes, self.rows("W_dec")) - (sae_in - partial).detach()
            found.append(min(number / wanted, 1.0) * error.pow(2).sum(dim=-1).mean())
        return self.cfg.aux_loss_coefficient * torch.stack(found).sum()


# -- every latent above a bar -----------------------------------------------------------------------------------------


class SwappedThresholdTraining(SwappedTraining):
    """Acts and penalties from the pre-acts that a rule considers, whose code hidden_pre keeps.

    Where they are many, the library's dense path answers.
    """

    __slots__ = ()

    @classmethod
    def check(cls, module: Any) -> None:
        check_activation(module, torch.nn.ReLU)

    def considered(self, flat: Tensor) -> SparseCodes | None:
        """The pre-acts of x (N, D) that acts, losses and their gradients depend on; None where they are many."""
        return self.above(flat, 0.0)

    def activated(self, pre: SparseCodes) -> SparseCodes:
        """The acts of these pre-acts, at the same slots."""
        return pre

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dense = super(SwappedTraining, self).encode_with_hidden_pre  # type: ignore[misc]
        if self.densely():
            return dense(x)
        seen = self.sae_input(x)
        source = Source(seen.reshape(-1, seen.shape[-1]))
        source.codes = self.considered(source.x)
        if source.codes is None:
            return self.on_seen(seen, dense, x)
        codes = self.activated(source.codes)
        acts = spread(codes, (*seen.shape[:-1], codes.d_sae), codes)
        return self.hook_sae_acts_post(acts), self.hidden_pre(seen, source)  # type: ignore[attr-defined]

    def encode(self, x: Tensor) -> Tensor:
        return self.encode_with_hidden_pre(x)[0]

    def calculate_aux_loss(
        self, step_input: Any, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:  # fmt: skip
        codes = self.own_code(feature_acts)
        source = kept_of(hidden_pre)
        if codes is not None and source is not None and self.sparsely(step_input, source):
            return self.aux_losses(step_input, codes, source)
        return super().calculate_aux_loss(  # type: ignore[misc]
            step_input=step_input, feature_acts=feature_acts, hidden_pre=hidden_pre, sae_out=sae_out
        )

    def sparsely(self, step_input: Any, source: Source) -> bool:
        """Whether `aux_losses` has these losses."""
        return True

    def aux_losses(self, step_input: Any, codes: SparseCodes, source: Source) -> dict[str, Tensor]:
        """The library's losses on acts, from their code and from source.codes."""
        raise NotImplementedError


class SwappedStandardTrainingSAE(OverModule, SwappedThresholdTraining, StandardTrainingSAE):
    """StandardTrainingSAE. With an lp_norm other than 1 its penalty reads dense acts."""

    def sparsely(self, step_input: Any, source: Source) -> bool:
        return bool(self.cfg.lp_norm == 1)

    def aux_losses(self, step_input: Any, codes: SparseCodes, source: Source) -> dict[str, Tensor]:
        return {"l1_loss": step_input.coefficients["l1"] * token_mean(scaled(codes, self.decoder_norms()))}


class SwappedJumpReLUTrainingSAE(OverModule, SwappedThresholdTraining, JumpReLUTrainingSAE):
    """JumpReLUTrainingSAE. The pre-acts in the kernel's band below a threshold have slots too, where they have a
    gradient: of a threshold that can learn, or, with jumprelu_ste_to_input, of the encoder."""

    def considered(self, flat: Tensor) -> SparseCodes | None:
        bar = self.threshold.detach().to(flat.dtype)
        learns = torch.is_grad_enabled() and (self.threshold.requires_grad or self.cfg.jumprelu_ste_to_input)
        return self.above(flat, bar - self.bandwidth / 2 if learns else bar)

    def kernel(self, pre: SparseCodes) -> tuple[Tensor, float, bool]:
        """The thresholds at the slots, the bandwidth, and whether the gradient goes to the pre-acts too."""
        return per_latent(self.threshold.to(pre.acts.dtype), pre), self.bandwidth, self.cfg.jumprelu_ste_to_input

    def activated(self, pre: SparseCodes) -> SparseCodes:
        return replace(pre, acts=reference.jump_relu(pre.acts, *self.kernel(pre)), made_by=None)

    def sparsely(self, step_input: Any, source: Source) -> bool:
        return self.cfg.jumprelu_sparsity_loss_mode in ("tanh", "step", "quadratic")  # the library refuses another

    def aux_losses(self, step_input: Any, codes: SparseCodes, source: Source) -> dict[str, Tensor]:
        pre, mode = source.codes, self.cfg.jumprelu_sparsity_loss_mode
        assert pre is not None
        if mode == "tanh":
            strengths = self.cfg.jumprelu_tanh_scale * scaled(codes, self.decoder_norms()).acts
            penalty = token_mean(replace(codes, acts=torch.tanh(strengths), made_by=None))
        else:
            active = replace(pre, acts=reference.heaviside(pre.acts, *self.kernel(pre)), made_by=None)
            if mode == "step":
                penalty = token_mean(active)
            else:
                target = self.cfg.target_l0
                penalty = (2 / target * (token_sums(active) - target) ** 2).mean()
        losses = {"l0_loss": step_input.coefficients["l0"] * penalty}
        if self.cfg.pre_act_loss_coefficient is not None:
            losses["pre_act_loss"] = self.cfg.pre_act_loss_coefficient * self._below(source.x, step_input)
        return losses

    def _below(self, x: Tensor, step_input: Any) -> Tensor:
        """The mean over tokens of Σ_dead relu(threshold - pre-act) · ‖W_dec_i‖, dense in (N, dead)."""
        dead = step_input.dead_neuron_mask
        if dead is None or not bool(dead.any()):
            return x.new_zeros(())
        rows = dead.nonzero().squeeze(1)
        threshold, norms = self.threshold.to(x.dtype)[rows], self.rows("W_dec")[rows].norm(dim=-1)
        pre = torch.addmm(self.b_enc[rows], self.centred(x), self.rows("W_enc")[rows].t())
        return ((threshold - pre).relu() @ norms).mean()


class SwappedGatedTrainingSAE(OverModule, SwappedThresholdTraining, GatedTrainingSAE):
    """GatedTrainingSAE: the pre-acts of the open gates, from which their size is made, and the gate's own losses."""

    roles: ClassVar[dict[str, str]] = {"W_enc": "W_enc", "W_dec": "W_dec", "b_enc": "b_gate", "b_dec": "b_dec"}

    def activated(self, pre: SparseCodes) -> SparseCodes:
        rows = (per_latent(p, pre) for p in (self.b_gate, self.r_mag, self.b_mag))
        return replace(pre, acts=reference.gated(pre.acts, *rows), made_by=None)

    def hidden_pre(self, x: Tensor, source: Source) -> Tensor:
        W, factor = self.rows("W_enc"), self.r_mag.exp()
        shape = (*x.shape[:-1], W.shape[0])
        return lazy_pre_acts(self.centred(source.x), W, self.b_mag / factor, factor, False, shape, source)

    def sparsely(self, step_input: Any, source: Source) -> bool:
        """The library's losses of the gate read the step's input as it was before hooks and normalization."""
        given = step_input.sae_in
        return given.data_ptr() == source.x.data_ptr() and given.numel() == source.x.numel()

    def aux_losses(self, step_input: Any, codes: SparseCodes, source: Source) -> dict[str, Tensor]:
        gate = source.codes
        assert gate is not None
        missed = ops.decode(gate, self.rows("W_dec")) + self.b_dec - source.x
        return {
            "l1_loss": step_input.coefficients["l1"] * token_mean(scaled(gate, self.decoder_norms())),
            "auxiliary_reconstruction_loss": missed.pow(2).sum(dim=-1).mean(),
        }


SWAPS: dict[type, type] = {
    TopKTrainingSAE: SwappedTopKTrainingSAE,
    BatchTopKTrainingSAE: SwappedBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAE: SwappedMatryoshkaTrainingSAE,
    StandardTrainingSAE: SwappedStandardTrainingSAE,
    JumpReLUTrainingSAE: SwappedJumpReLUTrainingSAE,
    GatedTrainingSAE: SwappedGatedTrainingSAE,
}


class SwappedSAETrainer(SAETrainer):
    """SAETrainer whose SAE is accelerated and whose Adam is fastsae's. Clipping and schedules are the library's."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.take_over(self)

    @staticmethod
    def take_over(trainer: Any) -> None:
        trainer.optimizer = fused(trainer.optimizer, [trainer.sae], SWAPS)
        follow(trainer.lr_scheduler, trainer.optimizer)


SWAPS[SAETrainer] = SwappedSAETrainer
