"""sparsify's SparseCoder with activation="topk": autoencoders, transcoders, skip connections, AuxK and multi-topk.

Its EncoderOutput and ForwardOutput stay what they are; pre_acts is lazy. As in the library, no loss goes back from
pre_acts to the encoder: AuxK and multi-topk train the decoder alone.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from sparsify import SparseCoder, Trainer
from sparsify.fused_encoder import EncoderOutput
from sparsify.sparse_coder import ForwardOutput
from torch import Tensor

from fastsae import ops
from fastsae.codes import SparseCodes
from fastsae.model.losses import dead_rows
from fastsae.ops.ledger import LedgerGradient
from fastsae.swapped.base import (
    OverModule,
    Swapped,
    Unsupported,
    accelerate_sae,
    check_sae,
    filled_indices,
    remove_along_rows_,
)
from fastsae.swapped.lazy import Source, lazy_pre_acts
from fastsae.swapped.trainers import follow, fused


class SwappedSparseCoder(OverModule, Swapped, SparseCoder):
    """SparseCoder."""

    roles: ClassVar[dict[str, str]] = {
        "W_enc": "encoder.weight",
        "W_dec": "W_dec",
        "b_enc": "encoder.bias",
        "b_dec": "b_dec",
    }
    cfg: Any

    @classmethod
    def check(cls, module: Any) -> None:
        if module.cfg.activation != "topk":
            raise Unsupported(f"cfg.activation of the SparseCoder is {module.cfg.activation!r}, expected 'topk'")
        if module.W_dec is None:
            raise Unsupported("the SparseCoder was made with decoder=False, expected one with a decoder")

    def takes_pre_bias(self) -> bool:
        return not self.cfg.transcode

    def latents_per_token(self) -> int:
        return int(self.cfg.k)

    def _pre_acts(self, flat: Tensor, batch: tuple[int, ...]) -> Tensor:
        with torch.no_grad():  # the library's encoder has no gradient from here
            return lazy_pre_acts(
                self.centred(flat), self.rows("W_enc"), self.rows_of_bias(), None, True, (*batch, self.num_latents),
                Source(flat),
            )  # fmt: skip

    def encode(self, x: Tensor) -> EncoderOutput:
        """The library's EncoderOutput; of the latents of a token, those of positive act come first, by index."""
        flat, batch = x.reshape(-1, x.shape[-1]), tuple(x.shape[:-1])
        codes = self.encoder_inputs(flat).topk(self.cfg.k).with_batch(batch or (1,))
        acts, indices = codes.acts, filled_indices(codes)
        if not batch:
            acts, indices = acts[0], indices[0]
        return EncoderOutput(acts, indices, self._pre_acts(flat, batch))

    def decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        """The reconstruction of acts and latents in any order (N, K)."""
        batch = top_acts.shape[:-1]
        acts = top_acts.reshape(-1, top_acts.shape[-1]).to(self.dtype)
        codes = _ordered(acts, top_indices.reshape(acts.shape), self.num_latents)
        return self._decoded(codes).view(*batch, self.W_dec.shape[1])

    def _decoded(self, codes: SparseCodes) -> Tensor:
        return ops.decode(codes, self.rows("W_dec")) + self.b_dec

    def forward(
        self, x: Tensor, y: Tensor | None = None, *, dead_mask: Tensor | None = None,
        total_variance: Tensor | None = None,
    ) -> ForwardOutput:  # fmt: skip
        """The library's ForwardOutput, computed in the weights' dtype on every device."""
        k = self.cfg.k
        if x.ndim != 2:
            return super().forward(x, y, dead_mask=dead_mask, total_variance=total_variance)
        encoder = self.encoder_inputs(x)
        codes = encoder.topk(k)
        y = x if y is None else y
        recon = self._decoded(codes)
        if self.W_skip is not None:
            recon = recon + x.to(self.dtype) @ self.W_skip.mT
        error = y - recon
        if total_variance is None:
            total_variance = (y - y.mean(0)).pow(2).sum()
        fvu = error.pow(2).sum() / total_variance
        auxk = recon.new_tensor(0.0)
        dead = 0 if dead_mask is None else int(dead_mask.sum())
        if dead_mask is not None and dead > 0:
            wanted = y.shape[-1] // 2
            held = self._held_topk(encoder, min(wanted, dead), rows=dead_rows(dead_mask))
            modelled = ops.decode(held, self.rows("W_dec"))
            auxk = min(dead / wanted, 1.0) * (modelled - error.detach()).pow(2).sum() / total_variance
        multi = recon.new_tensor(0.0)
        if self.cfg.multi_topk:
            codes = self._held_topk(encoder, 4 * k)
            recon = self._decoded(codes)
            multi = (recon - y).pow(2).sum() / total_variance
        return ForwardOutput(recon, codes.acts, filled_indices(codes), fvu, auxk, multi)

    def _held_topk(self, encoder: Any, k: int, rows: Tensor | None = None) -> SparseCodes:
        with torch.no_grad():
            return ops.encode_topk(encoder.x, encoder.W, encoder.b, k, rows=rows, screen=encoder.screen)

    @torch.no_grad()
    def remove_gradient_parallel_to_decoder_directions(self) -> None:
        grad = self.W_dec.grad
        if isinstance(grad, LedgerGradient):
            remove_along_rows_(grad.ledger, torch.ones_like(self.encoder.bias))
        else:
            super().remove_gradient_parallel_to_decoder_directions()


def _ordered(acts: Tensor, indices: Tensor, latents: int) -> SparseCodes:
    """A ragged code of (N, K) acts and latents in any order.

    An act of 0 keeps its slot, through which it gets a gradient, unless its latent has another one: an empty slot of
    `encode` repeats the first latent.
    """
    order = (2 * indices.long() + (acts == 0)).sort(-1).indices
    n, k = acts.shape
    offsets = torch.arange(n + 1, dtype=torch.int64, device=acts.device) * k
    acts, indices = acts.gather(1, order), indices.gather(1, order).int()
    again = torch.zeros_like(acts, dtype=torch.bool)
    again[:, 1:] = indices[:, 1:] == indices[:, :-1]
    codes = SparseCodes(acts.flatten(), indices.flatten(), latents, offsets)
    return codes.keep(((acts != 0) | ~again).flatten())


class SwappedTrainer(Trainer):
    """Trainer whose SparseCoders are accelerated, and whose torch.optim.Adam is fastsae's.

    With optimizer="signum" (schedule-free) or "muon" the optimizer stays the library's, on dense gradients.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.take_over(self)

    @staticmethod
    def take_over(trainer: Any) -> None:
        saes = list(trainer.saes.values())
        if len(trainer.optimizers) == 1 and type(trainer.optimizers[0]) is torch.optim.Adam:
            trainer.optimizers = [fused(trainer.optimizers[0], saes, SWAPS)]
            for scheduler in trainer.lr_schedulers:
                follow(scheduler, trainer.optimizers[0])
            return
        for sae in saes:
            check_sae(sae, SWAPS)
        for sae in saes:
            accelerate_sae(sae, SWAPS)


SWAPS: dict[type, type] = {SparseCoder: SwappedSparseCoder, Trainer: SwappedTrainer}
