"""The texts that activate a latent most: which latents, which passages, and how strongly at each token.

It encodes the rows once, then the passages that are shown. Latents are named by the caller, or drawn at random from
equal strata of density rank; passages are the strongest that do not overlap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastsae.data.contexts import Context as TokenContext
from fastsae.report.html import visible
from fastsae.runs.evaluate import active_entries

if TYPE_CHECKING:
    from fastsae.data.shards import ShardSource
    from fastsae.model.sae import SparseAutoencoder
    from fastsae.report.promoted import Promoted

RUN_ROWS = 4096
"""Contiguous rows per read when only a part of the rows is scanned: mostly whole windows of text."""


@dataclasses.dataclass(frozen=True)
class Span:
    """A piece of text of one shade."""

    text: str
    act: float | None
    """The latent's activation; None if the token's row was not stored (first position, norm filter)."""
    share: float = 0.0
    """act over the latent's maximum, 0 to 1."""


@dataclasses.dataclass(frozen=True)
class Passage:
    """The text around a token on which the latent is strong."""

    peak: float
    spans: list[Span]

    @property
    def peak_text(self) -> str:
        return f"{self.peak:.3g}"


@dataclasses.dataclass(frozen=True)
class LatentCard:
    """One latent on the page."""

    index: int
    density: float
    max_act: float
    passages: list[Passage]
    top_tokens: list[str]
    """The distinct tokens at the peaks, strongest first."""
    promoted: Promoted | None = None

    @property
    def density_text(self) -> str:
        return f"{self.density:.2%}" if self.density >= 1e-3 else f"{self.density:.4%}"

    @property
    def max_text(self) -> str:
        return f"{self.max_act:.3g}"


def pick_spread(density: Tensor, count: int, seed: int = 0) -> list[int]:
    """`count` latents, densest first: one drawn uniformly from each of `count` equal strata of density rank.

    Latents that never fired are left out; if fewer than `count` fired, these are all. Deterministic in (density, seed).
    """
    ranked = torch.argsort(density, descending=True, stable=True)
    ranked = ranked[density[ranked] > 0]
    n = len(ranked)
    if n <= count:
        return [int(i) for i in ranked]
    generator = torch.Generator().manual_seed(seed)
    picks = []
    for stratum in range(count):
        low, high = stratum * n // count, (stratum + 1) * n // count
        picks.append(int(ranked[low + int(torch.randint(high - low, (), generator=generator))]))
    return picks


def check_latents(latents: Sequence[int], d_sae: int) -> None:
    """Raises ValueError for a latent that is not one of d_sae."""
    for latent in latents:
        if not 0 <= latent < d_sae:
            raise ValueError(f"no latent {latent}: the autoencoder has latents 0 to {d_sae - 1}")


