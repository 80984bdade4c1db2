"""dictionary_learning's classes with top-k, batch top-k and Matryoshka, and their trainers, for fastsae.optim.

`encode` keeps its flags and gives lazy acts, which `decode` takes as the code they are.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE, MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer, geometric_median
from dictionary_learning.trainers.trainer import (
    remove_gradient_parallel_to_decoder_directions,
    set_decoder_norm_to_unit_norm,
)
from torch import Tensor

from fastsae import ops
from fastsae.codes import SparseCodes
from fastsae.ops.ledger import LedgerGradient
from fastsae.swapped.base import (
    EncoderInputs,
    OverABC,
    Swapped,
    decoded,
    filled_indices,
    hooked,
    remove_along_rows_,
    traced,
    values,
)
from fastsae.swapped.lazy import Source, kept_of, lazy_pre_acts, spread
from fastsae.swapped.trainers import follow, fused
from fastsae.training.optimizers import FusedOptimizer


class LossLog(NamedTuple):
    """What a trainer's `loss` gives with logging=True."""

    x: Tensor
    x_hat: Tensor
    f: Tensor
    losses: dict[str, float]


class SwappedDictionary(Swapped):
    """What dictionary_learning's classes share: lazy acts, and a decoder that takes them."""

    __slots__ = ()
    roles: ClassVar[dict[str, str]] = {
        "W_enc": "encoder.weight",
        "W_dec": "decoder.weight",
        "b_enc": "encoder.bias",
        "b_dec": "b_dec",
    }
    transposed = ("W_dec",)
    activation_dim: int

    def densely(self) -> bool:
        """Whether the library's own path has to encode: it is traced, or hooks on its encoder want dense pre-acts."""
        return traced() or hooked(self, (getattr(self, "encoder", None),), "encoder")  # type: ignore[arg-type]

    def code_to_decode(self, f: Tensor) -> SparseCodes | None:
        """The code behind acts; None of dense ones, and where hooks on its decoder want dense acts."""
        dense = hooked(self, (getattr(self, "decoder", None),), "decoder")  # type: ignore[arg-type]
        return None if dense else kept_of(f)

    def flat(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])

    def acts(self, codes: SparseCodes, batch: tuple[int, ...]) -> Tensor:
        return spread(codes, (*batch, codes.d_sae), codes)

    def post_relu(self, x: Tensor) -> Tensor:
        """relu of all pre-acts of x (*batch, D), lazily."""
        flat, W = self.flat(x), self.rows("W_enc")
        shape = (*x.shape[:-1], W.shape[0])
        return lazy_pre_acts(self.centred(flat), W, self.rows_of_bias(), None, True, shape, Source(flat))

    def above_threshold(self, encoder: EncoderInputs) -> SparseCodes | None:
        """The code by the running threshold; None where it is dense, as ReLU's acts are while there is none yet."""
        threshold = float(self.threshold)  # type: ignore[attr-defined]
        return None if threshold < 0 else encoder.above(threshold)

    def decode(self, f: Tensor) -> Tensor:
        codes = self.code_to_decode(f)
        if codes is None:
            return super().decode(f)  # type: ignore[misc]
        return decoded(codes, self.rows("W_dec"), f.shape) + self.parameter("b_dec")


