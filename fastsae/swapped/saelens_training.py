"""SAELens' training classes, and its trainer.

Their losses are theirs: the base class's methods run, on acts that are lazy. What is replaced is where they would read
all (N, M) of them: the encoder, the decoder, penalties on acts, and the losses on dead latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopK, BatchTopKTrainingSAE
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.topk_sae import TopKTrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from fastsae import ops
from fastsae.codes import SparseCodes
from fastsae.swapped.base import OverModule, scaled, values
from fastsae.swapped.lazy import LazyActs
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

    def training_forward_pass(self, step_input: Any) -> Any:
        """The library's, with `feature_acts` as a sparse COO tensor, which its trainer takes, and lazy `hidden_pre`."""
        output = super().training_forward_pass(step_input)  # type: ignore[misc]
        acts = output.feature_acts
        raw = acts.kept if isinstance(acts, LazyActs) and not acts.is_made else None
        if raw is not None:
            norms = self.norms()
            output.feature_acts = coo(raw if norms is None else scaled(raw, norms), tuple(acts.shape))
        return output

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)  # type: ignore[misc]
        make_contiguous(state_dict)


def coo(codes: SparseCodes, shape: tuple[int, ...]) -> Tensor:
    """A flat code as a torch.sparse_coo tensor of this shape; on a CPU coalesced, without empty slots."""
    tokens, acts, latents = codes.token_ids(), codes.acts.flatten(), codes.indices.flatten().long()
    occupied = (codes.occupied() & (codes.acts != 0)).flatten()
    on_cpu = acts.device.type == "cpu"
    if on_cpu:
        tokens, acts, latents = tokens[occupied], acts[occupied], latents[occupied]
    else:  # nothing is read back
        tokens = tokens.clamp(max=max(codes.n_tokens - 1, 0))
        acts, latents = torch.where(occupied, acts, 0), torch.where(occupied, latents, 0)
    where = torch.stack([*torch.unravel_index(tokens, shape[:-1]), latents])
    return torch.sparse_coo_tensor(where, acts, shape, is_coalesced=on_cpu or None, check_invariants=False)


class AuxOnDead:
    """The auxiliary loss of TopKTrainingSAE, on the rows of dead latents alone."""

    __slots__ = ()

    def calculate_topk_aux_loss(
        self: Any, sae_in: Tensor, sae_out: Tensor, hidden_pre: Tensor, dead_neuron_mask: Tensor | None
    ) -> Tensor:
        normal = self.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm")
        source = hidden_pre.kept if isinstance(hidden_pre, LazyActs) else None
        dead = 0 if dead_neuron_mask is None else int(dead_neuron_mask.sum())
        if dead == 0 or normal or source is None:  # nothing, an error, or dense pre-acts: the library's
            return super().calculate_topk_aux_loss(  # type: ignore[misc]
                sae_in=sae_in, sae_out=sae_out, hidden_pre=hidden_pre, dead_neuron_mask=dead_neuron_mask
            )
        wanted = sae_in.shape[-1] // 2
        missed = (sae_in - sae_out).detach()
        codes = self.encoder_inputs(source.x).among(dead_neuron_mask, min(wanted, dead), source.scale)
        modelled = self.reshape_fn_out(
            ops.decode(codes, self.rows("W_dec")).view(*hidden_pre.shape[:-1], -1), self.d_head
        )
        loss = (modelled - missed).pow(2).sum(dim=-1).mean()
        return self.cfg.aux_loss_coefficient * min(dead / wanted, 1.0) * loss


class SwappedTopKTrainingSAE(OverModule, AuxOnDead, SwappedTraining, SwappedTopK, TopKTrainingSAE):
    """TopKTrainingSAE."""


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
        raw = acts_topk.kept if isinstance(acts_topk, LazyActs) else None
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
        before, decoded = 0, self.b_dec
        for width in self.cfg.matryoshka_widths if include_outer_loss else self.cfg.matryoshka_widths[:-1]:
            part = raw.keep((raw.indices >= before) & (raw.indices < width))
            decoded = ops.decode(part, self.rows("W_dec")) + decoded
            before = width
            yield width, self.run_time_activation_norm_fn_out(decoded)

    def calculate_matryoshka_aux_loss(
        self, sae_in: Tensor, sae_out: Tensor, feature_acts: Tensor, hidden_pre: Tensor,
        dead_neuron_mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        source = hidden_pre.kept if isinstance(hidden_pre, LazyActs) else None
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


SWAPS: dict[type, type] = {
    TopKTrainingSAE: SwappedTopKTrainingSAE,
    BatchTopKTrainingSAE: SwappedBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAE: SwappedMatryoshkaTrainingSAE,
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
