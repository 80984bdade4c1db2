"""How well scores find board state: areas under ROC curves of all pairs at once, coverage, board reconstruction.

A pair is a square and what stands on it: column 64·class + square of `positives`. Whatever is chosen is chosen on one
half of the games ("selected") and measured on the other ("held_out").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastsae.systems.othello import game

FOUND = 0.9
"""A pair counts as found above this area, or above this F1."""
THRESHOLDS = tuple(i / 10 for i in range(10))
PRECISION, FIRINGS = 0.95, 10
PIECE = 64
"""Columns of scores ranked at a time, which bounds the memory."""


def positives(labels: Tensor) -> Tensor:
    """bool (n, 192) from labels (n, 64)."""
    return torch.cat([labels == value for value in range(len(game.CLASSES))], 1)


def ranks(scores: Tensor) -> Tensor:
    """The rank from 1 of each entry in its row (C, n), tied entries all with their mean rank: float64."""
    ordered, order = scores.sort(1)
    n = scores.shape[1]
    places = torch.arange(n, device=scores.device).expand_as(order)
    differs = ordered[:, 1:] != ordered[:, :-1]
    edge = differs.new_ones(len(scores), 1)
    first = places.where(torch.cat([edge, differs], 1), 0).cummax(1).values
    last = places.where(torch.cat([differs, edge], 1), n).flip(1).cummin(1).values.flip(1)
    return torch.empty_like(scores, dtype=torch.float64).scatter_(1, order, (first + last).double() / 2 + 1)


def auroc(scores: Tensor, positive: Tensor) -> Tensor:
    """(C, P) float64: of each column of scores (n, C) for each column of positive (n, P), NaN where all or none are.

        (Σ⁺ rank - n⁺(n⁺ + 1)/2) / (n⁺ n⁻)

    the probability that a positive scores higher than a negative, a tie counting half. One sort for each column, one
    product with the labels. Source: Mann & Whitney 1947; Hanley & McNeil 1982.
    """
    wide = positive.double()
    n_1 = wide.sum(0)
    n_0 = len(wide) - n_1
    sums = torch.cat([ranks(piece.T.contiguous()) @ wide for piece in scores.split(PIECE, 1)])
    # 0 / 0 where a class is always or never there: the middle four squares are never empty.
    return (sums - n_1 * (n_1 + 1) / 2) / (n_1 * n_0)


@dataclass(frozen=True)
class Half:
    """Boards of half the games: scores (n, M), one row a board, and positive, bool (n, 192)."""

    scores: Tensor
    positive: Tensor


def areas(selection: Half, held_out: Half) -> tuple[Tensor, Tensor, Tensor]:
    """For each pair: the latent with the largest area on `selection`, that area, and its area on `held_out`: (192,).

    Latent -1 and areas NaN where a pair has no area.
    """
    best = auroc(selection.scores, selection.positive).nan_to_num(-1.0).max(0)
    latents, column = best.indices.unique(return_inverse=True)
    again = auroc(held_out.scores[:, latents], held_out.positive)
    area = again.gather(0, column[None]).squeeze(0)
    none = best.values < 0
    return best.indices.where(~none, -1), best.values.where(~none, torch.nan), area.where(~none, torch.nan)


def own_areas(half: Half) -> Tensor:
    """(192,): of each column of scores (n, 192), a probe's, for its own pair."""
    pairs = range(half.positive.shape[1])
    found = [auroc(half.scores[:, [i]], half.positive[:, [i]]).squeeze() for i in pairs]
    return torch.stack(found)


def found(area: Tensor) -> Tensor:
    """Which areas count as found; NaN does not."""
    return area > FOUND


# -- coverage and board reconstruction (Karvonen et al. 2024, arXiv 2408.00113), on the pairs of a stone ---------------


def _f1(hits: Tensor, said: Tensor, true: Tensor) -> Tensor:
    return 2 * hits / (said + true).clamp(min=1)


def _stones(half: Half) -> Tensor:
    """float32 (n, 128): own and enemy. Their sums are whole numbers below 2²⁴, hence exact."""
    return half.positive[:, game.SQUARES :].float()


def board_scores(selection: Half, held_out: Half) -> dict[str, dict[str, float]]:
    """Coverage and reconstruction, each with its threshold, chosen on `selection`, and its value on both halves.

    A latent is on above t times its maximum on `selection`. coverage: the mean over pairs of the best latent's F1;
    above: pairs with an F1 above .9 on `held_out`. reconstruction: a pair is said to be there if any latent is on that
    had a precision of .95 or more for it on `selection`, in ten firings or more; F1 over all pairs and boards.
    """
    top = selection.scores.amax(0)
    true, true_held_out = _stones(selection), _stones(held_out)
    coverage: dict[str, float] = {"selected": -1.0}
    reconstruction: dict[str, float] = {"selected": -1.0}
    for t in THRESHOLDS:
        on, on_held_out = ((half.scores > t * top).float() for half in (selection, held_out))
        hits, firings = on.T @ true, on.sum(0)[:, None]
        best = _f1(hits, firings, true.sum(0)).max(0)
        if (mean := float(best.values.mean())) > coverage["selected"]:
            latents, column = best.indices.unique(return_inverse=True)
            chosen = on_held_out[:, latents]
            again = _f1(chosen.T @ true_held_out, chosen.sum(0)[:, None], true_held_out.sum(0))
            values = again.gather(0, column[None])
            above = int((values > FOUND).sum())
            coverage = {"selected": mean, "held_out": float(values.mean()), "above": above, "threshold": t}
        precise = ((hits >= PRECISION * firings) & (firings >= FIRINGS)).float()
        if (value := _pooled(on @ precise > 0, true)) > reconstruction["selected"]:
            again_value = _pooled(on_held_out @ precise > 0, true_held_out)
            reconstruction = {"selected": value, "held_out": again_value, "threshold": t}
    return {
        name: {key: round(value, 4) for key, value in one.items()}
        for name, one in (("coverage", coverage), ("reconstruction", reconstruction))
    }


def _pooled(said: Tensor, true: Tensor) -> float:
    """F1 over all pairs and boards."""
    return float(_f1((said * true).double().sum(), said.double().sum(), true.double().sum()))