class SwappedAutoEncoderTopK(OverABC, SwappedDictionary, AutoEncoderTopK):
    """AutoEncoderTopK."""

    def latents_per_token(self) -> int:
        return int(self.k)

    def encode(self, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
        found = None
        if not self.densely():
            batch, encoder = tuple(x.shape[:-1]), self.encoder_inputs(self.flat(x))
            found = self.above_threshold(encoder) if use_threshold else encoder.topk(self.latents_per_token())
        if found is None:
            return super().encode(x, return_topk, use_threshold)
        acts = self.acts(found, batch)
        if not return_topk:
            return acts
        top = encoder.topk(self.latents_per_token()) if use_threshold else found
        shape = (*batch, top.k)
        return acts, top.acts.view(shape), filled_indices(top).view(shape), self.post_relu(x)


class BatchSelection:
    """`encode` of the classes that select over the batch."""

    __slots__ = ()

    def latents_per_token(self: Any) -> int:
        return int(self.k)

    def cut(self, codes: SparseCodes) -> SparseCodes:
        """The code without the latents that the module leaves out."""
        return codes

    def encode(self: Any, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        codes = None
        if not self.densely():
            encoder = self.encoder_inputs(self.flat(x))
            codes = self.above_threshold(encoder) if use_threshold else encoder.batch_topk(int(self.k) * x.size(0))
        if codes is None:
            return super().encode(x, return_active, use_threshold)  # type: ignore[misc]
        codes = self.cut(codes)
        acts = self.acts(codes, tuple(x.shape[:-1]))
        if not return_active:
            return acts
        active = torch.zeros(codes.d_sae, dtype=torch.bool, device=x.device)
        active[codes.indices[codes.occupied() & (codes.acts.detach() > 0)].long()] = True
        return acts, active, self.post_relu(x)


class SwappedBatchTopKSAE(OverABC, BatchSelection, SwappedDictionary, BatchTopKSAE):
    """BatchTopKSAE."""


class SwappedMatryoshkaBatchTopKSAE(OverABC, BatchSelection, SwappedDictionary, MatryoshkaBatchTopKSAE):
    """MatryoshkaBatchTopKSAE."""

    roles: ClassVar[dict[str, str]] = {"W_enc": "W_enc", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
    transposed = ("W_enc",)

    def cut(self, codes: SparseCodes) -> SparseCodes:
        end = int(self.group_indices[self.active_groups])
        return codes if end == self.dict_size else codes.keep(codes.indices < end)


class SwappedTrainer:
    """The mixin of all trainers: their SAE is accelerated, and their Adam fastsae's."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.take_over(self)

    @staticmethod
    def swaps() -> dict[type, type]:
        return SWAPS

    @classmethod
    def fused(cls, trainer: Any) -> FusedOptimizer:
        """fastsae's optimizer in the place of the trainer's; accelerates its SAE."""
        return fused(trainer.optimizer, [trainer.ae], cls.swaps())

    @classmethod
    def take_over(cls, trainer: Any) -> None:
        trainer.optimizer = cls.fused(trainer)
        follow(trainer.scheduler, trainer.optimizer)
        trainer.__class__ = cls.swaps().get(type(trainer), type(trainer))


class UnitNormTrainer(SwappedTrainer):
    """The mixin of those with clipping at 1 and unit decoder rows: their mathematics, on terms.

    The parallel part of the decoder's gradient is taken off as the library does, by rows divided by ‖row‖ + 1e-6.
    """

    def start(self: Any, x: Tensor) -> None:
        """What the trainer does with its first batch."""
        median = self.geometric_median(x)
        self.ae.b_dec.data = median.to(self.ae.b_dec.dtype)

    def update(self: Any, step: int, x: Tensor) -> float:
        if step == 0:
            self.start(x)
        x, ae = x.to(self.device), self.ae
        loss = self.loss(x, step=step)
        loss.backward()
        W_dec = ae.parameter("W_dec")
        if isinstance(W_dec.grad, LedgerGradient):
            norms = ae.rows("W_dec").detach().norm(dim=1)
            remove_along_rows_(W_dec.grad.ledger, 1 / (norms + 1e-6) ** 2)
        else:
            of = (lambda t: t) if "W_dec" in ae.transposed else torch.t
            W_dec.grad = of(
                remove_gradient_parallel_to_decoder_directions(
                    of(W_dec), of(W_dec.grad), ae.activation_dim, ae.dict_size
                )
            )
        torch.nn.utils.clip_grad_norm_(ae.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        set_decoder_norm_to_unit_norm(ae.rows("W_dec").t(), ae.activation_dim, ae.dict_size)
        return loss.item()


class AuxOnDead:
    """The auxiliary loss of the top-k trainers, on the rows of dead latents alone."""

    def get_auxiliary_loss(self: Any, residual_BD: Tensor, post_relu_acts_BF: Tensor) -> Tensor:
        dead = self.num_tokens_since_fired >= self.dead_feature_threshold
        source = kept_of(post_relu_acts_BF)
        if source is None or not bool(dead.any()):
            return super().get_auxiliary_loss(residual_BD, post_relu_acts_BF)  # type: ignore[misc]
        self.dead_features = int(dead.sum())
        codes = self.ae.encoder_inputs(source.x).largest_dead(dead, min(self.top_k_aux, self.dead_features))
        modelled = ops.decode(codes, self.ae.rows("W_dec"))
        missed = residual_BD.float()
        loss = self.pre_norm_auxk_loss = (missed - modelled.float()).pow(2).sum(dim=-1).mean()
        centred = missed - residual_BD.mean(dim=0)[None, :].float()
        return (loss / centred.pow(2).sum(dim=-1).mean()).nan_to_num(0.0)


class SwappedTopKTrainer(AuxOnDead, UnitNormTrainer, TopKTrainer):
    """TopKTrainer."""

    def start(self: Any, x: Tensor) -> None:
        self.ae.b_dec.data = geometric_median(x).to(self.ae.b_dec.dtype)


class ThresholdOfActs:
    """The running threshold of the trainers that select over the batch: it reads the positive acts alone."""

    def update_threshold(self: Any, f: Tensor) -> None:
        codes = kept_of(f)
        super().update_threshold(f if codes is None else values(codes))  # type: ignore[misc]


class SwappedBatchTopKTrainer(ThresholdOfActs, AuxOnDead, UnitNormTrainer, BatchTopKTrainer):
    """BatchTopKTrainer."""


class SwappedMatryoshkaBatchTopKTrainer(ThresholdOfActs, AuxOnDead, UnitNormTrainer, MatryoshkaBatchTopKTrainer):
    """MatryoshkaBatchTopKTrainer: each group is decoded from the slots that it adds."""

    def start(self: Any, x: Tensor) -> None:
        self.ae.b_dec.data = self.geometric_median(x)

    def loss(self: Any, x: Tensor, step: int | None = None, logging: bool = False) -> Any:
        f, active, post = self.ae.encode(x, return_active=True, use_threshold=False)
        codes = kept_of(f)
        if codes is None:
            return super().loss(x, step=step, logging=logging)
        if step is not None and step > self.threshold_start_step:
            self.update_threshold(f)
        recon, losses, begin = torch.zeros_like(x) + self.ae.b_dec, [], 0
        for size, weight in list(zip(self.group_sizes, self.group_weights, strict=True))[: self.ae.active_groups]:
            part = codes.keep((codes.indices >= begin) & (codes.indices < begin + size))
            recon = recon + ops.decode(part, self.ae.rows("W_dec"))
            losses.append((x - recon).pow(2).sum(dim=-1).mean() * weight)
            begin += size
        each = torch.stack(losses)
        mean = each.mean()
        self.effective_l0 = self.k
        self.num_tokens_since_fired += x.size(0)
        self.num_tokens_since_fired[active] = 0
        aux = self.get_auxiliary_loss((x - recon).detach(), post)
        loss = mean + self.auxk_alpha * aux
        if not logging:
            return loss
        said = {"l2_loss": mean.item(), "auxk_loss": aux.item(), "loss": loss.item(),
                "min_l2_loss": each.min().item(), "max_l2_loss": each.max().item()}  # fmt: skip
        return LossLog(x, recon, f, said)


SWAPS: dict[type, type] = {
    AutoEncoderTopK: SwappedAutoEncoderTopK,
    BatchTopKSAE: SwappedBatchTopKSAE,
    MatryoshkaBatchTopKSAE: SwappedMatryoshkaBatchTopKSAE,
    TopKTrainer: SwappedTopKTrainer,
    BatchTopKTrainer: SwappedBatchTopKTrainer,
    MatryoshkaBatchTopKTrainer: SwappedMatryoshkaBatchTopKTrainer,
}
