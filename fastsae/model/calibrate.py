"""Thresholds from data: the value that a given share of all pre-acts exceeds, in one pass and bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fastsae import reference
from fastsae.model.axis import Axis
from fastsae.model.parameters import Parameters
from fastsae.model.placement import axes_of
from fastsae.model.rules.base import Sample
from fastsae.reference import wide

PIECE = 2**22
"""Pre-acts (tokens times latents) that are computed at a time."""
DROPPED = 11
"""Low bits of a float32 that binning drops: 12 bits of mantissa remain, so a bin's relative width is at most 1/4096."""


class Tail:
    """Counts numbers above 0 by the leading bits of their float32, which ascend with the number.

    2²⁰ counters, 8 MB, however many numbers are added; their order does not matter.
    """

    def __init__(self, device: torch.device):
        self.counts = torch.zeros(2 ** (31 - DROPPED), dtype=torch.int64, device=device)

    def add(self, numbers: Tensor) -> None:
        """Counts finite numbers of any shape; numbers <= 0 go into the lowest bin, which `bar` never reaches."""
        bins = (numbers.float().clamp_min(0).flatten().view(torch.int32) >> DROPPED).long()
        if bins.device.type == "cpu":
            self.counts += torch.bincount(bins, minlength=len(self.counts))
        else:
            self.counts.scatter_add_(0, bins, torch.ones_like(bins))

    def bar(self, wanted: float, shards: Axis | None = None) -> float:
        """The bin edge for which the count of larger numbers is nearest to `wanted`; 0 if fewer numbers are above 0.

        shards: the processes whose counts are added; None: this one alone.
        """
        counts = self.counts if shards is None else shards.sum(self.counts)
        above = counts[1:].flip(0).cumsum(0).flip(0)  # above[b]: how many are in bin b + 1 or higher
        if wanted >= int(above[0]):
            return 0.0
        edge = int((above.double() - wanted).abs().argmin()) + 1
        # The float just below the bin's smallest number, since active means strictly above.
        return float(torch.tensor((edge << DROPPED) - 1, dtype=torch.int32, device="cpu").view(torch.float32))


def blocks_of(rows: Tensor | Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Rows (..., D), or an iterable of such blocks, as batches (n, D) that are not empty. Raises ValueError."""
    for block in [rows] if isinstance(rows, Tensor) else rows:
        if block.ndim < 2:
            raise ValueError(f"rows have shape {tuple(block.shape)}, expected (..., D); for one row pass row[None]")
        for batch in block.flatten(0, -2).split(batch_size):
            if batch.shape[0]:
                yield batch


def pre_acts(sae: Parameters, encoder_input: Tensor, b: Tensor) -> Iterator[Tensor]:
    """x W_encᵀ + b of x (n, D), the same rows in all processes that share the SAE, and b (M,), in pieces of tokens,
    float32 at least.

    Raises ValueError if one is not finite, in every process.
    """
    W, b = wide(sae.encoder_weight), wide(b)
    for piece in wide(encoder_input).split(max(1, PIECE // sae.n_latents)):
        pre = torch.addmm(b, piece, W.mT)
        finite = torch.isfinite(pre).all()
        if not bool(finite if sae.placement is None else sae.placement.everywhere(finite)):
            raise ValueError("a pre-act is not finite on the rows to calibrate on; rows and weights must be finite")
        yield pre


def start_rule_(sae: Parameters, encoder_input: Tensor, goal: Tensor, zero: float) -> None:
    """`Activation.start`, `stretch` and `start_weight` from encoder_input (n, d_in) and goal (n, d_out), n > 1.

    goal: what A W_dec should be. zero: the loss of A = 0. W_enc is rescaled too: at full size, many latents with random
    directions add up to several times the goal, and the first hundred steps would only shrink them. Tied rows keep
    their norm, and so do all rows if the rule was given a threshold, because that is in the units of the acts.
    """
    rule, W_dec, (_, shards) = sae.rule, wide(sae.W_dec), axes_of(sae.placement)
    rule.start(sae.rule_state, _sample(sae, encoder_input))
    if sae.W_enc is not None and rule.rescales:
        along, square = 0.0, 0.0
        for (_, acts, _), here in _acts(sae, encoder_input):
            recon = shards.sum(acts @ W_dec)
            along += float((recon * goal[here]).sum(dtype=torch.float64))
            square += float(recon.square().sum(dtype=torch.float64))
        factor = along / square if square > 0 else 1.0
        if factor > 0:
            sae.W_enc.mul_(factor)
            rule.stretch(sae.rule_state, factor)
    penalty = torch.zeros((), dtype=torch.float64, device=W_dec.device)
    norms = reference.decoder_norms(W_dec, sae.layers).unsqueeze(0)
    for (pre, found, rows), _ in _acts(sae, encoder_input):
        summed = rule.sparsity(pre, found, rows, norms)
        penalty += 0.0 if summed is None else summed.sum(dtype=torch.float64)
    mean = shards.sum(penalty).cpu() / len(encoder_input)
    rule.start_weight(sae.rule_state, zero, float(rule.penalty(mean)))


def _acts(sae: Parameters, x: Tensor) -> Iterator[tuple[tuple[Tensor, Tensor, dict[str, Tensor]], slice]]:
    """Pre-acts, acts and per-latent rows of x (n, d_in), in pieces, each with its position in x."""
    rule, start = sae.rule, 0
    rows = {name: t.unsqueeze(0) for name, t in rule.per_latent(sae.rule_state).items()}
    for pre in pre_acts(sae, x, sae.b_enc):
        yield (pre, rule.activate(pre, rows), rows), slice(start, start + len(pre))
        start += len(pre)


def _sample(sae: Parameters, encoder_input: Tensor) -> Sample:
    """Statistics of the pre-acts of encoder_input (n, d_in), n > 1, with the current weights."""
    n, b = encoder_input.shape[0], sae.b_enc.detach().clone()
    first, second = (torch.zeros(sae.d_sae, dtype=torch.float64, device=b.device) for _ in range(2))
    for pre in pre_acts(sae, encoder_input, b):
        first += pre.sum(0, dtype=torch.float64)
    mean = first / n
    for pre in pre_acts(sae, encoder_input, b):
        second += (pre - mean.to(pre.dtype)).square().sum(0, dtype=torch.float64)
    std = (second / n).sqrt()

    def bar(l0: float) -> float:
        tail, divisor = Tail(b.device), torch.where(std > 0, std, torch.inf)
        for pre in pre_acts(sae, encoder_input, b):
            tail.add((pre - mean.to(pre.dtype)) / divisor.to(pre.dtype))
        return tail.bar(l0 * n, axes_of(sae.placement)[1])

    return Sample(mean, std, bar)
