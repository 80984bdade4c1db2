"""CrossLayerTranscoder: latents of each layer write into it and all later ones, and the strongest are chosen jointly.

    a_l = (x_l W_enc_lᵀ + b_enc_l) at the chosen latents,    ŷ_m = b_dec_m + Σ_{l ≤ m} a_l W_dec_{l→m}

A token's layers · k latents of largest a · ‖W_dec‖ are active, over all layers together. Each layer's own largest are
found as `encode_topk` finds them, and the joint choice is among those: nothing of size (N, layers · M) is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastsae import ops
from fastsae.codes import SparseCodes
from fastsae.model.initial import unit_rows
from fastsae.model.settings import Config, RecordsSettings, check_creation
from fastsae.ops.products import per_latent
from fastsae.ops.register import without_autocast
from fastsae.reference import wide


class CrossLayerResult(NamedTuple):
    """What a CrossLayerTranscoder returns. loss: 0-d, mean over tokens of Σ_layers ‖target - recon‖²; recon (layers,
    *batch, d_out); codes: those of each layer, ragged."""

    loss: Tensor
    recon: Tensor
    codes: list[SparseCodes]


class CrossLayerTranscoder(RecordsSettings):
    """An encoder for each layer, and decoders from each layer to itself and all later ones, with a joint top-k.

    layers: their number. d_in, d_out (None: d_in): widths of each layer's input and target. d_sae: latents of each
    layer. k: active latents per token and layer, on average over the layers of one token. seed: of the weights.
    Parameters: W_enc, W_dec, b_enc, lists over layers of (d_sae, d_in), (d_sae, (layers - layer) · d_out), which has
    the target layers side by side, and (d_sae,); b_dec (layers · d_out,). Raises ValueError for bad settings.
    Source: Lindsey et al. 2025 (Transformer Circuits, Circuit Tracing, section 2); the joint choice by act times norm:
    the cross-layer transcoders that ByteDance published for Qwen3 in 2026.
    """

    def __init__(
        self,
        layers: int,
        d_in: int,
        d_sae: int,
        k: int,
        *,
        d_out: int | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        seed: int | None = None,
    ):
        super().__init__()
        self.layers, self.d_in, self.d_sae, self.k = layers, d_in, d_sae, k
        self.d_out, self.backend = d_in if d_out is None else d_out, backend
        for name in ("layers", "d_in", "d_sae", "k", "d_out"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1")
        if k > d_sae:
            raise ValueError(f"k is {k}, expected at most d_sae = {d_sae}; lower k or widen the layers")
        check_creation(dtype, seed)
        factory = {"dtype": dtype or torch.get_default_dtype(), "device": device}

        def parameters(*shapes: tuple[int, ...]) -> nn.ParameterList:
            return nn.ParameterList(nn.Parameter(torch.empty(shape, **factory)) for shape in shapes)  # type: ignore[arg-type]

        self.W_enc = parameters(*((d_sae, d_in) for _ in range(layers)))
        self.W_dec = parameters(*((d_sae, (layers - layer) * self.d_out) for layer in range(layers)))
        self.b_enc = parameters(*((d_sae,) for _ in range(layers)))
        self.b_dec = nn.Parameter(torch.empty(layers * self.d_out, **factory))  # type: ignore[arg-type]
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """Random directions of norm 1 (for a decoder, over all its targets together); biases 0."""
        for bias in (*self.b_enc, self.b_dec):
            nn.init.zeros_(bias)
        if self.b_dec.is_meta:
            return
        generator = None if seed is None else torch.Generator().manual_seed(int(seed))
        for W in (*self.W_enc, *self.W_dec):
            W.copy_(unit_rows(W.shape[0], W.shape[1], W.dtype, generator))

    @property
    def config(self) -> Config:
        names = ("layers", "d_in", "d_sae", "k", "d_out")
        return Config({"kind": "cross_layer_transcoder"} | {name: getattr(self, name) for name in names})

    def encode(self, x: Tensor) -> list[SparseCodes]:
        """The code of each layer, ragged, for x (layers, *batch, d_in); in total at most layers · k acts a token.

        Ties go to the lower layer, then to the lower latent. Differentiable in the acts.
        """
        flat = self._checked("x", x, self.d_in)
        chosen = self._chosen(flat)
        codes = []
        for own, rows, W, b in zip(chosen, flat, self.W_enc, self.b_enc, strict=True):

            def acts(x: Tensor, W: Tensor, b: Tensor, own: SparseCodes = own) -> SparseCodes:
                pre = ops.active_dot(x, own, W, backend=self.backend) + per_latent(b, own, self.backend)
                return replace(own, acts=pre.to(x.dtype))

            codes.append(ops.encode_by(acts, rows, W, b, backend=self.backend).with_batch(tuple(x.shape[1:-1])))
        return codes

    @torch.no_grad()
    def _chosen(self, flat: Tensor) -> list[SparseCodes]:
        """Which latents are active on x (layers, N, d_in)."""
        most = self.layers * self.k
        found = [
            ops.encode_topk(rows, W, b, min(most, self.d_sae), scale=norms.to(W.dtype), backend=self.backend)
            for rows, W, b, norms in zip(flat, self.W_enc, self.b_enc, self.decoder_norms(), strict=True)
        ]
        with without_autocast(flat.device.type):
            scores = torch.cat([c.acts for c in found], -1)
        # A stable sort: ties go to the lower layer, and within it to the lower latent.
        first = scores.argsort(dim=-1, descending=True, stable=True)[..., :most]
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, first, True)
        ends = accumulate((c.k for c in found), initial=0)
        return [c.keep(kept[..., start:end]) for c, (start, end) in zip(found, pairwise(ends), strict=True)]

    def decoder_norms(self) -> list[Tensor]:
        """The norm of each latent's decoders over all targets together: (d_sae,) for each layer, fp32 at least."""
        return [torch.linalg.vector_norm(wide(W), dim=-1) for W in self.W_dec]

    def decode(self, codes: Sequence[SparseCodes]) -> Tensor:
        """The reconstruction (layers, *batch, d_out) of the codes of all layers."""
        if len(codes) != self.layers:
            raise ValueError(f"got the codes of {len(codes)} layers, expected {self.layers}")
        batch = codes[0].batch_shape
        recon = self.b_dec.view(self.layers, 1, self.d_out).expand(-1, codes[0].n_tokens, -1)
        for layer, (own, W) in enumerate(zip(codes, self.W_dec, strict=True)):
            part = ops.decode(own.flatten(), W, backend=self.backend).view(-1, self.layers - layer, self.d_out)
            recon = torch.cat([recon[:layer], recon[layer:] + part.movedim(1, 0)])
        return recon.reshape(self.layers, *batch, self.d_out)

    def forward(self, x: Tensor, target: Tensor) -> CrossLayerResult:
        """x (layers, *batch, d_in): each layer's input; target (layers, *batch, d_out): the output of its MLP."""
        goal = self._checked("target", target, self.d_out)
        if x.shape[:-1] != target.shape[:-1]:
            raise ValueError(f"target has shape {tuple(target.shape)}, expected {(*x.shape[:-1], self.d_out)}")
        codes = self.encode(x)
        recon = self.decode(codes)
        error = wide(recon.reshape(goal.shape)) - wide(goal)
        loss = error.square().sum((0, -1)).sum() / max(goal.shape[1], 1)
        return CrossLayerResult(loss, recon, codes)

    def _checked(self, name: str, x: Tensor, width: int) -> Tensor:
        """x as (layers, N, width) in the weights' dtype. Raises ValueError if its shape does not fit."""
        if x.ndim < 3 or x.shape[0] != self.layers or x.shape[-1] != width:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, expected ({self.layers}, *batch, {width}), layers first"
            )
        return x.reshape(self.layers, -1, width).to(self.b_dec.dtype)
