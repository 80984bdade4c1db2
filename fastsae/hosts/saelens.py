"""FastSAE: an SAE class of SAELens whose encode and decode are those of a fastsae.SparseAutoencoder. Needs sae_lens."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sae_lens.saes.sae import SAE, SAEConfig, SAEMetadata
from sae_lens.saes.topk_sae import TopK
from torch import Tensor, nn

from fastsae.hosts.dense import acts_of_pre_acts, at_inference, decode_dense, encode_dense, pre_acts_dense
from fastsae.model.sae import SparseAutoencoder


@dataclass
class FastSAEConfig(SAEConfig):
    """SAELens's settings, with those of the SparseAutoencoder in `sae`."""

    sae: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def architecture(cls) -> str:
        return "fastsae"


class FastSAE(SAE[FastSAEConfig]):
    """An SAE of SAELens for inference. Its parameters are those of `sae`; acts are dense (*batch, d_sae).

    The hooks of SAELens are there. One on hook_sae_acts_pre asks for the dense pre-acts, which cost a product of x with
    the whole dictionary; without it there is none.
    """

    @classmethod
    def of(cls, sae: SparseAutoencoder, metadata: Mapping[str, Any]) -> FastSAE:
        """The class around an SAE that there is."""
        cfg = FastSAEConfig(
            d_in=sae.d_in, d_sae=sae.d_sae, dtype=str(sae.W_dec.dtype).removeprefix("torch."),
            device="meta", apply_b_dec_to_input=sae.pre_bias, metadata=SAEMetadata(**metadata),
            sae=copy.deepcopy(dict(sae.config)),
        )  # fmt: skip
        made = cls(cfg)
        made.sae, made.device, made.cfg.device = at_inference(sae), sae.W_dec.device, str(sae.W_dec.device)
        return made

    def initialize_weights(self) -> None:
        self.sae = SparseAutoencoder.from_config(self.cfg.sae, dtype=self.dtype, device=self.device).eval()

    def get_activation_fn(self) -> TopK:
        """What tells tools that the acts of some latents need those of all, as SAEDashboard asks; it is not called."""
        return TopK(self.cfg.d_sae)

    # SAELens's tools read these; assigning to them is not meant.
    @property
    def W_enc(self) -> Tensor:  # type: ignore[override]
        return self.sae.encoder_weight.mT

    @property
    def W_dec(self) -> nn.Parameter:  # type: ignore[override]
        return self.sae.W_dec

    @property
    def b_enc(self) -> nn.Parameter:
        return self.sae.b_enc

    @property
    def b_dec(self) -> nn.Parameter:  # type: ignore[override]
        return self.sae.b_dec

    def encode(self, x: Tensor) -> Tensor:
        x = self.hook_sae_input(self.reshape_fn_in(x.to(self.dtype)))
        if self.hook_sae_acts_pre._forward_hooks:
            acts = acts_of_pre_acts(self.sae, self.hook_sae_acts_pre(pre_acts_dense(self.sae, x)))
        else:
            acts = encode_dense(self.sae, x)
        return self.hook_sae_acts_post(acts)

    def decode(self, feature_acts: Tensor) -> Tensor:
        recon = self.hook_sae_recons(decode_dense(self.sae, feature_acts))
        return self.reshape_fn_out(recon, self.d_head)

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """SAELens's loader gives every tensor the SAE's dtype, counters and settings too; here they get theirs back."""
        for name, own in self.state_dict().items():
            if name in state_dict:
                state_dict[name] = state_dict[name].to(own.dtype)

    def fold_W_dec_norm(self) -> None:
        """Nothing where rows have norm 1, as SAEDashboard and Neuronpedia's exporter, which call it, want them.

        Raises NotImplementedError otherwise: the rule's thresholds and k would have to follow.
        """
        if self.sae.decoder_norm != "unit":
            raise NotImplementedError(
                f"decoder_norm is {self.sae.decoder_norm!r}, expected 'unit', whose rows have norm 1: norms are not "
                "folded into an SAE of fastsae"
            )

    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Raises NotImplementedError: an SAE of fastsae has its own input scale."""
        raise NotImplementedError(
            "an SAE of fastsae holds its input scale itself (normalize='constant'); leave SAELens's out"
        )
