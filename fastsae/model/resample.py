"""Resampling dead latents, between steps, at inputs that the SAE reconstructs badly."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from fastsae.model.placement import axes_of
from fastsae.model.sae import SparseAutoencoder, as_sae


class HasRows(Protocol):
    """A training step whose optimizer keeps state for each latent."""

    def forget_rows_(self, latents: Tensor) -> None:
        """Sets the optimizer's state of these latents (int64) to zero."""


@torch.no_grad()
def resample_(
    sae: SparseAutoencoder,
    rows: Tensor | Iterable[Tensor],
    step: HasRows | None = None,
    *,
    dead: Tensor | None = None,
    encoder_norm: float = 0.2,
    batch_size: int = 4096,
    seed: int = 0,
) -> int:
    """Sets every dead latent to the direction of a badly reconstructed input; returns the number of dead latents.

    Inputs are drawn from `rows` (n, d_in), or blocks of them, each with probability ∝ (its squared error)², without
    replacement until all are used. The decoder's row becomes the drawn input less b_dec, at norm 1 (free norms: at the
    mean norm of live rows). The encoder's row gets the same direction at `encoder_norm` times the mean norm of live
    encoder rows. b_enc becomes 0. The rule's own parameters get their initial values, or, if they were initialized from
    data, the mean over live latents. The state of these rows in `step`'s optimizer becomes 0, and their dead-latent
    counters restart. dead: bool (M,), None: `sae.dead`. The draw depends only on the seed and the inputs.

    With several processes, call it in each of them with the same rows and seed, or their weights drift apart. Where
    fastsae.parallel has shared the SAE between them, `dead` is of this process's latents, and the number returned is of
    all.

    A host sync. Raises ValueError if no input is given or none has a finite error above 0, if processes that share the
    SAE gave other rows or seeds, and for d_out != d_in, where an input cannot become a decoder row; nothing has changed
    then. Source: Bricken et al. 2023 (Towards Monosemanticity), appendix on resampling.
    """
    sae = as_sae(sae, "sae")
    if sae.d_out != sae.d_in:
        raise ValueError(f"resampling needs d_out == d_in, got d_in = {sae.d_in}, d_out = {sae.d_out}")
    _, shards = axes_of(sae.placement)
    dead = sae.dead if dead is None else dead
    latents = dead.nonzero().squeeze(1)
    each = shards.rows(latents)
    n_dead = sum(each)
    if n_dead == 0:
        return 0
    if sae.placement is not None:
        sae.placement.check_numbers(seed=seed, encoder_norm=encoder_norm)
    inputs, errors = _errors(sae, [rows] if isinstance(rows, Tensor) else rows, batch_size)
    chance = torch.nan_to_num(errors.double(), nan=0.0, posinf=0.0).square()
    if not bool(chance.any()):
        raise ValueError(f"none of {len(errors)} rows has a finite error above 0 to resample at; pass training rows")
    generator = torch.Generator().manual_seed(seed)
    possible = int((chance > 0).sum())
    chosen = torch.multinomial(chance.cpu(), min(possible, n_dead), replacement=False, generator=generator)
    if len(chosen) < n_dead:
        more = torch.multinomial(chance.cpu(), n_dead - len(chosen), replacement=True, generator=generator)
        chosen = torch.cat([chosen, more])
    own = chosen.split(each)[shards.rank]
    direction = inputs[own.to(inputs.device)].double()  # a norm of 10¹⁹ or more overflows in float32
    direction = direction / torch.linalg.vector_norm(direction, dim=1, keepdim=True).clamp_min(1e-30)
    live = ~dead
    n_live = shards.sum(live.sum())

    def live_mean(t: Tensor) -> Tensor:
        return shards.sum(t[live].double().sum()) / n_live

    def live_norm(W: Tensor) -> Tensor:
        return live_mean(torch.linalg.vector_norm(W, dim=1)) if n_live else direction.new_ones(())

    norm = direction.new_ones(()) if sae.decoder_norm == "unit" else live_norm(sae.W_dec)
    if sae.W_enc is not None:
        sae.W_enc[latents] = (direction * (encoder_norm * live_norm(sae.W_enc))).to(sae.W_enc.dtype)
    sae.W_dec[latents] = (direction * norm).to(sae.W_dec.dtype)
    for name, start in {"b_enc": torch.zeros_like(sae.b_enc), **sae.activation.new_parameters(sae.d_sae)}.items():
        parameter, first = getattr(sae, name), start.to(sae.W_dec.device)[latents]
        if sae.activation.from_data and n_live:  # where it started no longer fits
            first = live_mean(parameter)
        parameter[latents] = first.to(parameter.dtype)
    sae.tokens_since_fired[latents] = 0
    if step is not None:
        step.forget_rows_(latents)
    return n_dead


def _errors(sae: SparseAutoencoder, blocks: Iterable[Tensor], batch_size: int) -> tuple[Tensor, Tensor]:
    """The encoder's inputs (n, d_in) and the squared error of each token (n,), in eval mode."""
    was_training = sae.training
    sae.eval()
    inputs, errors = [], []
    try:
        for block in sae.same_blocks(blocks):
            for x in block.reshape(-1, sae.d_in).to(sae.W_dec.dtype).split(batch_size):
                ready = sae.inputs(x)
                recon = sae.norm.normalize(sae(x).recon, ready.stats)
                inputs.append(ready.target - sae.b_dec)
                errors.append((recon - ready.target).double().square().sum(-1))
    finally:
        sae.train(was_training)
    if not inputs:
        raise ValueError("resampling got no rows, expected some of the training data")
    return torch.cat(inputs), torch.cat(errors)
