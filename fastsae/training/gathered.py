"""What a step needs of the other processes' backward passes: their terms, along the axis of tokens of a mesh.

A term is a sparse code with the encoder's input and the output's gradient: at 8,192 tokens of 4,096 numbers in bf16
138 MB, where the gradient of two dictionaries of 131,072 latents has 4.3 GB. The terms of all processes are joined in
the order of their ranks, so the update computes what one process with the whole batch would, in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastsae.codes import SparseCodes, UpdateTerm
from fastsae.model.axis import Axis
from fastsae.model.placement import Placement
from fastsae.ops.gradients import latent_sums, weighted_rows
from fastsae.ops.ledger import Taken

_raw = torch.ops.fastsae
SETTINGS = 512
"""Bytes of an optimizer's settings that processes compare."""


def check_settings(optimizer: Any, group: Mapping[str, Any], placement: Placement) -> bool:
    """True. Raises ValueError in every process if one has an optimizer with other settings; the rate may change."""
    names = ("kind", "moments", "clip_norm", "clip_rows", "seed")
    settings = {name: getattr(optimizer, name) for name in names}
    settings |= {name: group[name] for name in ("betas", "eps", "weight_decay")}
    own = torch.tensor(list(repr(settings).encode()[:SETTINGS].ljust(SETTINGS)), dtype=torch.uint8, device="cpu")
    everyone = placement.of_all_processes(own.to(optimizer.skipped.device))
    if bool((everyone != everyone[0]).any()):
        said = "; ".join(f"process {i}: {bytes(one.tolist()).decode().strip()}" for i, one in enumerate(everyone))
        raise ValueError(f"the processes have optimizers with different settings; give all of them the same. {said}")
    return True


def on_device(lr: float | Tensor, like: Tensor) -> Tensor:
    """A learning rate as the update takes it: 0-d float64 on the device."""
    if isinstance(lr, Tensor):
        return lr.detach().to(like.device, torch.float64)
    return torch.tensor(float(lr), dtype=torch.float64, device=like.device)


def check_alike(taken: Taken | None, placement: Placement, lr: Tensor) -> None:
    """Before a step: raises RuntimeError in every process where they ran different backward passes, or have different
    learning rates. taken: what this process's left; lr: of this step, float64.
    """
    terms, dense, pull = ([], {}, None) if taken is None else (taken.terms, taken.dense, taken.decoder_pull)
    kinds = [len(terms), *sorted(map(_kind, terms)), pull is not None, *(name in dense for name in _NAMES)][:63]
    facts = torch.zeros(64, dtype=torch.int64, device=lr.device)
    facts[: len(kinds)] = torch.tensor(kinds, dtype=torch.int64, device="cpu")
    facts[63] = lr.view(torch.int64)
    everyone = placement.tokens.stack(facts)
    rates = everyone[:, 63].clone(memory_format=torch.contiguous_format).view(torch.float64)
    rates = placement.latents.stack(rates).mT.flatten()
    if len(set(rates[~rates.isnan()].tolist())) > 1:  # NaN: a step that no process will make
        raise RuntimeError(
            f"the processes have learning rates of {rates.tolist()}; set the same in all of them. Nothing has changed"
        )
    if bool((everyone[:, :63] != everyone[0, :63]).any()):
        raise RuntimeError(
            f"the processes left {everyone[:, 0].tolist()} sparse gradients of different kinds since the last step, "
            "expected the same in all of them; run the same forward and backward passes in every process"
        )


def of_all_tokens(taken: Taken | None, placement: Placement) -> Taken | None:
    """What all processes' backward passes left, joined; None if none of them left anything. After `check_alike`."""
    axis = placement.tokens
    if axis.size == 1 or taken is None:
        return taken
    return Taken(
        [_joined(term, axis) for term in taken.terms],
        {name: axis.sum(grad) for name, grad in sorted(taken.dense.items())},
        None if taken.decoder_pull is None else axis.sum(taken.decoder_pull),
        taken.factor,
    )


_NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")


def _kind(term: UpdateTerm) -> int:
    return 1 + 2 * (term.codes.offsets is not None) + 4 * (term.dacts is not None) + 8 * term.has_bias


def _joined(term: UpdateTerm, axis: Axis) -> UpdateTerm:
    codes = term.codes.trimmed()
    acts, indices = (torch.cat(axis.gather(t)) for t in (codes.acts, codes.indices))
    offsets = None
    if codes.offsets is not None:
        lengths = torch.cat(axis.gather(codes.offsets.diff()))
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    dacts = None if term.dacts is None else torch.cat(axis.gather(term.dacts[: codes.acts.shape[0]]))
    x = torch.cat(axis.gather(term.x.contiguous())) if term.ahead is None else term.ahead()
    grad = x if term.grad is term.x else torch.cat(axis.gather(term.grad.contiguous()))
    joined = SparseCodes(acts, indices, codes.d_sae, offsets)
    return UpdateTerm(joined, x, grad, term.has_bias, dacts)


def with_pre_share(taken: Taken, placement: Placement, W_enc: Tensor, W_dec: Tensor) -> Taken:
    """The same gradients with b_dec's share from the encoder's input x - b_dec, -Σᵢ db_encᵢ W_encᵢ, in `dense`.

    It is a sum over the latents of all processes, so no process's update can find it by itself.
    """
    own, terms = torch.zeros_like(W_enc[0]), []
    for term in taken.terms:
        acts, code, dacts = term.codes.acts, (term.codes.indices, term.codes.offsets), term.dacts
        if dacts is None:
            dacts = torch.where(acts != 0, _raw.active_dot(term.grad, acts, *code, W_dec, None), 0)
        own -= weighted_rows(latent_sums(dacts, *code, W_dec.shape[0], None, None), W_enc)
        terms.append(replace(term, dacts=dacts))
    share = placement.latents.sum(own)
    b_dec = share + taken.dense["b_dec"] if "b_dec" in taken.dense else share
    return taken._replace(terms=terms, dense={**taken.dense, "b_dec": b_dec})
