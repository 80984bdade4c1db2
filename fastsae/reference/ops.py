"""The mathematics of the ops: encoders and the three products that close forward and backward.

Shapes: x (N, D), W (M, D), b (M,), A (N, M). Functions of pre-acts and codes take leading axes before N as well.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(t: Tensor) -> Tensor:
    """t in the dtype to compute in: float64 stays, everything narrower becomes float32."""
    return t if t.dtype == torch.float64 else t.float()


# -- encoder: which latents are active, and how strongly --------------------------------------------------------------


def pre_acts(x: Tensor, W_enc: Tensor, b_enc: Tensor, scale: Tensor | None = None) -> Tensor:
    """(x W_encᵀ + b_enc) · scale: (N, M). scale (M,) gates latents, by decoder norm for instance."""
    pre = x @ W_enc.mT + b_enc
    return pre if scale is None else pre * scale


def top_k(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest along the last dimension: values and int64 indices, largest first.

    Ties go to the lower index and NaN ranks highest. torch.topk promises no order among ties, hence the stable sort.
    """
    ordered = torch.sort(values, dim=-1, descending=True, stable=True)
    return ordered.values[..., :k], ordered.indices[..., :k]


def keep_top_k(pre: Tensor, k: int) -> Tensor:
    """A (N, M): relu(pre) with all but the k largest of each token set to 0 (TopK, arXiv:2406.04093 eq. 2)."""
    values, latents = top_k(torch.relu(pre), k)
    return torch.zeros_like(pre).scatter(-1, latents, values)


def batch_top_k(pre: Tensor, k: int | Tensor) -> Tensor:
    """A (N, M): relu(pre) with all but the N·k largest of the batch set to 0 (BatchTopK, arXiv:2412.06410 eq. 4).

    Ties go to the lower token, then to the lower latent. A token whose scores are all NaN keeps its first k, and the
    other tokens keep the same as without it. k: a number, or one for each of the leading axes.
    """
    k = torch.as_tensor(k, dtype=torch.int64, device=pre.device)[..., None]
    positive, blank = torch.relu(pre), pre.isnan().all(-1, keepdim=True)
    flat = torch.where(blank, 0, positive).flatten(-2)
    wanted = k * (pre.shape[-2] - blank.sum((-2, -1))[..., None])
    order = torch.sort(flat, dim=-1, descending=True, stable=True).indices
    first = torch.arange(flat.shape[-1], dtype=torch.int64, device=pre.device).expand_as(flat) < wanted
    kept = torch.zeros_like(first).scatter(-1, order, first).view_as(pre)
    latents = torch.arange(pre.shape[-1], dtype=torch.int64, device=pre.device)
    return torch.where(torch.where(blank, latents < k[..., None], kept), positive, 0)


def keep_group_max(pre: Tensor, k: int) -> Tensor:
    """A (N, M): relu(pre) at the largest entry of each of k equal, consecutive groups of latents, 0 elsewhere."""
    return keep_top_k(pre.unflatten(-1, (k, -1)), 1).flatten(-2)


def keep_abs_top_k(pre: Tensor, k: int) -> Tensor:
    """A (N, M): pre, of either sign, with all but the k largest magnitudes of each token set to 0."""
    _, latents = top_k(pre.abs(), k)
    return torch.zeros_like(pre).scatter(-1, latents, pre.gather(-1, latents))


def is_above(pre: Tensor, threshold: Tensor) -> Tensor:
    """pre > threshold, bool (N, M), for a threshold of shape (), (M,) or (N, 1). NaN counts as above."""
    return ~(pre <= threshold)


# -- the three products that close forward and backward ---------------------------------------------------------------


def decode(A: Tensor, W: Tensor) -> Tensor:
    """A W: (N, D)."""
    return A @ W


def active_dot(x: Tensor, W: Tensor) -> Tensor:
    """⟨xₙ, Wᵢ⟩ for every pair: (N, M). The op keeps the active pairs only."""
    return x @ W.mT


def active_outer(A: Tensor, x: Tensor) -> Tensor:
    """Aᵀ x: (M, D)."""
    return A.mT @ x
