"""overcomplete's SAEs with a linear encoder, and with either of its dictionaries: lazy pre-codes and codes.

The dictionary stays the library's: it is normalized, and multiplied, where a forward pass asks for it. So its gradient
is a dense one, and its optimizer torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from overcomplete.sae.archetypal_dictionary import RelaxedArchetypalDictionary
from overcomplete.sae.base import SAE
from overcomplete.sae.batchtopk_sae import BatchTopKSAE
from overcomplete.sae.dictionary import DictionaryLayer
from overcomplete.sae.jump_sae import JumpSAE
from overcomplete.sae.modules import MLPEncoder, TieableEncoder
from overcomplete.sae.rasae import RAJumpSAE, RATopKSAE
from overcomplete.sae.topk_sae import TopKSAE
from torch import Tensor, nn

from fastsae.codes import SparseCodes
from fastsae.swapped.base import EncoderInputs, OverABC, Swapped, Unsupported, decoded, has_hooks, traced
from fastsae.swapped.lazy import Source, kept_of, lazy_pre_acts, spread


class SwappedSAE(Swapped):
    """What overcomplete's classes share."""

    __slots__ = ()

    @classmethod
    def check(cls, module: Any) -> None:
        kind, encoder = cls.original().__name__, module.encoder
        if type(encoder) not in (MLPEncoder, TieableEncoder):
            raise Unsupported(
                f"the encoder of {kind} is a {type(encoder).__name__}, expected a linear one: an MLPEncoder without "
                "blocks, or a TieableEncoder"
            )
        if type(encoder) is MLPEncoder:
            linear, norm = encoder.final_block
            found = [type(one).__name__ for one in (*encoder.mlp_blocks, norm, encoder.final_activation)]
            if type(linear) is not nn.Linear or found != ["Identity", "ReLU"]:
                raise Unsupported(
                    f"the MLPEncoder of {kind} has {len(encoder.mlp_blocks)} hidden blocks, {type(norm).__name__} and "
                    f"{type(encoder.final_activation).__name__}, expected none, Identity and ReLU"
                )
        if type(module.dictionary) not in (DictionaryLayer, RelaxedArchetypalDictionary):
            raise Unsupported(
                f"the dictionary of {kind} is a {type(module.dictionary).__name__}, expected a DictionaryLayer or a "
                "RelaxedArchetypalDictionary"
            )

    def lacks(self) -> tuple[str, ...]:
        return "W_dec", "b_dec"  # the dictionary is not the Parameter as it is, and there is no bias

    def is_dense(self, x: Tensor) -> bool:
        """Whether the library's own path has to answer."""
        if traced() or self.was_changed():
            return True
        parts = (*self.encoder.modules(), self.dictionary)  # type: ignore[attr-defined]
        refused = isinstance(self.encoder, MLPEncoder) and x.ndim != 2  # type: ignore[attr-defined]
        refused = refused or x.dtype != next(parts[-1].parameters()).dtype
        return refused or has_hooks(parts)

    def encoder_inputs(self, x: Tensor) -> EncoderInputs:
        encoder: Any = self.encoder  # type: ignore[attr-defined]
        if isinstance(encoder, MLPEncoder):
            W, bias = encoder.final_block[0].weight, encoder.final_block[0].bias
        else:
            W, bias = encoder.weight if encoder.tied_to is None else encoder.tied_to.get_dictionary(), encoder.bias
        b = W.new_zeros(W.shape[0]) if bias is None else bias
        return EncoderInputs(x, W.contiguous(), b, None, None, None)

    def select(self, encoder: EncoderInputs) -> SparseCodes | None:
        """The codes, without those that are 0; None where the library's dense path has to answer."""
        return encoder.above(0.0)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.is_dense(x):
            encoder = self.encoder_inputs(x.reshape(-1, x.shape[-1]))
            codes = self.select(encoder)
            if codes is not None:
                shape = (*x.shape[:-1], codes.d_sae)
                pre = lazy_pre_acts(encoder.x, encoder.W, encoder.b, None, False, shape, Source(encoder.x))
                return pre, spread(codes, shape, codes)
        return super().encode(x)  # type: ignore[misc]

    def decode(self, z: Tensor) -> Tensor:
        codes = kept_of(z)
        if codes is None or has_hooks((self.dictionary,)):  # type: ignore[attr-defined]
            return super().decode(z)  # type: ignore[misc]
        dictionary = self.dictionary.get_dictionary()  # type: ignore[attr-defined]
        return decoded(codes, dictionary.contiguous(), z.shape)


