"""dictionary_learning's classes with thresholds, ReLU, JumpReLU and Gated, and their trainers, for fastsae.optim.

`encode` gives lazy acts while few latents are active, and the library's dense ones where many are. The losses here take
both, so that no step encodes twice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from dictionary_learning.dictionary import AutoEncoder, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.p_anneal import PAnnealTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.trainer import ConstrainedAdam
from torch import Tensor

from fastsae import ops, reference
from fastsae.codes import SparseCodes
from fastsae.ops.gradients import latent_sums
from fastsae.ops.ledger import LedgerGradient
from fastsae.ops.products import per_latent
from fastsae.ops.sums import fixed_sum
from fastsae.swapped.base import OverABC, Unsupported, decoded, remove_along_rows_, scaled, token_mean, token_sums
from fastsae.swapped.dictionaries import LossLog, SwappedDictionary, SwappedTrainer, UnitNormTrainer
from fastsae.swapped.lazy import Source, kept_of, lazy_pre_acts
from fastsae.swapped.trainers import fused
from fastsae.training.optimizers import Adam, FusedOptimizer


class SwappedAutoEncoder(OverABC, SwappedDictionary, AutoEncoder):
    """AutoEncoder. Its ghost mode is the library's."""

    roles: ClassVar[dict[str, str]] = {
        "W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "encoder.bias", "b_dec": "bias",
    }  # fmt: skip

    def encode(self, x: Tensor) -> Tensor:
        codes = None if self.densely() else self.above(self.flat(x), 0.0)
        return super().encode(x) if codes is None else self.acts(codes, tuple(x.shape[:-1]))


