"""FastSAE: an SAE class of SAELens whose encode and decode are those of a fastsae.SparseAutoencoder. Needs sae_lens."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sae_lens.saes.sae import SAE, SAEConfig, SAEMetadata
from sae_lens.saes.topk_sae import TopK
from torch import Tensor, nn

from fastsae.hosts.dense import (
    acts_of_pre_acts,
    at_inference,
    decode_dense,
    encode_dense,
    norms_to_fold,
    over,
    pre_acts_dense,
    times,
)
from fastsae.hosts.signs import say_signs
from fastsae.model.sae import SparseAutoencoder


@dataclass
class FastSAEConfig(SAEConfig):
    """SAELens's settings, with those of the SparseAutoencoder in `sae`. folded: whether norms are folded into acts."""

    sae: dict[str, Any] = field(default_factory=dict)
    folded: bool = False

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
        self.norms: Tensor | None
        self.register_buffer("norms", norms_to_fold(self.sae) if self.cfg.folded else None)

    def get_activation_fn(self) -> TopK:
        """What tells tools that the acts of some latents need those of all, as SAEDashboard asks; it is not called."""
        return TopK(self.cfg.d_sae)

    # SAELens's tools read these; assigning to them is not meant.
    @property
    def W_enc(self) -> Tensor:  # type: ignore[override]
        return times(self.sae.encoder_weight.mT, self.norms)

    @property
    def W_dec(self) -> Tensor:  # type: ignore[override]
        return self.sae.W_dec if self.norms is None else over(self.sae.W_dec, self.norms[:, None])

    @property
    def b_enc(self) -> Tensor:
        return times(self.sae.b_enc, self.norms)

    @property
    def b_dec(self) -> nn.Parameter:  # type: ignore[override]
        return self.sae.b_dec

    def encode(self, x: Tensor) -> Tensor:
        x = self.hook_sae_input(self.reshape_fn_in(x.to(self.dtype)))
        if self.hook_sae_acts_pre._forward_hooks:
            pre = self.hook_sae_acts_pre(pre_acts_dense(self.sae, x, self.norms))
            acts = acts_of_pre_acts(self.sae, pre, self.norms)
        else:
            acts = encode_dense(self.sae, x, self.norms)
        return self.hook_sae_acts_post(acts)

    def decode(self, feature_acts: Tensor) -> Tensor:
        recon = self.hook_sae_recons(decode_dense(self.sae, feature_acts, self.norms))
        return self.reshape_fn_out(recon, self.d_head)

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """SAELens's loader gives every tensor the SAE's dtype, counters and settings too; here they get theirs back."""
        for name, own in self.state_dict().items():
            if name in state_dict:
                state_dict[name] = state_dict[name].to(own.dtype)

    def fold_W_dec_norm(self) -> None:
        """Gives W_dec rows of norm 1 and multiplies acts by the norms, as SAEDashboard and Neuronpedia's exporter want.

        The parameters of the SAE stay as they are, and so do reconstructions and which latents are active. The norms
        are those at the time of this call. Warns of AbsTopK, whose negative acts these tools do not show.
        """
        say_signs(self.sae, "SAELens")
        self.norms = norms_to_fold(self.sae)
        self.cfg.folded = self.norms is not None

    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Raises NotImplementedError: an SAE of fastsae has its own input scale."""
        raise NotImplementedError(
            "an SAE of fastsae holds its input scale itself (normalize='constant'); leave SAELens's out"
        )