class SwappedReLUSAE(OverABC, SwappedSAE, SAE):
    """SAE: relu."""


class SwappedTopK(SwappedSAE):
    __slots__ = ()

    def select(self, encoder: EncoderInputs) -> SparseCodes | None:
        k = int(self.top_k)  # type: ignore[attr-defined]
        return encoder.topk(k) if 1 <= k <= len(encoder.W) else None


class SwappedTopKSAE(OverABC, SwappedTopK, TopKSAE):
    """TopKSAE."""


class SwappedRATopKSAE(OverABC, SwappedTopK, RATopKSAE):
    """RATopKSAE."""


class SwappedBatchTopKSAE(OverABC, SwappedSAE, BatchTopKSAE):
    """BatchTopKSAE: top_k of a whole batch, and those that equal the last of them."""

    running_threshold: Any

    def is_dense(self, x: Tensor) -> bool:
        # Its mask is float32, which makes wider what is narrower.
        return super().is_dense(x) or x.dtype not in (torch.float32, torch.float64)

    def select(self, encoder: EncoderInputs) -> SparseCodes | None:
        if not self.training:
            threshold = self.running_threshold
            if threshold is None:
                return None
            # a threshold that was set by hand may be a number
            return encoder.passing(torch.as_tensor(threshold, dtype=encoder.x.dtype), torch.ge)
        if not 1 <= self.top_k < encoder.x.shape[0] * len(encoder.W):
            return None
        codes = encoder.batch_topk(self.top_k + 1)  # one more, to see whether it ties with the last
        acts = torch.where(codes.occupied(), codes.acts.detach(), 0)
        acts = torch.cat([acts, acts.new_zeros(max(0, self.top_k + 1 - acts.numel()))])
        last, after = acts.topk(self.top_k + 1).values[-2:]
        if bool((last == after) & (last > 0)):
            return None
        momentum = self.threshold_momentum
        if self.running_threshold is None:
            self.running_threshold = last
        else:
            self.running_threshold = momentum * self.running_threshold + (1 - momentum) * last
        return codes.keep(codes.acts.detach() >= last)


class SwappedJump(SwappedSAE):
    """JumpReLU, where nothing trains its thresholds: all pre-codes have a part in their gradient."""

    __slots__ = ()

    def is_dense(self, x: Tensor) -> bool:
        trained = torch.is_grad_enabled() and self.thresholds.requires_grad  # type: ignore[attr-defined]
        return trained or super().is_dense(x)

    def select(self, encoder: EncoderInputs) -> SparseCodes | None:
        return encoder.passing(self.thresholds.exp(), torch.ge)  # type: ignore[attr-defined]


class SwappedJumpSAE(OverABC, SwappedJump, JumpSAE):
    """JumpSAE."""


class SwappedRAJumpSAE(OverABC, SwappedJump, RAJumpSAE):
    """RAJumpSAE."""


SWAPS: dict[type, type] = {
    SAE: SwappedReLUSAE,
    TopKSAE: SwappedTopKSAE,
    RATopKSAE: SwappedRATopKSAE,
    BatchTopKSAE: SwappedBatchTopKSAE,
    JumpSAE: SwappedJumpSAE,
    RAJumpSAE: SwappedRAJumpSAE,
}
