"""Dense acts of an SAE, and reconstructions from any: what libraries that know no sparse codes exchange."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsae.codes import SparseCodes
from fastsae.model.sae import SparseAutoencoder
from fastsae.reference import wide


def at_inference(sae: SparseAutoencoder) -> SparseAutoencoder:
    """The same parameters and buffers in eval mode, whatever the mode of `sae`, which keeps its own."""
    view = copy.copy(sae)
    view.training = False
    return view


def norms_to_fold(sae: SparseAutoencoder) -> Tensor | None:
    """The norms (M,) of the decoder's rows, fp32 at least, 1 for a row of 0; None if the SAE keeps them at 1."""
    if sae.decoder_norm == "unit":
        return None
    norms = torch.linalg.vector_norm(wide(sae.W_dec.detach()), dim=1)
    return torch.where(norms > 0, norms, 1.0)


# norms, below: (M,) of `norms_to_fold`, where the host has rows of norm 1. Acts are then those of the SAE times the
# norms; which latents are active does not change.


def encode_dense(sae: SparseAutoencoder, x: Tensor, norms: Tensor | None = None) -> Tensor:
    """The acts (*batch, d_sae) of x (*batch, d_in); of a single token (d_in,) as (d_sae,)."""
    acts = sae.encode(x[None] if x.ndim == 1 else x).to_dense()
    return times(acts[0] if x.ndim == 1 else acts, norms)


def decode_dense(sae: SparseAutoencoder, acts: Tensor, norms: Tensor | None = None) -> Tensor:
    """The reconstruction (*batch, d_out) of any acts (*batch, d_sae); differentiable in them where they are not 0."""
    acts = over(acts, norms)
    recon = sae.decode(SparseCodes.from_dense((acts[None] if acts.ndim == 1 else acts).to(sae.W_dec.dtype)))
    return recon[0] if acts.ndim == 1 else recon


def pre_acts_dense(sae: SparseAutoencoder, x: Tensor, norms: Tensor | None = None) -> Tensor:
    """All pre-acts (*batch, d_sae) of x (*batch, d_in); of a single token (d_in,) as (d_sae,)."""
    if x.ndim == 1:
        return pre_acts_dense(sae, x[None], norms)[0]
    pre = F.linear(sae.inputs(x).encoder_input, sae.encoder_weight, sae.b_enc).unflatten(0, x.shape[:-1])
    return times(pre, norms)


def acts_of_pre_acts(sae: SparseAutoencoder, pre: Tensor, norms: Tensor | None = None) -> Tensor:
    """The rule on pre-acts (*batch, d_sae), densely: what a hook on them may have changed."""
    state = {name: t.to(pre.dtype) if t.is_floating_point() else t for name, t in sae.selection_state.items()}
    own = over(pre, norms).reshape(-1, sae.d_sae)
    acts = sae.rule.dense(own, sae.rule.per_latent(state), state, training=False).view(pre.shape)
    return times(acts, norms)


def times(t: Tensor, norms: Tensor | None) -> Tensor:
    """t · norms, in t's dtype."""
    return t if norms is None else (t * norms).to(t.dtype)


def over(t: Tensor, norms: Tensor | None) -> Tensor:
    """t / norms, in t's dtype."""
    return t if norms is None else (t / norms).to(t.dtype)
