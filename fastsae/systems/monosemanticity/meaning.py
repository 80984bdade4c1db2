"""How much single latents mean, without a judge: by the tokens that they fire on.

The publication has a language model score activations by level; here a latent's *ten top tokens* are those on which it
is largest on one half of the rows, and the measure is the share of its activations on the other half, by tenth of its
largest, whose token is among them. Random directions, each with the bar that gives it a latent's density, stand beside.

A *concept* is a name, a token of its own; an SAE has it if one latent fires on it and little else: F1 of .5 or more. As
published, whether an SAE has a concept is a sigmoid in the logarithm of its frequency.
Source: Templeton et al. 2024 (feature completeness, specificity); the measures in place of a judge are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsae.model.sae import SparseAutoencoder
from fastsae.runs.evaluate import active_entries

TOP, LEVELS = 10, 10
LATENTS = 256
"""Latents that are looked at, the first ones with enough activations in both halves."""
LEAST = 20
"""Activations that a latent must have in each half of the rows."""
HAS = 0.5
"""F1 from which on a latent counts as a concept's."""
CONCEPTS = 200


@torch.no_grad()
def entries(sae: SparseAutoencoder, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(row, latent, activation f_i ‖W_d,i‖), each (nnz,), of rows (n, D), sorted by latent, then row."""
    norms, parts = sae.W_dec.norm(dim=1), []
    for start, batch in zip(range(0, len(rows), 4096), rows.split(4096), strict=True):
        row, latent, act = active_entries(sae.encode(batch))
        parts.append((row + start, latent, act * norms[latent]))
    row, latent, act = (torch.cat(part) for part in zip(*parts, strict=True))
    order = latent.argsort(stable=True)
    return row[order], latent[order], act[order]


def by_level(row: Tensor, act: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor] | None:
    """Of one latent: activations and those on its top tokens, (LEVELS,) each, by tenth of its largest activation.

    row, act (n,): its activations; tokens (rows,): every row's token. Rows of the first half of `tokens` choose the top
    tokens, the others count. None where a half has fewer than LEAST.
    """
    first = row < len(tokens) // 2
    if min(int(first.sum()), int((~first).sum())) < LEAST:
        return None
    kinds, which = tokens[row[first]].unique(return_inverse=True)
    largest = torch.zeros(len(kinds)).scatter_reduce(0, which, act[first].float(), "amax")
    top = kinds[largest.topk(min(TOP, len(kinds))).indices]
    counted, size = tokens[row[~first]], act[~first].float()
    level = (size / act.max() * LEVELS).ceil().long().clamp(1, LEVELS) - 1
    right = torch.isin(counted, top).float()
    return torch.bincount(level, minlength=LEVELS).float(), torch.bincount(level, right, minlength=LEVELS)


def specificity(sae: SparseAutoencoder, rows: Tensor, tokens: Tensor, seed: int = 0) -> dict[str, Any]:
    """Share of activations on top tokens by level: {"latents": [...], "random": [...], "counted": latents}.

    Each level's share is the mean over those of the latents that have activations there.
    """
    row, latent, act = entries(sae, rows)
    starts = torch.searchsorted(latent, torch.arange(sae.d_sae + 1))
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[Tensor]] = {"latents": [], "random": []}
    centred = F.normalize(rows - rows.mean(0), dim=1)
    for i in torch.randperm(sae.d_sae, generator=generator).tolist():
        mine = slice(int(starts[i]), int(starts[i + 1]))
        counts = by_level(row[mine], act[mine], tokens)
        if counts is None:
            continue
        found["latents"].append(_share(*counts))
        direction = centred @ F.normalize(torch.randn(rows.shape[1], generator=generator), dim=0)
        size, where = direction.topk(mine.stop - mine.start)
        above = by_level(where, size - size.min() + 1e-6, tokens)
        if above is not None:
            found["random"].append(_share(*above))
        if len(found["latents"]) == LATENTS:
            break
    return {
        **{name: _mean(shares) for name, shares in found.items()},
        "counted": len(found["latents"]),
    }


def _share(counted: Tensor, right: Tensor) -> Tensor:
    return right / counted  # NaN at a level without activations


def _mean(shares: Sequence[Tensor]) -> list[float | None]:
    if not shares:
        return [None] * LEVELS
    return [None if bool(v.isnan()) else round(float(v), 4) for v in torch.stack(list(shares)).nanmean(0)]


# -- concepts ---------------------------------------------------------------------------------------------------------


def names(strings: Sequence[str], counts: Tensor) -> list[int]:
    """Up to CONCEPTS tokens that are names, spread evenly over their frequency.

    A name is a word of three or more letters with a space before it and a capital, whose lower-case form is a
    twentieth as frequent at most. strings: every token's text; counts (tokens,): how often it is in the rows.
    """
    number = {text: i for i, text in enumerate(strings)}
    found = []
    for text, i in number.items():
        word = text[1:]
        if text[:1] == " " and len(word) > 2 and word.isalpha() and word.istitle() and counts[i] >= LEAST:
            lower = number.get(text.lower())
            if lower is None or counts[lower] * 20 <= counts[i]:
                found.append(i)
    found.sort(key=lambda i: int(counts[i]))
    if len(found) <= CONCEPTS:
        return found
    return [found[int(place)] for place in torch.linspace(0, len(found) - 1, CONCEPTS)]


def best_f1(sae: SparseAutoencoder, rows: Tensor, tokens: Tensor, concepts: Sequence[int]) -> Tensor:
    """Of each concept, the largest F1 of a latent's firing against the token's presence: (concepts,)."""
    row, latent, _ = entries(sae, rows)
    fired = torch.bincount(latent, minlength=sae.d_sae).float()
    token = tokens[row]
    best = []
    for concept in concepts:
        both = torch.bincount(latent[token == concept], minlength=sae.d_sae).float()
        best.append((2 * both / (fired + float((tokens == concept).sum()))).max())
    return torch.stack(best) if best else torch.zeros(0)


def sigmoid_fit(frequency: Tensor, present: Tensor) -> tuple[float, float] | None:
    """(frequency at which half are present, slope per factor of e) of a logistic curve in log frequency.

    frequency (n,) above 0, present bool (n,). By Newton's method, with a weak pull of the slope to 0, without which a
    perfect separation has no finite answer. None where all or none are present.
    """
    if bool(present.all()) or not bool(present.any()):
        return None
    x = torch.stack([torch.ones_like(frequency), frequency.log()], 1).double()
    y, beta = present.double(), torch.zeros(2, dtype=torch.float64)
    ridge = torch.diag(torch.tensor([0.0, 1e-2], dtype=torch.float64))
    centre = x[:, 1].mean()
    x[:, 1] -= centre
    for _ in range(50):
        p = (x @ beta).sigmoid()
        gradient = x.T @ (y - p) - ridge @ beta
        curvature = x.T @ (x * (p * (1 - p))[:, None]) + ridge
        beta = beta + torch.linalg.solve(curvature, gradient).clamp(-2, 2)
    if abs(float(beta[1])) < 1e-6:
        return None
    return float((centre - beta[0] / beta[1]).exp()), float(beta[1])


def concepts(sae: SparseAutoencoder, rows: Tensor, tokens: Tensor, strings: Sequence[str]) -> dict[str, Any] | None:
    """How many names have a latent, and the frequency from which half of them do; None for tokens without names."""
    counts = torch.bincount(tokens, minlength=len(strings))
    chosen = names(strings, counts)
    if not chosen:
        return None
    frequency = counts[chosen].double() / len(tokens)
    present = best_f1(sae, rows, tokens, chosen) >= HAS
    fit = sigmoid_fit(frequency, present)
    return {
        "concepts": len(chosen),
        "present": int(present.sum()),
        "half_at": None if fit is None else fit[0],
        "slope": None if fit is None else round(fit[1], 3),
        "frequency": [round(float(f), 9) for f in frequency],
        "has": [int(p) for p in present],
        "alive": int((torch.bincount(entries(sae, rows)[1], minlength=sae.d_sae) > 0).sum()),
    }
