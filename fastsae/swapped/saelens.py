"""SAELens' classes: TopK, BatchTopK, Matryoshka in training; TopK, Standard, JumpReLU, Gated, transcoders after it.

Their losses are theirs: the base class's methods run, on acts that are lazy. What is replaced is where they would read
all (N, M) of them: the encoder, the decoder, and the losses on dead latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from sae_lens.saes.batchtopk_sae import BatchTopK, BatchTopKTrainingSAE
from sae_lens.saes.gated_sae import GatedSAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.standard_sae import StandardSAE
from sae_lens.saes.topk_sae import TopK, TopKSAE, TopKTrainingSAE
from sae_lens.saes.transcoder import JumpReLUSkipTranscoder, JumpReLUTranscoder, SkipTranscoder, Transcoder
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from fastsae import ops
from fastsae.codes import SparseCodes
from fastsae.ops.products import per_latent
from fastsae.swapped.base import OverModule, Swapped, Unsupported, coo, decoded, hooked, scaled, values
from fastsae.swapped.lazy import LazyActs, Source, lazy_pre_acts, spread
from fastsae.swapped.trainers import follow, fused


class SwappedSAE(Swapped):
    """What SAELens' classes share. A lazy tensor of acts keeps the code that is decoded: the raw pre-acts."""

    __slots__ = ()
    roles: ClassVar[dict[str, str]] = {"W_enc": "W_enc", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
    transposed = ("W_enc",)
    cfg: Any

    def takes_pre_bias(self) -> bool:
        return bool(self.cfg.apply_b_dec_to_input)

    def densely(self) -> bool:
        """Whether the library's own path has to answer: hooks want dense acts, or torch.compile traces."""
        if torch.compiler.is_compiling():
            return True
        points = (self.hook_sae_acts_pre, self.hook_sae_acts_post)  # type: ignore[attr-defined]
        return hooked(self, points, "hook_sae_acts_pre or hook_sae_acts_post")  # type: ignore[arg-type]

    def sae_input(self, x: Tensor) -> Tensor:
        """process_sae_in, before b_dec is subtracted."""
        x = self.reshape_fn_in(x.to(self.dtype))  # type: ignore[attr-defined]
        return self.run_time_activation_norm_fn_in(self.hook_sae_input(x))  # type: ignore[attr-defined]

    def norms(self) -> Tensor | None:
        """(M,): what the library multiplies pre-acts with before it selects, and divides acts by; None: nothing."""
        return self.rows("W_dec").norm(dim=-1) if getattr(self.cfg, "rescale_acts_by_decoder_norm", False) else None

    def select(self, flat: Tensor, scale: Tensor | None) -> SparseCodes:
        """The code of raw pre-acts of x (N, D)."""
        raise NotImplementedError

    def encoded(self, x: Tensor) -> tuple[Tensor, Tensor, Source]:
        """The acts of x (*batch, D), lazily, x as the encoder gets it, and what it is made of."""
        x = self.sae_input(x)
        source = Source(x.reshape(-1, x.shape[-1]), self.norms())
        raw = self.select(source.x, source.scale)
        seen = raw if source.scale is None else scaled(raw, source.scale)
        # Acts times decoder norms are divided by them again: raw is what this decoder takes, as long as it is the same.
        owner = None if source.scale is None else self.decoder_now()
        return spread(seen, (*x.shape[:-1], raw.d_sae), raw, owner), x, source

    def hidden_pre(self, x: Tensor, source: Source) -> Tensor:
        """The pre-acts (*batch, M), lazily."""
        W, b = self.rows("W_enc"), self.rows_of_bias()
        shape = (*x.shape[:-1], W.shape[0])
        return lazy_pre_acts(self.centred(source.x), W, b, source.scale, False, shape, source)

    def recons(self, raw: SparseCodes, shape: torch.Size) -> Tensor:
        """The reconstruction of a code of raw pre-acts, in the decoder's own units."""
        out = decoded(raw, self.rows("W_dec"), shape) + self.parameter("b_dec")
        return self.hook_sae_recons(out)  # type: ignore[attr-defined]

    def decoded(self, raw: SparseCodes, shape: torch.Size) -> Tensor:
        """The same as the library's decode gives it."""
        out = self.run_time_activation_norm_fn_out(self.recons(raw, shape))  # type: ignore[attr-defined]
        return self.reshape_fn_out(out, self.d_head)  # type: ignore[attr-defined]

    def encode(self, x: Tensor) -> Tensor:
        if self.densely():
            return super().encode(x)  # type: ignore[misc]
        return self.hook_sae_acts_post(self.encoded(x)[0])  # type: ignore[attr-defined]

    def decoder_now(self) -> tuple[Any, ...]:
        """What tells this decoder, as it is now, from others."""
        W = self.parameter("W_dec")
        return id(self), W.data_ptr(), 0 if W.is_inference() else W._version

    def own_code(self, acts: Tensor) -> SparseCodes | None:
        """The code of raw pre-acts behind these acts, where it is what this decoder takes."""
        if not isinstance(acts, LazyActs) or acts.owner not in (None, self.decoder_now()):
            return None
        found: SparseCodes | None = acts.kept
        return found

    def decode(self, feature_acts: Tensor) -> Tensor:
        raw = self.own_code(feature_acts)
        if raw is None:
            return super().decode(feature_acts)  # type: ignore[misc]
        return self.decoded(raw, feature_acts.shape)

    # safetensors writes contiguous tensors only.
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)  # type: ignore[misc]
        _make_contiguous(state_dict)


def _make_contiguous(state_dict: dict[str, Any]) -> None:
    for name, value in state_dict.items():
        state_dict[name] = value.contiguous()


