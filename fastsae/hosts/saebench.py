"""SAEBenchModule: what SAEBench's evaluations take for an SAE. Needs sae_bench."""

from __future__ import annotations

from typing import Any, Self

from sae_bench.custom_saes.custom_sae_config import CustomSAEConfig
from torch import Tensor, nn

from fastsae.hosts.dense import at_inference, decode_dense, encode_dense, norms_to_fold, over, times
from fastsae.model.sae import SparseAutoencoder


class SAEBenchModule(nn.Module):
    """Encode, decode and forward with dense acts, and what else SAEBench reads: cfg, device, dtype, weights.

    Its evaluations expect decoder rows of norm 1. If the SAE's have other norms, W_dec shows the rows divided by these
    as they are now, acts are multiplied by them, and reconstructions stay.
    """

    def __init__(
        self, sae: SparseAutoencoder, model_name: str, hook_layer: int, hook_name: str, context_size: int
    ) -> None:
        super().__init__()
        self.sae = at_inference(sae)
        self.norms: Tensor | None
        self.register_buffer("norms", norms_to_fold(sae))
        self.cfg = CustomSAEConfig(
            model_name, d_in=sae.d_in, d_sae=sae.d_sae, hook_layer=hook_layer, hook_name=hook_name,
            context_size=context_size, architecture=sae.activation.kind, apply_b_dec_to_input=sae.pre_bias,
        )  # fmt: skip
        self._follow()

    def _follow(self) -> None:
        """Writes down where the parameters are and in which dtype."""
        self.device, self.dtype = self.sae.W_dec.device, self.sae.W_dec.dtype
        self.cfg.device, self.cfg.dtype = str(self.device), str(self.dtype).removeprefix("torch.")

    @property
    def W_enc(self) -> Tensor:
        return times(self.sae.encoder_weight.mT, self.norms)

    @property
    def W_dec(self) -> Tensor:
        return self.sae.W_dec if self.norms is None else over(self.sae.W_dec, self.norms[:, None])

    @property
    def b_enc(self) -> Tensor:
        return times(self.sae.b_enc, self.norms)

    @property
    def b_dec(self) -> Tensor:
        return self.sae.b_dec

    def to(self, *args: Any, **kwargs: Any) -> Self:
        moved = super().to(*args, **kwargs)
        moved._follow()
        return moved

    def encode(self, x: Tensor) -> Tensor:
        return encode_dense(self.sae, x, self.norms).to(x.dtype)

    def decode(self, feature_acts: Tensor) -> Tensor:
        return decode_dense(self.sae, feature_acts, self.norms).to(feature_acts.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))
