"""llamascopium's SparseAutoEncoder: ReLU, JumpReLU, top-k and batch top-k, by act times decoder norm or by act.

The library multiplies pre-acts with decoder norms, selects, and divides again: what is selected keeps its own act.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from llamascopium.activation_functions import JumpReLU
from llamascopium.models.sae import SparseAutoEncoder
from torch import Tensor

from fastsae.codes import SparseCodes
from fastsae.swapped.base import OverModule, Swapped, Unsupported, decoded, hooked, traced
from fastsae.swapped.lazy import Source, kept_of, lazy_pre_acts, spread

RULES = "relu", "jumprelu", "topk", "batchtopk"


class SwappedSparseAutoEncoder(OverModule, Swapped, SparseAutoEncoder):
    """SparseAutoEncoder."""

    roles: ClassVar[dict[str, str]] = {"W_enc": "W_E", "W_dec": "W_D", "b_enc": "b_E", "b_dec": "b_D"}
    transposed = ("W_enc",)
    cfg: Any

    @classmethod
    def check(cls, module: Any) -> None:
        cfg = module.cfg
        if module.device_mesh is not None:
            raise Unsupported("the SparseAutoEncoder is on a device mesh, expected one whose tensors are whole")
        if cfg.use_glu_encoder:
            raise Unsupported("cfg.use_glu_encoder of the SparseAutoEncoder is True, expected False")
        if cfg.act_fn.lower() not in RULES:
            raise Unsupported(f"cfg.act_fn of the SparseAutoEncoder is {cfg.act_fn!r}, expected one of {RULES}")

    def lacks(self) -> tuple[str, ...]:
        return () if self.cfg.use_decoder_bias else ("b_dec",)

    def takes_pre_bias(self) -> bool:
        return False

    def latents_per_token(self) -> int | None:
        return int(self.current_k) if "topk" in self.cfg.act_fn.lower() else None

    def densely(self, x: Tensor) -> bool:
        """Whether the library's own path has to answer: hooks want dense acts, or a threshold its gradient, in which
        every pre-act near it has a part."""
        rule: Any = self.activation_function
        if isinstance(rule, JumpReLU) and torch.is_grad_enabled() and rule.log_jumprelu_threshold.requires_grad:
            return True
        if traced() or self.was_changed():
            return True
        if x.ndim not in (2, 3):  # of further dimensions, its batch top-k takes each matrix for a batch
            return True
        points = (self.hook_hidden_pre, self.hook_feature_acts, rule)
        return hooked(self, points, "hook_hidden_pre, hook_feature_acts or activation_function")

    def select(self, flat: Tensor) -> SparseCodes | None:
        """The pre-acts that the rule keeps; None where they are too many."""
        encoder, rule = self.encoder_inputs(flat), self.cfg.act_fn.lower()
        norms = self.decoder_norm().detach() if self.cfg.sparsity_include_decoder_norm else None
        if rule == "relu":
            return encoder.above(0.0)
        if rule == "jumprelu":
            threshold = self.activation_function.get_jumprelu_threshold().detach()
            return encoder.passing(threshold if norms is None else threshold / norms)
        if not 1 <= self.current_k <= self.cfg.d_sae:
            return None
        if rule == "topk":
            return encoder.topk(self.current_k, norms)
        return encoder.batch_topk(self.current_k * len(flat), norms)

    def encode(self, x: Tensor, return_hidden_pre: bool = False, **kwargs: Any) -> Any:
        codes = None
        if not self.densely(x):
            flat = x.to(self.W_E.dtype).reshape(-1, x.shape[-1])
            codes = self.select(flat)
        if codes is None:
            return super().encode(x, return_hidden_pre, **kwargs)
        shape = (*x.shape[:-1], codes.d_sae)
        acts = self.hook_feature_acts(spread(codes, shape, codes))
        if not return_hidden_pre:
            return acts
        pre = lazy_pre_acts(flat, self.rows("W_enc"), self.rows_of_bias(), None, False, shape, Source(flat))
        return acts, pre

    def decode(self, feature_acts: Tensor, **kwargs: Any) -> Tensor:
        codes = kept_of(feature_acts)
        if codes is None:
            return super().decode(feature_acts, **kwargs)
        found = decoded(codes, self.rows("W_dec"), feature_acts.shape)
        return self.hook_reconstructed(found + self.b_D if self.cfg.use_decoder_bias else found)

    def full_state_dict(self) -> dict[str, Tensor]:
        """The library's, contiguous: safetensors writes no other tensors."""
        return {name: value.contiguous() for name, value in super().full_state_dict().items()}


SWAPS: dict[type, type] = {SparseAutoEncoder: SwappedSparseAutoEncoder}