class SwappedJumpReluAutoEncoder(OverABC, SwappedDictionary, JumpReluAutoEncoder):
    """JumpReluAutoEncoder. Its threshold learns in its trainer alone."""

    roles: ClassVar[dict[str, str]] = {"W_enc": "W_enc", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
    transposed = ("W_enc",)

    def takes_pre_bias(self) -> bool:
        return bool(self.apply_b_dec_to_input)

    def encode(self, x: Tensor, output_pre_jump: bool = False) -> Any:
        bar = self.threshold.detach().clamp(min=0)  # below 0 is the ReLU's
        codes = None if self.densely() else self.above(self.flat(x), bar)
        if codes is None:
            return super().encode(x, output_pre_jump)
        acts = self.acts(codes, tuple(x.shape[:-1]))
        if not output_pre_jump:
            return acts
        flat, W = self.flat(x), self.rows("W_enc")
        shape = (*x.shape[:-1], W.shape[0])
        return acts, lazy_pre_acts(self.centred(flat), W, self.b_enc, None, False, shape, Source(flat))


class SwappedGatedAutoEncoder(OverABC, SwappedDictionary, GatedAutoEncoder):
    """GatedAutoEncoder: the pre-acts of the open gates, from which their size is made."""

    roles: ClassVar[dict[str, str]] = {
        "W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "gate_bias", "b_dec": "decoder_bias",
    }  # fmt: skip

    def encode(self, x: Tensor, return_gate: bool = False, normalize_decoder: bool = False) -> Any:
        flat, batch, gate = self.flat(x), tuple(x.shape[:-1]), None
        if not self.densely():
            gate = self.above(flat, 0.0, biased=return_gate)  # without the gate, its bias has no gradient
        if gate is None:
            return super().encode(x, return_gate, normalize_decoder)
        if return_gate:
            rows = (per_latent(p, gate) for p in (self.gate_bias, self.r_mag, self.mag_bias))
            size = reference.gated(gate.acts, *rows)
        else:
            size = (gate.acts * per_latent(self.r_mag.exp(), gate) + per_latent(self.mag_bias, gate)).relu()
        codes = replace(gate, acts=size, made_by=None)
        if normalize_decoder:
            codes = scaled(codes, self.decoder_norms())
        acts = self.acts(codes, batch)
        return (acts, self.acts(gate, batch)) if return_gate else acts

    def decode(self, f: Tensor, normalize_decoder: bool = False) -> Tensor:
        codes = self.code_to_decode(f)
        if codes is None:
            return super(SwappedDictionary, self).decode(f, normalize_decoder)  # type: ignore[misc]
        if normalize_decoder:
            codes = scaled(codes, 1 / self.decoder_norms())
        return decoded(codes, self.rows("W_dec"), f.shape) + self.decoder_bias


# -- trainers ---------------------------------------------------------------------------------------------------------


class FusedConstrainedAdam(Adam):
    """ConstrainedAdam as a fused update: no part of the decoder's gradient along its rows, and then rows of norm 1.

    The library divides rows by their norms before it projects, so the first step may start from rows of any norm.
    """

    ae: Any

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        decoder, W = self.ae.parameter("W_dec"), self.ae.rows("W_dec").detach()
        factor = 1 / W.square().sum(dim=1)
        if isinstance(decoder.grad, LedgerGradient):
            remove_along_rows_(decoder.grad.ledger, factor)
        else:
            grad = decoder.grad.t()
            grad -= (factor * (grad * W).sum(dim=1))[:, None] * W
        super().step()
        self.ae.rows("W_dec").div_(W.norm(dim=1, keepdim=True))
        return loss


class Trainer(SwappedTrainer):
    """The mixin of trainers here."""

    @staticmethod
    def swaps() -> dict[type, type]:
        return SWAPS


class Constrained(Trainer):
    """The mixin of those whose optimizer is a ConstrainedAdam."""

    @classmethod
    def fused(cls, trainer: Any) -> FusedOptimizer:
        old, decoder = trainer.optimizer, trainer.ae.decoder.weight
        if type(old) is not ConstrainedAdam or [id(p) for p in old.constrained_params] != [id(decoder)]:
            raise Unsupported("the optimizer is expected to be a ConstrainedAdam that constrains decoder.weight alone")
        new = fused(old, [trainer.ae], cls.swaps(), {ConstrainedAdam: FusedConstrainedAdam})
        assert isinstance(new, FusedConstrainedAdam)
        new.ae = trainer.ae
        return new


class L1:
    """The loss of the trainers with an L1 penalty."""

    def strengths(self: Any, f: Tensor) -> Tensor:
        """The mean over tokens of what is penalized."""
        codes = kept_of(f)
        return f.norm(p=1, dim=-1).mean() if codes is None else token_mean(codes)

    def count(self: Any, f: Tensor) -> None:
        """What the trainer notes of the latents that fired."""
        if self.steps_since_active is not None:
            fired = latents_that_fired(f)
            self.steps_since_active[~fired] += 1
            self.steps_since_active[fired] = 0

    def loss(self: Any, x: Tensor, step: int, logging: bool = False, **_: Any) -> Any:
        x_hat, f = self.ae(x, output_features=True)
        recon, l1 = (x - x_hat).pow(2).sum(dim=-1).mean(), self.strengths(f)
        self.count(f)
        loss = recon + self.l1_penalty * self.sparsity_warmup_fn(step) * l1
        if not logging:
            return loss
        l2 = torch.linalg.norm(x - x_hat, dim=-1).mean()
        said = {"l2_loss": l2.item(), "mse_loss": recon.item(), "sparsity_loss": l1.item(), "loss": loss.item()}
        return LossLog(x, x_hat, f, said)


def latents_that_fired(f: Tensor) -> Tensor:
    """Which latents have an act that is not 0, (M,) bool."""
    codes = kept_of(f)
    if codes is None:
        return (f != 0).reshape(-1, f.shape[-1]).any(dim=0)
    found = torch.zeros(codes.d_sae, dtype=torch.bool, device=codes.acts.device)
    found[codes.indices[codes.occupied() & (codes.acts.detach() != 0)].long()] = True
    return found


class SwappedStandardTrainer(L1, Constrained, StandardTrainer):
    """StandardTrainer, with resampling."""


class SwappedStandardTrainerAprilUpdate(L1, Trainer, StandardTrainerAprilUpdate):
    """StandardTrainerAprilUpdate: acts are penalized times the norms of the decoder's rows."""

    def strengths(self: Any, f: Tensor) -> Tensor:
        codes, norms = kept_of(f), self.ae.decoder_norms()
        return (f * norms).sum(dim=-1).mean() if codes is None else token_mean(scaled(codes, norms))

    def count(self: Any, f: Tensor) -> None:
        pass


class SwappedPAnnealTrainer(Constrained, PAnnealTrainer):
    """PAnnealTrainer. With resample_steps its count of what fired reads dense acts."""

    def lp_norm(self: Any, f: Tensor, p: float) -> Tensor:
        codes = kept_of(f)
        if codes is None or not p > 0 or self.sparsity_function not in ("Lp", "Lp^p"):
            return super().lp_norm(f, p)
        powers = replace(codes, acts=codes.acts.pow(p), made_by=None)
        return token_mean(powers) if self.sparsity_function == "Lp^p" else token_sums(powers).pow(1 / p).mean()


class SwappedGatedSAETrainer(Constrained, GatedSAETrainer):
    """GatedSAETrainer."""

    def loss(self: Any, x: Tensor, step: int, logging: bool = False, **_: Any) -> Any:
        f, f_gate = self.ae.encode(x, return_gate=True)
        x_hat, frozen = self.ae.decode(f), self.ae.rows("W_dec").detach()
        gate = kept_of(f_gate)
        by_gate = f_gate @ frozen if gate is None else ops.decode(gate, frozen).view(x.shape)
        l1 = torch.linalg.norm(f_gate, ord=1, dim=-1).mean() if gate is None else token_mean(gate)
        recon = (x - x_hat).pow(2).sum(dim=-1).mean()
        aux = (x - by_gate - self.ae.decoder_bias.detach()).pow(2).sum(dim=-1).mean()
        loss = recon + self.l1_penalty * l1 * self.sparsity_warmup_fn(step) + aux
        if not logging:
            return loss
        said = {"mse_loss": recon.item(), "sparsity_loss": l1.item(), "aux_loss": aux.item(), "loss": loss.item()}
        return LossLog(x, x_hat, f, said)


class JumpLossLog(NamedTuple):
    """What JumpReluTrainer's `loss` gives with logging=True."""

    x: Tensor
    recon: Tensor
    f: Tensor
    losses: dict[str, float]


class SwappedJumpReluTrainer(Trainer, UnitNormTrainer, JumpReluTrainer):
    """JumpReluTrainer: the pre-acts in the kernel's band below a threshold have slots too.

    Its L0 is a step of the acts, not of the pre-acts: of an inactive latent, the step and its kernel see an act of 0.
    """

    def start(self, x: Tensor) -> None:
        """It does nothing with its first batch."""

    def loss(self: Any, x: Tensor, step: int, logging: bool = False, **_: Any) -> Any:
        ae, threshold = self.ae, self.ae.threshold
        x = x.to(ae.W_enc.dtype)
        rounded = torch.tensor(self.bandwidth, dtype=torch.get_default_dtype(), device="cpu")  # as in its kernel
        width = rounded.item()
        pre = None if ae.apply_b_dec_to_input else ae.above(x, threshold.detach() - width / 2)
        if pre is None:  # many are active, or the encoder is not the one that this loss reads
            return super().loss(x, step, logging=logging)
        codes = replace(pre, acts=reference.jump_relu(pre.acts, per_latent(threshold, pre), width), made_by=None)
        f = ae.acts(codes, tuple(x.shape[:-1]))
        fired = latent_sums(codes.acts.detach(), codes.indices, codes.offsets, codes.d_sae, None, None) > 0
        self.num_tokens_since_fired += x.size(0)
        self.num_tokens_since_fired[fired] = 0
        self.dead_features = int((self.num_tokens_since_fired > self.dead_feature_threshold).sum())
        recon = ae.decode(f)
        error = (x - recon).pow(2).sum(dim=-1).mean()
        l0 = self.mean_l0(codes.detach(), width).float()  # as the library's
        scale = self.sparsity_coefficient * self.sparsity_warmup_fn(step)
        loss = error + scale * ((l0 / self.target_l0) - 1).pow(2)
        if not logging:
            return loss
        return JumpLossLog(x, recon, f, {"l2_loss": error.item(), "loss": loss.item()})

    def mean_l0(self: Any, codes: SparseCodes, width: float) -> Tensor:
        """The mean over tokens of the steps of all acts, differentiable in the thresholds."""
        threshold, occupied = self.ae.threshold, codes.occupied()
        steps = reference.heaviside(codes.acts, per_latent(threshold, codes), width)
        with_slot = torch.bincount(codes.indices[occupied], minlength=codes.d_sae)
        rest = (codes.n_tokens - with_slot) * reference.heaviside(torch.zeros_like(threshold), threshold, width)
        return token_mean(replace(codes, acts=steps)) + fixed_sum(rest) / codes.n_tokens


SWAPS: dict[type, type] = {
    AutoEncoder: SwappedAutoEncoder,
    JumpReluAutoEncoder: SwappedJumpReluAutoEncoder,
    GatedAutoEncoder: SwappedGatedAutoEncoder,
    StandardTrainer: SwappedStandardTrainer,
    StandardTrainerAprilUpdate: SwappedStandardTrainerAprilUpdate,
    PAnnealTrainer: SwappedPAnnealTrainer,
    GatedSAETrainer: SwappedGatedSAETrainer,
    JumpReluTrainer: SwappedJumpReluTrainer,
}
