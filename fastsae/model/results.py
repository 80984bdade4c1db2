"""What a forward pass of a SparseAutoencoder gives: to its caller, and to the training steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from fastsae.codes import SparseCodes
from fastsae.model.norm import TokenStats


class ForwardResult(NamedTuple):
    """What `sae(x)` returns.

    loss: 0-d, what to minimize; recon (*batch, d_out) in the units of the target; codes: the active latents; losses:
    the loss's parts before their coefficients: "mse" or "fvu"; of a rule with several reconstructions "nested", their
    weighted sum; of one with a penalty "sparsity"; of Gated "gate"; and in training "aux" or "ghost" where the module
    has them.
    """

    loss: Tensor
    recon: Tensor
    codes: SparseCodes
    losses: dict[str, Tensor]


class Inputs(NamedTuple):
    """The prepared inputs: x normalized, encoder_input = x - b_dec (pre-bias), target normalized, and the statistics
    that undo the normalization."""

    x: Tensor
    encoder_input: Tensor
    target: Tensor
    stats: TokenStats | None


@dataclass(eq=False)
class Objective:
    """A forward pass and its loss, before the caller's result is built from it.

    loss and losses: 0-d float64. error (N, d_out) = recon - target, normalized. codes: None if all latents were
    computed densely. counts (M,) int64: on how many tokens each latent was active; active: their sum. dead (M,) bool:
    after this batch. squares: of the error, 0-d. redone: tokens encoded twice, or None. count(made) counts the batch if
    the step was made (0-d bool); unless `for_step`, the backward pass calls it. overflow: of an SAE with a `room`,
    whether a threshold rule's code did not fit (0-d bool): then none of this holds. With several processes under
    DistributedDataParallel, counts are over all of them.
    """

    ready: Inputs
    loss: Tensor
    losses: dict[str, Tensor]
    error: Tensor
    codes: SparseCodes | None
    counts: Tensor
    dead: Tensor
    squares: Tensor
    redone: Tensor | None
    count: Callable[[Tensor], None]
    overflow: Tensor | None = None

    @property
    def active(self) -> Tensor:
        return self.counts.sum()
