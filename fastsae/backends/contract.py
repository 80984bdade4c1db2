"""UpdateArguments: the arguments of one raw `update_latents_`, by name, and what backends derive from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.reference import EightBit, Moment, Optimizer, Params, Parts, store, update

WRITTEN = ("W_enc", "W_dec", "b_enc", "b_dec", "moments", "scales", "screen")
"""The arguments of `update_latents_` that it writes; the others it only reads."""


class RawTerm(NamedTuple):
    """acts, indices (N, K), or (capacity,) with offsets (N+1,); dacts like acts; x (N, D_in); grad (N, D_out)."""

    acts: Tensor
    indices: Tensor
    offsets: Tensor | None
    dacts: Tensor | None
    x: Tensor
    grad: Tensor
    has_bias: bool


@dataclass(frozen=True, eq=False)
class UpdateArguments:
    """In the order of the raw op's schema, without the backend; both and their meanings: fastsae.ops.update.

    An empty tensor in offsets or dacts stands for none; screen, scales and added are empty if there are none.
    """

    W_enc: Tensor | None
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    moments: list[Tensor]
    scales: list[Tensor]
    screen: list[Tensor]
    acts: list[Tensor]
    indices: list[Tensor]
    offsets: list[Tensor]
    dacts: list[Tensor]
    xs: list[Tensor]
    grads: list[Tensor]
    has_bias: list[bool]
    decoder_pull: Tensor | None
    db_enc: Tensor | None
    added: list[Tensor]
    lr: Tensor
    step: Tensor
    grad_scale: Tensor | None
    skip: Tensor | None
    optimizer: str
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_rows: float | None
    unit_norm: bool
    pre_bias: bool
    norms_only: bool
    seed: int | None
    first_latent: int

    @property
    def tied(self) -> bool:
        return self.W_enc is None

    @property
    def encoder(self) -> Tensor:
        return self.W_dec if self.W_enc is None else self.W_enc

    def parameters(self) -> dict[str, Tensor]:
        """The tensors to update, in the order of their moments."""
        named = {"W_enc": self.W_enc, "W_dec": self.W_dec, "b_enc": self.b_enc, "b_dec": self.b_dec}
        return {name: p for name, p in named.items() if p is not None}

    def numbers_before(self, name: str) -> int:
        """How many numbers of the whole parameter are of latents before `first_latent`, mod 2³²."""
        width = {"b_dec": 0, "b_enc": 1}.get(name)
        return self.first_latent * (self.parameters()[name].shape[1] if width is None else width) % 2**32

    def rule(self) -> Optimizer:
        return Optimizer(self.optimizer, (self.beta1, self.beta2), self.eps, self.weight_decay)

    def stored_moments(self) -> dict[str, tuple[Moment, ...]]:
        """Each parameter's moments as they are stored."""
        scales = iter(self.scales)
        stored = [EightBit(m, next(scales)) if m.dtype == torch.float8_e4m3fn else m for m in self.moments]
        kept = len(self.rule().moments)
        return {name: tuple(stored[i * kept : (i + 1) * kept]) for i, name in enumerate(self.parameters())}

    def write_step(self, params: Params, grads: Params) -> None:
        """Stores the optimizer's step: params as wide as it computes, gradients from `shape_gradients`, which are used
        up. If skip is True, the old values stay."""
        if self.grad_scale is not None:
            for name in grads:
                grads[name] = grads[name] * self.grad_scale
        old = self.stored_moments()
        before = {name: self.numbers_before(name) for name in params}
        new, moments = update(params, grads, old, self.lr, self.step, self.rule(), self.unit_norm, self.seed, before)
        for name, p in self.parameters().items():
            store(p, new[name], self.skip)
            for place, moment in zip(old[name], moments[name], strict=True):
                store(place, moment, self.skip)

    def terms(self) -> list[RawTerm]:
        columns = (self.acts, self.indices, self.offsets, self.dacts, self.xs, self.grads, self.has_bias)
        return [
            RawTerm(
                act, index, offset if offset.numel() else None, dact if dact.shape == act.shape else None, x, grad, bias
            )
            for act, index, offset, dact, x, grad, bias in zip(*columns, strict=True)
        ]

    def parts(self) -> Parts:
        """What adds to the gradients of the terms; tied dictionaries have one gradient for both."""
        if not self.added:
            return Parts(self.decoder_pull, self.db_enc)
        *encoder, decoder, pre = self.added
        return Parts(self.decoder_pull, self.db_enc, encoder[0] if encoder else None, decoder, pre)