def _check(module: Any, activation: type) -> None:
    if type(module.activation_fn) is not activation:
        raise Unsupported(
            f"activation_fn of {type(module).__name__} is a {type(module.activation_fn).__name__}, expected the "
            f"library's own {activation.__name__}"
        )


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
        _make_contiguous(state_dict)


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
        modelled = self.reshape_fn_out(decoded(codes, self.rows("W_dec"), hidden_pre.shape), self.d_head)
        loss = (modelled - missed).pow(2).sum(dim=-1).mean()
        return self.cfg.aux_loss_coefficient * min(dead / wanted, 1.0) * loss


class SwappedTopK(SwappedSAE):
    __slots__ = ()

    @classmethod
    def check(cls, module: Any) -> None:
        _check(module, TopK)

    def latents_per_token(self) -> int:
        return int(self.activation_fn.k)  # type: ignore[attr-defined]

    def select(self, flat: Tensor, scale: Tensor | None) -> SparseCodes:
        return self.encoder_inputs(flat).topk(self.latents_per_token(), scale)


class SwappedTopKSAE(OverModule, SwappedTopK, TopKSAE):
    """TopKSAE."""


class SwappedTopKTrainingSAE(OverModule, AuxOnDead, SwappedTraining, SwappedTopK, TopKTrainingSAE):
    """TopKTrainingSAE."""


class SwappedBatchTopKTrainingSAE(OverModule, AuxOnDead, SwappedTraining, BatchTopKTrainingSAE):
    """BatchTopKTrainingSAE."""

    @classmethod
    def check(cls, module: Any) -> None:
        _check(module, BatchTopK)

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


# -- inference: every latent above a bar ------------------------------------------------------------------------------


class SwappedThreshold(SwappedSAE):
    """Every latent above its bar. Where many are, the library's dense path answers."""

    __slots__ = ()

    @classmethod
    def check(cls, module: Any) -> None:
        _check(module, torch.nn.ReLU)

    def bar(self) -> Tensor | float:
        return 0.0

    def found(self, flat: Tensor) -> SparseCodes | None:
        return self.encoder_inputs(flat).above(self.bar())

    def encode(self, x: Tensor) -> Tensor:
        if self.densely():
            return super(SwappedSAE, self).encode(x)  # type: ignore[misc]
        seen = self.sae_input(x.detach())
        codes = self.found(seen.reshape(-1, seen.shape[-1]))
        if codes is None:
            return super(SwappedSAE, self).encode(x)  # type: ignore[misc]
        if x.requires_grad:
            seen = self.sae_input(x)
            codes = self.found(seen.reshape(-1, seen.shape[-1]))
            assert codes is not None
        return self.hook_sae_acts_post(spread(codes, (*seen.shape[:-1], codes.d_sae), codes))  # type: ignore[attr-defined]


class SwappedStandardSAE(OverModule, SwappedThreshold, StandardSAE):
    """StandardSAE."""


class JumpReLUBar:
    __slots__ = ()

    def bar(self: Any) -> Tensor:
        return self.threshold.clamp(min=0)  # below 0 is the ReLU's


class SwappedJumpReLUSAE(OverModule, JumpReLUBar, SwappedThreshold, JumpReLUSAE):
    """JumpReLUSAE."""


class SwappedGatedSAE(OverModule, SwappedThreshold, GatedSAE):
    """GatedSAE: x Wᵀ of the open gates, from which their size is made."""

    roles: ClassVar[dict[str, str]] = {"W_enc": "W_enc", "W_dec": "W_dec", "b_enc": "b_gate", "b_dec": "b_dec"}

    def found(self, flat: Tensor) -> SparseCodes | None:
        encoder = self.encoder_inputs(flat)
        codes = replace(encoder, b=torch.zeros_like(encoder.b), screen=None).above(-self.b_gate)
        if codes is None:
            return None
        size = codes.acts * per_latent(self.r_mag.exp(), codes) + per_latent(self.b_mag, codes)
        codes = replace(codes, acts=size.relu())
        return codes.keep(codes.acts != 0)


class SwappedTranscoding(SwappedThreshold):
    """Transcoders: no b_dec in the input, no normalization of the output."""

    __slots__ = ()

    def takes_pre_bias(self) -> bool:
        return False

    def sae_input(self, x: Tensor) -> Tensor:
        return self.process_sae_in(x)  # type: ignore[attr-defined]

    def decoded(self, raw: SparseCodes, shape: torch.Size) -> Tensor:
        return self.recons(raw, shape)


class SwappedTranscoder(OverModule, SwappedTranscoding, Transcoder):
    """Transcoder."""


class SwappedSkipTranscoder(OverModule, SwappedTranscoding, SkipTranscoder):
    """SkipTranscoder."""


class SwappedJumpReLUTranscoder(OverModule, JumpReLUBar, SwappedTranscoding, JumpReLUTranscoder):
    """JumpReLUTranscoder."""


class SwappedJumpReLUSkipTranscoder(OverModule, JumpReLUBar, SwappedTranscoding, JumpReLUSkipTranscoder):
    """JumpReLUSkipTranscoder."""


SWAPS: dict[type, type] = {
    TopKSAE: SwappedTopKSAE,
    TopKTrainingSAE: SwappedTopKTrainingSAE,
    BatchTopKTrainingSAE: SwappedBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAE: SwappedMatryoshkaTrainingSAE,
    StandardSAE: SwappedStandardSAE,
    JumpReLUSAE: SwappedJumpReLUSAE,
    GatedSAE: SwappedGatedSAE,
    Transcoder: SwappedTranscoder,
    SkipTranscoder: SwappedSkipTranscoder,
    JumpReLUTranscoder: SwappedJumpReLUTranscoder,
    JumpReLUSkipTranscoder: SwappedJumpReLUSkipTranscoder,
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
