"""split_signs: an SAE whose acts have either sign as one whose acts are never negative, which more tools understand."""

from __future__ import annotations

import torch

from fastsae.model.parameters import EXTRA_STATE
from fastsae.model.rules import AbsTopK
from fastsae.model.sae import SparseAutoencoder, as_sae
from fastsae.warn import warn


@torch.no_grad()
def split_signs(sae: SparseAutoencoder) -> SparseAutoencoder:
    """An SAE with AbsTopK as one with TopK and twice the latents, which reconstructs the same. A copy.

    Latent i has the positive acts of latent i; latent i + d_sae the negative ones, with their sign, its encoder's and
    its decoder's row turned. Where two magnitudes tie for the last place, the positive act has it.
    Raises ValueError for another rule.
    """
    sae = as_sae(sae, "sae")
    sae.check_whole("split_signs")
    if not isinstance(sae.activation, AbsTopK):
        raise ValueError(f"split_signs got an SAE with {sae.activation}, expected AbsTopK, whose acts have either sign")
    settings = {**sae.config, "d_sae": 2 * sae.d_sae, "activation": {"kind": "topk", "k": sae.activation.k}}
    made = SparseAutoencoder.from_config(settings, dtype=sae.W_dec.dtype, device="meta")
    turned = {"W_enc": -1, "W_dec": -1, "b_enc": -1, "tokens_since_fired": 1}
    state = {
        name: torch.cat([t, turned[name] * t]) if name in turned else t.clone()
        for name, t in sae.state_dict().items()
        if name != EXTRA_STATE
    }
    made.load_state_dict({**state, EXTRA_STATE: made.get_extra_state()}, assign=True)
    return made.train(sae.training)


def say_signs(sae: SparseAutoencoder, host: str) -> None:
    """Warns where the acts of `sae` have either sign."""
    if isinstance(sae.activation, AbsTopK):
        warn(
            f"acts of {sae.activation} have either sign: {host} takes them, but its dashboards, exporters and scores "
            "show or count positive acts only. fastsae.split_signs(sae) gives the same SAE with twice the latents and "
            "no negative act",
            UserWarning,
        )
