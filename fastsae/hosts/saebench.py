"""SAEBenchModule: what SAEBench's evaluations take for an SAE. Needs sae_bench."""

from __future__ import annotations

from typing import Any, Self

from sae_bench.custom_saes.custom_sae_config import CustomSAEConfig
from torch import Tensor, nn

from fastsae.hosts.dense import at_inference, decode_dense, encode_dense
from fastsae.model.sae import SparseAutoencoder


class SAEBenchModule(nn.Module):
    """Encode, decode and forward with dense acts, and what else SAEBench reads: cfg, device, dtype, weights."""

    def __init__(
        self, sae: SparseAutoencoder, model_name: str, hook_layer: int, hook_name: str, context_size: int
    ) -> None:
        super().__init__()
        self.sae = at_inference(sae)
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
        return self.sae.encoder_weight.mT

    @property
    def W_dec(self) -> Tensor:
        return self.sae.W_dec

    @property
    def b_enc(self) -> Tensor:
        return self.sae.b_enc

    @property
    def b_dec(self) -> Tensor:
        return self.sae.b_dec

    def to(self, *args: Any, **kwargs: Any) -> Self:
        moved = super().to(*args, **kwargs)
        moved._follow()
        return moved

    def encode(self, x: Tensor) -> Tensor:
        return encode_dense(self.sae, x).to(x.dtype)

    def decode(self, feature_acts: Tensor) -> Tensor:
        return decode_dense(self.sae, feature_acts).to(feature_acts.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))
