"""Dense acts of an SAE, and reconstructions from any: what libraries that know no sparse codes exchange."""

from __future__ import annotations

import copy

import torch.nn.functional as F
from torch import Tensor

from fastsae.codes import SparseCodes
from fastsae.model.sae import SparseAutoencoder


def at_inference(sae: SparseAutoencoder) -> SparseAutoencoder:
    """The same parameters and buffers in eval mode, whatever the mode of `sae`, which keeps its own."""
    view = copy.copy(sae)
    view.training = False
    return view


def encode_dense(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """The acts (*batch, d_sae) of x (*batch, d_in); of a single token (d_in,) as (d_sae,)."""
    acts = sae.encode(x[None] if x.ndim == 1 else x).to_dense()
    return acts[0] if x.ndim == 1 else acts


def decode_dense(sae: SparseAutoencoder, acts: Tensor) -> Tensor:
    """The reconstruction (*batch, d_out) of any acts (*batch, d_sae); differentiable in them where they are not 0."""
    recon = sae.decode(SparseCodes.from_dense((acts[None] if acts.ndim == 1 else acts).to(sae.W_dec.dtype)))
    return recon[0] if acts.ndim == 1 else recon


def pre_acts_dense(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """All pre-acts (*batch, d_sae) of x (*batch, d_in); of a single token (d_in,) as (d_sae,)."""
    if x.ndim == 1:
        return pre_acts_dense(sae, x[None])[0]
    return F.linear(sae.inputs(x).encoder_input, sae.encoder_weight, sae.b_enc).unflatten(0, x.shape[:-1])


def acts_of_pre_acts(sae: SparseAutoencoder, pre: Tensor) -> Tensor:
    """The rule on pre-acts (*batch, d_sae), densely: what a hook on them may have changed."""
    state = {name: t.to(pre.dtype) if t.is_floating_point() else t for name, t in sae.selection_state.items()}
    return sae.rule.dense(pre.reshape(-1, sae.d_sae), sae.rule.per_latent(state), state, training=False).view(pre.shape)
