"""The texts that activate a latent most: which latents, which passages, and how strongly at each token.

One pass of the encoder over the rows; memory follows the number of stored activations. Nothing is chosen by hand:
latents are drawn at random within equal strata of density rank, passages are the strongest, one per window of text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..evaluate import active_entries

if TYPE_CHECKING:
    from ..sae import SparseAutoencoder

Decode = Callable[[Sequence[int]], str]


@dataclasses.dataclass(frozen=True)
class RowTexts:
    """The text behind N activation rows: row n was made at `position[n]` of `windows[window[n]]`."""

    windows: Sequence[Tensor]
    """Token ids of each window of text, as the model read it."""
    window: Tensor
    """(N,) int64."""
    position: Tensor
    """(N,) int64."""
    decode: Decode
    """Token ids to text."""


@dataclasses.dataclass(frozen=True)
class Span:
    """A piece of text of equal shade."""

    text: str
    act: float | None
    """The latent's activation; None where the token is not among the rows (dropped when they were made)."""
    share: float = 0.0
    """act over the latent's maximum, 0 to 1."""


@dataclasses.dataclass(frozen=True)
class Context:
    """One passage around a token on which the latent is strong."""

    peak: float
    spans: list[Span]

    @property
    def peak_text(self) -> str:
        return f"{self.peak:.3g}"


@dataclasses.dataclass(frozen=True)
class LatentCard:
    """What the page shows of one latent."""

    index: int
    density: float
    max_act: float
    contexts: list[Context]
    top_tokens: list[str]
    """The distinct tokens at the peaks, strongest first."""

    @property
    def density_text(self) -> str:
        return f"{self.density:.2%}" if self.density >= 1e-4 else f"{self.density:.1e}"

    @property
    def max_text(self) -> str:
        return f"{self.max_act:.3g}"


def pick_spread(density: Tensor, count: int, seed: int = 0) -> list[int]:
    """`count` latents, densest first: one drawn uniformly from each of `count` equal strata of density rank.

    Latents that never fired are left out; fewer than `count` are all returned. Deterministic in (density, seed).
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


def token_pieces(ids: Sequence[int], decode: Decode) -> list[str]:
    """The text that each token adds to the text of those before it; the pieces joined are decode(ids).

    A character cut over several tokens (bytes of UTF-8) is given whole to the token that completes it.
    """
    pieces: list[str] = []
    before = ""
    for end in range(1, len(ids) + 1):
        text = decode(ids[:end])
        if end < len(ids) and (text.endswith("\ufffd") or not text.startswith(before)):
            pieces.append("")
            continue
        pieces.append(text[len(before) :] if text.startswith(before) else decode(ids[end - 1 : end]))
        before = text
    return pieces


def latent_cards(
    sae: SparseAutoencoder,
    rows: Iterable[Tensor],
    texts: RowTexts,
    *,
    latents: int = 24,
    contexts: int = 8,
    radius: int = 20,
    seed: int = 0,
) -> list[LatentCard]:
    """Cards of a spread sample of latents, densest first.

    rows    blocks (n, d_in) that together are the N rows of `texts`, in order.
    radius  tokens shown on either side of the strongest one.
    Raises ValueError where rows and texts differ in number.
    """
    entries = _encode_all(sae, rows)
    n_rows = entries.n_rows
    if not n_rows == len(texts.window) == len(texts.position):
        raise ValueError(f"got {n_rows} rows but texts for {len(texts.window)}; they must be the same rows in order")
    if n_rows == 0:
        return []
    density = torch.bincount(entries.latent, minlength=sae.d_sae).double() / n_rows
    chosen = pick_spread(density, latents, seed)
    acts = entries.columns(chosen, sae.d_sae)  # (N, len(chosen)): a handful of latents, not M

    row_of = _row_table(texts)
    n_windows = len(texts.windows)
    cards = []
    for slot, index in enumerate(chosen):
        column = acts[:, slot]
        peak_of_window = torch.zeros(n_windows).scatter_reduce(0, texts.window, column, "amax")
        best = torch.sort(peak_of_window, descending=True, stable=True)
        strongest = float(best.values[0])
        made = []
        tops: dict[str, None] = {}
        for peak, window in zip(best.values[:contexts].tolist(), best.indices[:contexts].tolist(), strict=True):
            if peak <= 0:
                break
            context, top = _context(texts, row_of[window], column, window, peak, strongest, radius)
            made.append(context)
            tops.setdefault(top)
        cards.append(LatentCard(index, float(density[index]), strongest, made, list(tops)[:5]))
    return cards


@dataclasses.dataclass(frozen=True)
class _Entries:
    """The stored activations of all rows: parallel (nnz,) vectors."""

    n_rows: int
    row: Tensor
    latent: Tensor
    act: Tensor

    def columns(self, latents: list[int], d_sae: int) -> Tensor:
        """(N, len(latents)) float32: the acts of these latents, 0 where not active."""
        slot_of = torch.full((d_sae,), -1)
        slot_of[torch.tensor(latents, dtype=torch.long)] = torch.arange(len(latents))
        slots = slot_of[self.latent.long()]
        keep = slots >= 0
        dense = torch.zeros(self.n_rows, len(latents))
        dense[self.row[keep].long(), slots[keep]] = self.act[keep]
        return dense


def _encode_all(sae: SparseAutoencoder, blocks: Iterable[Tensor], batch_size: int = 4096) -> _Entries:
    like = next(sae.parameters())
    rows, latents, acts, n = [], [], [], 0
    was_training = sae.training
    sae.eval()
    try:
        with torch.no_grad():
            for block in blocks:
                for batch in block.split(batch_size):
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


def _row_table(texts: RowTexts) -> list[Tensor]:
    """Per window (its length,): the row made at each position, -1 where there is none."""
    lengths = torch.tensor([len(w) for w in texts.windows])
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    flat = torch.full((int(starts[-1]),), -1)
    flat[starts[texts.window] + texts.position] = torch.arange(len(texts.window))
    return list(flat.split(lengths.tolist()))


def _context(
    texts: RowTexts, row_of: Tensor, column: Tensor, window: int, peak: float, strongest: float, radius: int
) -> tuple[Context, str]:
    """The passage around a window's peak, and the text of the token at the peak."""
    inside = row_of >= 0
    acts = torch.where(inside, column[row_of.clamp_min(0)], -1.0)
    at = int(acts.argmax())
    low, high = max(0, at - radius), min(len(acts), at + radius + 1)
    ids = [int(t) for t in texts.windows[window][low:high]]
    pieces = token_pieces(ids, texts.decode)
    spans: list[Span] = []
    for piece, act in zip(pieces, acts[low:high].tolist(), strict=True):
        if act > 0:
            spans.append(Span(visible(piece), act, max(0.01, min(1.0, act / strongest))))
            continue
        value = None if act < 0 else 0.0
        if spans and spans[-1].act == value and spans[-1].share == 0:
            spans[-1] = Span(spans[-1].text + visible(piece), value)
        else:
            spans.append(Span(visible(piece), value))
    return Context(peak, spans), visible(pieces[at - low])


def visible(text: str) -> str:
    """Text with line breaks and control characters as signs, so that a passage stays one paragraph."""
    text = text.replace("\r\n", "⏎").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() or c == " " else "·" for c in text)