def spread_rows(n: int, most: int) -> list[range]:
    """Ranges of row ids, ascending, with at most `most` ids: all n, or runs of RUN_ROWS spread evenly over them."""
    if n <= most:
        return [range(n)] if n else []
    size = min(RUN_ROWS, most)
    runs = most // size
    starts = [i * (n - size) // max(runs - 1, 1) for i in range(runs)]
    return [range(start, start + size) for start in starts]


def latent_cards(
    sae: SparseAutoencoder,
    source: ShardSource,
    *,
    latents: Sequence[int] | None = None,
    sample: int = 24,
    passages: int = 8,
    width: int = 20,
    seed: int = 0,
    max_rows: int = 131_072,
) -> tuple[list[LatentCard], int]:
    """Cards, and the number of rows that were scanned.

    latents   the latents, in this order; one that never fired has density 0 and no passage. None: a spread sample of
              those that fired, `sample` of them, densest first.
    width     tokens shown on either side of the strongest one.
    max_rows  rows scanned at most (held-out ones come last); memory is 12 bytes for each active latent.
    Raises ValueError if the rows were stored without their text, or for a latent that the SAE does not have.
    """
    if latents is not None:
        check_latents(latents, sae.d_sae)
    n_rows = (source.n_tokens or 0) + len(source.held_out_ids())
    runs = spread_rows(n_rows, max_rows)
    ids = torch.cat([torch.arange(run.start, run.stop) for run in runs]) if runs else torch.empty(0, dtype=torch.long)
    scan = _encode(sae, (rows for run in runs for _, rows in source.iterate(RUN_ROWS, run)))
    if scan.n_rows == 0:
        return [], 0
    density = torch.bincount(scan.latent, minlength=sae.d_sae).double() / scan.n_rows
    chosen = pick_spread(density, sample, seed) if latents is None else list(dict.fromkeys(latents))
    strongest = scan.columns(chosen, sae.d_sae)  # (rows, len(chosen)): a handful of latents, not M

    # Neighbours of a strong token are often strong too, so consider more candidates than passages.
    best = torch.topk(strongest, min(8 * passages, scan.n_rows), dim=0)
    candidates = source.contexts(ids[best.indices.T.flatten()], width)
    each = best.values.shape[0]
    shown = [
        distinct(candidates[i * each : (i + 1) * each], best.values[:, i].tolist(), passages)
        for i in range(len(chosen))
    ]
    # Tokens of a passage may lie outside the scanned rows, so encode the passages separately.
    rows_shown = sorted({row for contexts in shown for c in contexts for row in c.rows if row >= 0})
    wanted = torch.tensor(rows_shown, dtype=torch.int64)
    acts = _encode(sae, [source.rows(wanted)]).columns(chosen, sae.d_sae)
    place = {row: i for i, row in enumerate(wanted.tolist())}
    cards = []
    for slot, index in enumerate(chosen):
        column = acts[:, slot].tolist()
        shades = [[None if row < 0 else column[place[row]] for row in context.rows] for context in shown[slot]]
        peak = float(strongest[:, slot].max())
        made = [passage(context, shade, peak) for context, shade in zip(shown[slot], shades, strict=True)]
        tops = dict.fromkeys(visible(context.tokens[context.center]) for context in shown[slot])
        cards.append(LatentCard(index, float(density[index]), peak, made, list(tops)[:5]))
    return cards, scan.n_rows


def distinct(contexts: Sequence[TokenContext], acts: Sequence[float], most: int) -> list[TokenContext]:
    """The first contexts with act > 0 that neither overlap nor repeat an earlier one.

    A repeat has the same tokens around its own (4 on either side): licences and headers recur in every file.
    """
    kept: list[TokenContext] = []
    covered: set[int] = set()
    seen: set[tuple[int, ...]] = set()
    for context, act in zip(contexts, acts, strict=True):
        if len(kept) == most or act <= 0:
            break
        around = tuple(context.token_ids[max(0, context.center - 4) : context.center + 5])
        if context.row not in covered and around not in seen:
            kept.append(context)
            covered.update(context.rows)
            seen.add(around)
    return kept


def passage(context: TokenContext, acts: Sequence[float | None], strongest: float) -> Passage:
    """The context's tokens with their acts; neighbours without an act are joined into one span."""
    spans: list[Span] = []
    for token, act in zip(context.tokens, acts, strict=True):
        text = visible(token)
        if act is not None and act > 0:
            # A share that rounds to 0 would hide that the latent is active.
            spans.append(Span(text, act, min(1.0, max(0.01, act / strongest))))
        elif spans and spans[-1].act == act:
            spans[-1] = Span(spans[-1].text + text, act)
        else:
            spans.append(Span(text, act))
    if spans:
        # A leading space would only indent the passage.
        spans[0] = dataclasses.replace(spans[0], text=spans[0].text.lstrip(" "))
    return Passage(float(acts[context.center] or 0.0), spans)


@dataclasses.dataclass(frozen=True)
class _Entries:
    """The stored activations of all rows: parallel (nnz,) vectors."""

    n_rows: int
    row: Tensor
    latent: Tensor
    act: Tensor

    def columns(self, latents: list[int], d_sae: int) -> Tensor:
        """(n_rows, len(latents)) float32: the acts of these latents, 0 where not active."""
        slot_of = torch.full((d_sae,), -1)
        slot_of[torch.tensor(latents, dtype=torch.long)] = torch.arange(len(latents))
        slots = slot_of[self.latent.long()]
        keep = slots >= 0
        dense = torch.zeros(self.n_rows, len(latents))
        dense[self.row[keep].long(), slots[keep]] = self.act[keep]
        return dense


def _encode(sae: SparseAutoencoder, blocks: Iterable[Tensor]) -> _Entries:
    like = sae.W_dec
    rows, latents, acts, n = [], [], [], 0
    was_training = sae.training
    sae.eval()
    try:
        with torch.no_grad():
            for block in blocks:
                for batch in block.split(RUN_ROWS):
                    token, latent, act = active_entries(sae.encode(batch.to(like.device, like.dtype)))
                    # int32: two thirds of the memory of a long pass is indices
                    rows.append((token + n).int().cpu())
                    latents.append(latent.int().cpu())
                    acts.append(act.float().cpu())
                    n += batch.shape[0]
    finally:
        sae.train(was_training)
    if not rows:
        empty = torch.empty(0)
        return _Entries(0, empty.int(), empty.int(), empty)
    return _Entries(n, torch.cat(rows), torch.cat(latents), torch.cat(acts))
