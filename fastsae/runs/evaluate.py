"""How good a sparse autoencoder is on rows it was not trained on.

    mse  = mean_n ‖x̂_n - x_n‖²                                   (summed over d, as the training loss)
    fvu  = Σ_n ‖x_n - x̂_n‖² / Σ_n ‖x_n - x̄‖²                     (x̄: the mean of *all* rows, not of a batch)
    l0   = mean_n #{i : latent i is active on n}
    density_i = share of the tokens on which latent i is active
    fvu_per_token = mean_n ‖x_n - x̂_n‖² / ‖x_n - x̄‖²             (tokens at x̄ itself are left out)
    explained variance, whole and per token = 1 - fvu, 1 - fvu_per_token

The whole fvu weights a token by its squared distance from the mean, so a few huge rows dominate it. Per token, all
tokens have the same weight.
All are in the units of the rows, even if the module normalizes its input (its training loss is then in other units).
Two passes over the rows in batches, the first for x̄; sums in float64; memory is one batch's codes and a few vectors of
M: no (N, M).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsae.atomic import write_json
from fastsae.codes import SparseCodes
from fastsae.model.calibrate import blocks_of

if TYPE_CHECKING:
    from fastsae.model.sae import SparseAutoencoder


@dataclasses.dataclass(frozen=True)
class DensityHistogram:
    """Latents counted by log10 of their density; latents that never fired are counted separately."""

    edges: tuple[float, ...]
    """log10 densities, ascending, one more than there are bins."""
    counts: tuple[int, ...]
    """Latents per bin; the last bin includes its right edge."""
    never: int
    """Latents active on no token."""


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """What `evaluate` measures. Ratios are plain numbers (0.24 is 24 %)."""

    n_tokens: int
    mse: float
    fvu: float
    l0: float
    dead_share: float
    """Share of the latents active on none of these tokens. It falls as n_tokens grows: compare equal n_tokens."""
    cosine: float
    """Mean over tokens of cos(x, x̂); a row of norm 0 counts as 0."""
    norm_ratio: float
    """Mean over tokens of ‖x̂‖ / ‖x‖, without tokens of norm 0; below 1 is shrinkage."""
    density: Tensor
    """(M,) float64 on the CPU."""
    density_histogram: DensityHistogram
    explained_variance: float = math.nan
    """1 - fvu."""
    fvu_per_token: float = math.nan
    """Mean over tokens of ‖x - x̂‖² / ‖x - x̄‖². NaN if the rows came as an iterator, which gives x̄ too late."""
    explained_variance_per_token: float = math.nan
    """1 - fvu_per_token."""

    def to_json(self, *, with_density: bool = False) -> dict[str, Any]:
        """A dictionary for json.dumps; the (M,) densities only on request, since M may be large."""
        record = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "density"}
        record["density_histogram"] = dataclasses.asdict(self.density_histogram)
        if with_density:
            record["density"] = self.density.tolist()
        # JSON has no NaN or infinity: an undefined value (the fvu of equal rows) is null.
        return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}

    def write(self, path: str | Path, *, with_density: bool = False, **extra: Any) -> None:
        """Writes `extra` and to_json() as one JSON object to a file."""
        record = {**extra, **self.to_json(with_density=with_density)}
        write_json(Path(path), record)


def active_entries(codes: SparseCodes) -> tuple[Tensor, Tensor, Tensor]:
    """The occupied slots of a code as (token int64, latent int64, act), each (nnz,), tokens ascending.

    A fixed-K slot is occupied where its act is not 0 (NaN counts); a ragged one where the offsets say.
    """
    if codes.offsets is not None:
        counts = codes.offsets.diff()
        token = torch.repeat_interleave(torch.arange(len(counts), dtype=torch.int64, device=counts.device), counts)
        nnz = token.shape[0]
        return token, codes.indices[:nnz].long(), codes.acts[:nnz]
    acts, indices = codes.flatten().acts, codes.flatten().indices
    token, slot = torch.nonzero(acts != 0, as_tuple=True)
    return token, indices[token, slot].long(), acts[token, slot]


def density_histogram(density: Tensor, n_tokens: int, bins_per_decade: int = 4) -> DensityHistogram:
    """Counts latents by log10 density, from the smallest density that n_tokens can show (1 / n_tokens) up to 1."""
    decades = max(1, math.ceil(math.log10(max(n_tokens, 2))))
    n_bins = decades * bins_per_decade
    edges = [-decades + i / bins_per_decade for i in range(n_bins + 1)]
    fired = density[density > 0]
    # Rounding must not move a density of exactly 10^-d into the bin below: nudge, then clamp.
    bins = ((fired.double().log10() + decades) * bins_per_decade + 1e-9).floor().long().clamp(0, n_bins - 1)
    counts = torch.bincount(bins, minlength=n_bins).tolist()
    return DensityHistogram(tuple(edges), tuple(int(c) for c in counts), int(density.numel() - fired.numel()))


class _CenteredSum:
    """Σ_n ‖x_n - x̄‖² of a stream, float64, merging batches by Chan, Golub & LeVeque (1979).

    Σ‖x‖² - N‖x̄‖² would cancel: in a few dimensions of a residual stream, the mean is far larger than the spread.
    """

    def __init__(self) -> None:
        self.n = 0
        self.mean = torch.zeros((), dtype=torch.float64, device="cpu")  # placeholder; the first `add` replaces it
        self.total = 0.0

    def add(self, x: Tensor) -> None:
        """Adds a batch (n, D) of float64."""
        n = x.shape[0]
        mean = x.mean(0)
        self.total += float((x - mean).square().sum())
        if self.n == 0:
            self.n, self.mean = n, mean
            return
        gap = mean - self.mean
        self.total += float(gap.square().sum()) * self.n * n / (self.n + n)
        self.n += n
        self.mean = self.mean + gap * (n / self.n)


def evaluate(
    sae: SparseAutoencoder,
    rows: Tensor | Iterable[Tensor],
    *,
    targets: Tensor | Iterable[Tensor] | None = None,
    batch_size: int = 4096,
    bins_per_decade: int = 4,
) -> EvalResult:
    """EvalResult of `sae` on rows (..., d_in), or on an iterable of such blocks (shards), streamed.

    rows        any float dtype, any device; moved to the module's device and dtype batch by batch. For rows that can
                be read only once (an iterator) there are no measures per token.
    targets     the reconstruction's targets (..., d_out), in the order of rows; None: the rows themselves.
    Runs in eval mode (no dead-latent counts), then restores the mode; without autograd. Processes that share the SAE
    (fastsae.parallel) all call it with the same rows, and have the same result.
    Raises ValueError: no rows at all; a NaN or infinity in the rows (naming the row); targets that do not match.
    """
    if batch_size < 1:
        raise ValueError(f"evaluate: batch_size must be at least 1, got {batch_size}")
    like = sae.W_dec
    counts = torch.zeros(sae.d_sae, dtype=torch.int64, device=like.device)
    spread = _CenteredSum()
    sse = cosine = ratio = per_token = 0.0
    n_tokens = n_nonzero = n_apart = 0
    center = _center(rows if targets is None else targets, batch_size, like)
    target_batches = None if targets is None else iter(sae.same_blocks(blocks_of(targets, batch_size)))
    was_training = sae.training
    sae.eval()
    try:
        with torch.no_grad():
            for batch in sae.same_blocks(blocks_of(rows, batch_size)):
                x = batch.to(like.dtype)
                y = x if target_batches is None else _next_target(target_batches, batch, like)
                _require_finite(batch, n_tokens, "rows")
                out = sae(x) if target_batches is None else sae(x, y)
                truth, recon = y.double(), out.recon.double()
                squares = (recon - truth).square().sum(-1)
                sse += float(squares.sum())
                spread.add(truth)
                if center is not None:
                    apart = (truth - center).square().sum(-1)
                    per_token += float((squares / apart)[apart > 0].sum())
                    n_apart += int((apart > 0).sum())
                norm, recon_norm = truth.norm(dim=-1), recon.norm(dim=-1)
                nonzero = norm > 0
                floor = torch.finfo(torch.float64).tiny
                cosine += float(((truth * recon).sum(-1) / (norm * recon_norm).clamp_min(floor)).sum())
                ratio += float((recon_norm[nonzero] / norm[nonzero]).sum())
                counts += torch.bincount(active_entries(out.codes)[1], minlength=sae.d_sae)
                n_tokens += x.shape[0]
                n_nonzero += int(nonzero.sum())
    finally:
        sae.train(was_training)
    if n_tokens == 0:
        raise ValueError("evaluate: got no rows, expected at least one; is the held-out set empty?")
    if sae.placement is not None:
        counts = torch.cat(sae.placement.latents.gather(counts))
    density = counts.cpu().double() / n_tokens
    fvu = sse / spread.total if spread.total > 0 else math.nan
    fvu_per_token = per_token / n_apart if n_apart else math.nan
    return EvalResult(
        n_tokens=n_tokens,
        mse=sse / n_tokens,
        fvu=fvu,
        l0=float(counts.sum()) / n_tokens,
        dead_share=float((counts == 0).double().mean()),
        cosine=cosine / n_tokens,
        norm_ratio=ratio / n_nonzero if n_nonzero else math.nan,
        density=density,
        density_histogram=density_histogram(density, n_tokens, bins_per_decade),
        explained_variance=1 - fvu,
        fvu_per_token=fvu_per_token,
        explained_variance_per_token=1 - fvu_per_token,
    )


def _center(rows: Tensor | Iterable[Tensor], batch_size: int, like: Tensor) -> Tensor | None:
    """x̄ (d,) float64 of rows as the module sees them; None if they can be read once only, or there are none."""
    if isinstance(rows, Iterator):
        return None
    mean, n = torch.zeros((), dtype=torch.float64, device=like.device), 0
    for batch in blocks_of(rows, batch_size):
        n += batch.shape[0]
        x = batch.to(like.device, like.dtype).double()
        mean = mean + (x - mean).sum(0) / n
    return mean if n else None


def _next_target(batches: Iterator[Tensor], rows: Tensor, like: Tensor) -> Tensor:
    target = next(batches, None)
    if target is None or target.shape[0] != rows.shape[0]:
        got = "none left" if target is None else f"{target.shape[0]}"
        raise ValueError(f"evaluate: expected a target for every row, got {rows.shape[0]} rows and targets {got}")
    return target.to(like.device, like.dtype)


def _require_finite(batch: Tensor, offset: int, name: str) -> None:
    bad = ~torch.isfinite(batch).all(-1)
    if bad.any():
        row = offset + int(bad.nonzero()[0])
        raise ValueError(f"evaluate: {name} hold {int(bad.sum())} rows with NaN or infinity, the first is row {row}")
