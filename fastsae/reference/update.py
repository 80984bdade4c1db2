"""From gradients to new parameters: the decoder's rows held at norm 1, rows clipped, an optimizer step on each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastsae.reference.gradients import Params
from fastsae.reference.ops import wide
from fastsae.reference.optimizers import Optimizer
from fastsae.reference.rounding import EightBit, round_to_bf16, round_to_fp8

Moment = Tensor | EightBit
Moments = dict[str, tuple[Moment, ...]]  # of each parameter: Adam's m and v, Lion's m


def project(grad: Tensor, W: Tensor) -> Tensor:
    """gradᵢ - ⟨gradᵢ, Wᵢ⟩ Wᵢ / ‖Wᵢ‖²: the part of a row's gradient orthogonal to the row.

    A row of 0 keeps its gradient.
    """
    squares = W.square().sum(-1, keepdim=True)
    along = (grad * W).sum(-1, keepdim=True) / torch.where(squares > 0, squares, 1)
    return grad - along * W


def normalize(W: Tensor) -> Tensor:
    """Wᵢ / ‖Wᵢ‖. A row of 0 stays 0."""
    norms = W.norm(dim=-1, keepdim=True)
    return W / torch.where(norms > 0, norms, 1)


def clip_rows(grad: Tensor, most: float) -> Tensor:
    """gradᵢ · min(1, most / ‖gradᵢ‖)."""
    norms = grad.norm(dim=-1, keepdim=True)
    return torch.where(norms > most, grad * (most / norms), grad)


def shape_gradients(params: Params, grads: Params, unit_norm: bool, most: float | None = None) -> Params:
    """The gradients as the optimizer gets them: W_dec's projected if unit_norm, then each dictionary's rows clipped."""
    shaped = dict(grads)
    if unit_norm:
        shaped["W_dec"] = project(grads["W_dec"], params["W_dec"])
    if most is not None:
        shaped |= {name: clip_rows(shaped[name], most) for name in ("W_enc", "W_dec") if name in shaped}
    return shaped


def widened(moment: Moment) -> Tensor:
    """A stored moment in the dtype to compute in."""
    return moment.widened() if isinstance(moment, EightBit) else wide(moment)


def store(place: Moment, fresh: Moment, skip: Tensor | None = None) -> None:
    """Copies a parameter or a moment into the memory of one that is stored alike.

    If skip, 0-d bool, is True, the old one stays; the device decides that, without a host sync.
    """
    if isinstance(place, EightBit) and isinstance(fresh, EightBit):
        # As bytes: torch has no arithmetic in 8-bit floats.
        store(place.codes.view(torch.uint8), fresh.codes.view(torch.uint8), skip)
        store(place.scales, fresh.scales, skip)
        return
    assert isinstance(place, Tensor)
    assert isinstance(fresh, Tensor)
    place.copy_(fresh if skip is None else torch.where(skip, place, fresh.to(place.dtype)))


def _stored(
    like: Moment, t: Tensor, seed: int | None, step: Tensor, stream: int, which: str, before: int
) -> Moment:  # fmt: skip
    """t as `like` is stored."""
    if isinstance(like, EightBit):
        assert seed is not None
        return round_to_fp8(t.float(), seed, step, stream, keep_positive=which == "v", before=before)
    if like.dtype == torch.bfloat16 and seed is not None:
        return round_to_bf16(t.float(), seed, step, stream, before)
    return t.to(like.dtype)


def update(
    params: Params,
    grads: Params,
    moments: Moments,
    lr: Tensor,
    step: Tensor,
    optimizer: Optimizer,
    unit_norm: bool,
    seed: int | None = None,
    before: Mapping[str, int] | None = None,
) -> tuple[Params, Moments]:
    """One optimizer step with gradients from `shape_gradients`, then the decoder renormalized if unit_norm.

    Moments in bfloat16 or 8 bits are computed with in float32 at least and rounded at random under `seed`; stream 2i is
    the i-th parameter's m, stream 2i + 1 its v. before: numbers of each whole parameter before those that are given.
    """
    new_params: Params = {}
    new_moments: Moments = {}
    for i, (name, p) in enumerate(params.items()):
        old = moments[name]
        p, fresh = optimizer.stepped(p, grads[name], tuple(widened(m).to(p.dtype) for m in old), lr, step)
        new_params[name] = normalize(p) if unit_norm and name == "W_dec" else p
        new_moments[name] = tuple(
            _stored(like, m, seed, step, 2 * i + j, which, (before or {}).get(name, 0))
            for j, (like, m, which) in enumerate(zip(old, fresh, optimizer.moments, strict=True))
        )
    return new_params, new_moments
