"""One forward pass and loss of any member of the family, dense, for autograd: the truth for every sparse path.

Leading axes before N and M are independent SAEs: x (*B, N, D), W_enc and W_dec (*B, M, D), b_enc (*B, M),
b_dec (*B, D_out), and losses (*B,).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Rule(Protocol):
    """What a forward pass calls on an activation rule; fastsae.model.rules has them.

    rule_state: the rule's parameters and buffers, and b_enc. rows: what `per_latent` computes from them, for pre.
    """

    @property
    def selects_by_norm(self) -> bool: ...

    def weight(self, rule_state: Mapping[str, Tensor]) -> Tensor | float: ...

    def per_latent(self, rule_state: Mapping[str, Tensor]) -> dict[str, Tensor]: ...

    def dense(
        self, pre: Tensor, rows: Mapping[str, Tensor], rule_state: Mapping[str, Tensor], training: bool
    ) -> Tensor: ...

    def dense_parts(self, A: Tensor, rule_state: Mapping[str, Tensor]) -> list[tuple[Tensor, float]]: ...

    def sparsity(self, pre: Tensor, acts: Tensor, rows: Mapping[str, Tensor], norms: Tensor) -> Tensor | None: ...

    def penalty(self, mean: Tensor) -> Tensor: ...

    def gate(self, pre: Tensor) -> Tensor | None: ...


@dataclass(frozen=True)
class Forward:
    """A (*B, N, M), recon (*B, N, D_out); losses by name (*B,), "loss" their weighted sum."""

    A: Tensor
    recon: Tensor
    losses: dict[str, Tensor]


def forward(
    params: Mapping[str, Tensor],
    x: Tensor,
    rule: Rule,
    rule_state: Mapping[str, Tensor] | None = None,
    *,
    target: Tensor | None = None,
    pre_bias: bool = True,
    loss: str = "mse",
    layers: int = 1,
    penalty_scale: Tensor | float = 1.0,
    training: bool = True,
    loss_denominator: Tensor | int | None = None,
) -> Forward:
    """recon = A W_dec + b_dec (+ x W_skipᵀ),  A = rule((x - b_dec if pre_bias else x) W_encᵀ + b_enc), and the loss

    Σ_parts w·Σ‖recon_part - target‖²/loss_denominator + scale·weight·penalty + the gate's Σ‖·‖²/loss_denominator. The
    first sum is "nested" where there are several parts; "mse" or "fvu" is the error of the last one, which has all of
    them. params: W_enc (left out: tied), W_dec, b_enc, b_dec, W_skip (left out: no skip connection). loss_denominator:
    None is N ("mse") or the batch's total variance ("fvu").
    """
    target = x if target is None else target
    W_dec, b_dec, b_enc = params["W_dec"], params["b_dec"].unsqueeze(-2), params["b_enc"]
    pre = (x - b_dec if pre_bias else x) @ params.get("W_enc", W_dec).mT + b_enc.unsqueeze(-2)
    rule_state = {"b_enc": b_enc, **(rule_state or {})}
    if rule.selects_by_norm:
        rule_state["norms"] = decoder_norms(W_dec.detach(), layers)
    rows = {name: t.unsqueeze(-2) for name, t in rule.per_latent(rule_state).items()}
    A = rule.dense(pre, rows, rule_state, training)
    if loss_denominator is None and loss == "fvu":
        loss_denominator = (target - target.mean(-2, keepdim=True)).square().sum((-2, -1))
    elif loss_denominator is None:
        loss_denominator = target.shape[-2] or 1
    offset = b_dec.expand(target.shape)
    if "W_skip" in params:
        offset = offset + x @ params["W_skip"].mT
    recon = offset
    total: Tensor = target.new_zeros(())
    parts = rule.dense_parts(A, rule_state)
    for part, weight in parts:
        recon = recon + part @ W_dec
        error = (recon - target).square().sum((-2, -1)) / loss_denominator
        total = total + weight * error
    losses = {loss: error}
    if len(parts) > 1:
        losses["nested"] = total
    norms = decoder_norms(W_dec, layers).unsqueeze(-2)
    sparsity = rule.sparsity(pre, A, rows, norms)
    if sparsity is not None:
        losses["sparsity"] = rule.penalty(sparsity.sum(-1).mean(-1))
        total = total + penalty_scale * rule.weight(rule_state) * losses["sparsity"]
    gate = rule.gate(pre)
    if gate is not None:
        frozen = gate @ W_dec.detach() + offset.detach()
        losses["gate"] = (frozen - target).square().sum((-2, -1)) / loss_denominator
        total = total + losses["gate"]
    return Forward(A, recon, losses | {"loss": total})


def decoder_norms(W_dec: Tensor, layers: int = 1) -> Tensor:
    """Σ_l ‖W_dec_i,l‖ over the `layers` equal parts of each row: (*B, M). One layer: the row's norm."""
    return torch.linalg.vector_norm(W_dec.unflatten(-1, (layers, -1)), dim=-1).sum(-1)
