"""The gradient of a fused step's loss with respect to its input, and losses that lie behind the reconstruction.

So an SAE can sit inside an end-to-end loss: what follows gives it the gradient of the reconstruction, and it hands the
gradient of its input back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastsae import ops
from fastsae.codes import UpdateTerm
from fastsae.model.sae import Inputs, SparseAutoencoder
from fastsae.training.objective import Pass, Task


class Outer:
    """outer(recon) as a pass asks for it: called with the error, it returns the gradient of the reconstruction.

    value: the loss, 0-d float64; dx: what it adds to x's gradient by way of the normalization, or None.
    """

    def __init__(self, sae: SparseAutoencoder, ready: Inputs, outer: Callable[[Tensor], Tensor], x: Tensor):
        self.sae, self.ready, self.outer, self.x = sae, ready, outer, x
        self.value = torch.zeros((), dtype=torch.float64, device=x.device)
        self.dx: Tensor | None = None

    def __call__(self, error: Tensor) -> Tensor:
        """error (N, D_out) = recon - target, normalized. Raises ValueError for a loss that is not one number of it."""
        sae, ready, x = self.sae, self.ready, self.x
        recon = (error + ready.target.to(error.dtype)).requires_grad_()
        with torch.enable_grad():
            leaf = x.detach().requires_grad_() if x.requires_grad else x
            stats = sae.norm.statistics(leaf.to(sae.W_dec.dtype).reshape(-1, sae.d_in))
            restored = sae.norm.restore(recon.to(sae.W_dec.dtype), stats)
            value = self.outer(restored.reshape(*x.shape[:-1], sae.d_out))
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"outer returned {got}, expected one number computed from the reconstruction it was given")
        wanted = [recon, leaf] if leaf.requires_grad else [recon]
        grads = torch.autograd.grad(value, wanted, allow_unused=True)
        if grads[0] is None:
            raise ValueError("outer's loss does not depend on the reconstruction it was given")
        self.value = value.detach().double().reshape(())
        self.dx = grads[1] if len(grads) > 1 else None
        return grads[0]


def of_step(
    task: Task,
    found: Pass,
    terms: list[UpdateTerm],
    whole: Tensor,
    scaled: Tensor | float,
    x: Tensor,
    own_target: bool,
) -> Tensor:
    """dL/dx, shape of x, before the parameters are updated.

    whole (N, D_out): dL/d recon; scaled: the part of the loss that is divided by `over`. With P the pre-acts:
    dx = dP W_enc + whole W_skip - dL/d error (where x is its own target), through the normalization.
    """
    sae, backend = task.sae, task.how.backend
    W_enc = sae.encoder_weight
    d_input = torch.zeros_like(task.x)
    for term in terms:
        codes, dacts = term.codes, term.dacts
        if dacts is None:
            dacts = ops.active_dot(term.grad, codes, sae.W_dec, backend=backend)
            dacts = torch.where(codes.acts != 0, dacts, 0)
        if dacts.numel():
            d_input += torch.ops.fastsae.decode(
                dacts.reshape(codes.acts.shape), codes.indices, codes.offsets, W_enc, backend
            )
    for name in ("dx", "ghost_dx"):
        if name in found.adds:
            d_input += found.adds[name]
    d_goal = -whole if found.outer_grad is None else found.outer_grad - whole
    if "gate_error" in found.adds:
        d_goal = d_goal - found.adds["gate_error"] * (2 / task.over)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        target = None if own_target else x.new_zeros(*x.shape[:-1], sae.d_out)
        again = sae.inputs(leaf, target)
        ends, slopes = [again.encoder_input], [d_input.to(again.encoder_input.dtype)]
        if own_target:
            if isinstance(task.over, Tensor):
                centred = again.target - again.target.mean(0)
                d_goal = d_goal - (scaled / task.over * 2).to(d_goal.dtype) * centred.detach()
            ends.append(again.target)
            slopes.append(d_goal.to(again.target.dtype))
        if sae.W_skip is not None:
            ends.append(again.x)
            slopes.append(whole.to(again.x.dtype) @ sae.W_skip.detach())
    return torch.autograd.grad(ends, leaf, slopes)[0]
