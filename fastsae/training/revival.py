"""The losses on dead latents of a fused step: AuxK as a term of the update, ghost gradients as dense rows beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae import ops
from fastsae.codes import UpdateTerm
from fastsae.model import losses
from fastsae.reference import wide
from fastsae.training.objective import Pass, Task, gradients_of


def revive(task: Task, found: Pass, dead: Tensor, metrics: dict[str, Tensor]) -> list[UpdateTerm]:
    """AuxK's term or the ghost gradients, which go to found.adds; their losses go to the metrics."""
    sae = task.sae
    if sae.ghost is not None:
        metrics["ghost"] = add_ghosts(task, found, dead)
    if sae.aux_k is None:
        return []
    metrics["aux"] = torch.zeros_like(found.squares)
    dead_codes = losses.encode_dead(
        task.x, sae.encoder_weight, sae.b_enc, dead, sae.aux_k,
        screen=task.how.screen, precision=sae.precision, backend=task.how.backend,
    )  # fmt: skip
    if dead_codes is None:
        return []
    weight = losses.aux_weight(dead, sae.aux_k)
    # ê - e with e = target - recon: the residual with the sign that is at hand.
    missed = ops.decode(dead_codes, sae.W_dec, backend=task.how.backend).add_(found.error)
    metrics["aux"] = weight * losses.sum_of_squares(missed) / task.over
    missed.mul_(weight * (2 * sae.aux_coef) / task.over)
    return [UpdateTerm(dead_codes, task.x, missed, has_bias=False)]


def add_ghosts(task: Task, found: Pass, dead_ones: Tensor) -> Tensor:
    """The ghost gradients of the dead latents' rows, dense in those rows, added to found.adds; returns their loss.

    It looks at how many are dead, and stores a gradient of both dictionaries where any is.
    """
    sae = task.sae
    dead = dead_ones.nonzero().squeeze(1)
    if dead.numel() == 0:
        return torch.zeros_like(found.squares)
    leaves = {"x": task.x, "W_enc": sae.encoder_weight[dead], "b_enc": sae.b_enc[dead], "W_dec": sae.W_dec[dead]}
    leaves = {name: wide(t).detach().requires_grad_() for name, t in leaves.items()}
    with torch.enable_grad():
        rows = (leaves["W_enc"], leaves["b_enc"], leaves["W_dec"])
        assert sae.ghost is not None
        loss = losses.ghost(sae.ghost, leaves["x"], wide(found.error).neg(), rows, task.over)
    grads = gradients_of([loss], [torch.full_like(loss, sae.ghost_coef)], leaves)
    if "added" not in found.adds:
        places = [sae.W_dec, sae.b_enc] if sae.tied else [sae.W_enc, sae.W_dec, sae.b_enc]
        found.adds["added"] = [torch.zeros_like(wide(p)) for p in places if p is not None]
    names = ("W_dec", "b_enc") if sae.tied else ("W_enc", "W_dec", "b_enc")
    for name, place in zip(names, found.adds["added"], strict=True):
        place.index_add_(0, dead, grads[name] + grads["W_enc"] if sae.tied and name == "W_dec" else grads[name])
    found.adds["ghost_dx"] = grads["x"]
    return loss.detach().double()
