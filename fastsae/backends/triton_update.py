"""The latent-major half of the Triton backend: by_latent, active_outer and update_latents_ over fastsae.kernels.

Nothing here looks at a value on the device; fastsae.backends.triton puts each call on its tensors' device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.kernels import active_outer as _active_outer
from fastsae.kernels import by_latent as _by_latent
from fastsae.kernels import narrow as _narrow
from fastsae.kernels import update_latents as _update


def by_latent(acts: Tensor, indices: Tensor, offsets: Tensor | None, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    return _by_latent.by_latent(acts, indices, offsets, d_sae)


def active_outer(
    acts: Tensor, indices: Tensor, offsets: Tensor | None, x: Tensor, d_sae: int, by_latent: list[Tensor] | None
) -> Tensor:
    if by_latent is not None:
        _check_order(by_latent, acts.numel(), d_sae)
    return _active_outer.active_outer(acts, indices, offsets, x, d_sae, by_latent)


def _check_order(order: list[Tensor], capacity: int, d_sae: int) -> None:
    """Raises ValueError where the three tensors cannot be an order of this code; their values stay on the device."""
    dtypes, shapes = [t.dtype for t in order], [tuple(t.shape) for t in order]
    if dtypes != [torch.int64, torch.int32, torch.int64] or shapes != [(d_sae + 1,), (capacity,), (capacity,)]:
        raise ValueError(
            f"by_latent is {dtypes} of shapes {shapes}, expected int64, int32, int64 for {d_sae} latents and "
            f"{capacity} slots; it was made of another code: use ops.by_latent(codes)"
        )


def update_latents_(
    W_enc: Tensor | None,
    W_dec: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    moments: list[Tensor],
    screen: list[Tensor],
    acts: list[Tensor],
    indices: list[Tensor],
    offsets: list[Tensor],
    xs: list[Tensor],
    grads: list[Tensor],
    has_bias: list[bool],
    lr: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    unit_norm: bool,
    pre_bias: bool,
    seed: int | None,
) -> Tensor:
    terms = [
        _update.Term(act, index, offset if offset.numel() else None, x, grad, bias)
        for act, index, offset, x, grad, bias in zip(acts, indices, offsets, xs, grads, has_bias, strict=True)
    ]
    stats = _update.update_latents(
        W_enc, W_dec, b_enc, b_dec, moments, terms, lr, step, beta1, beta2, eps, unit_norm, pre_bias, seed
    )
    if screen:
        _narrow.narrow_rows(W_dec if W_enc is None else W_enc, *screen)
    return stats
