"""The forward pass of a threshold rule over all of (N, M), in pieces of tokens: for when most latents are active."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae import reference
from fastsae.codes import SparseCodes
from fastsae.model import losses
from fastsae.reference import wide
from fastsae.training.objective import Pass, Task, gradients_of, leaves_of, outer_of, sort_out

DENSE_PIECE = 2**23
"""Numbers of (N, M) that the dense pass holds at a time, in each of some five buffers."""


def dense_pass(task: Task, want_dx: bool = False) -> Pass:
    """The shaped pass over all of (N, M), in pieces of tokens. It stores both dictionaries' gradients.

    want_dx: keep Σ_i dpre_ni W_enc_i (N, D_in) too, as adds["dx"].
    """
    sae, rule, n = task.sae, task.rule, task.n
    W_dec, W_enc, b_enc = (wide(t.detach()) for t in (sae.W_dec, sae.encoder_weight, sae.b_enc))
    x, goal = wide(task.x), wide(task.goal)
    leaves = leaves_of(sae)
    norms = reference.decoder_norms(W_dec, sae.layers).requires_grad_()
    error, gate_error = torch.empty_like(goal), None
    dW_enc, dW_dec, dpre = torch.zeros_like(W_enc), torch.zeros_like(W_dec), torch.zeros_like(b_enc)
    dx = torch.empty_like(x) if want_dx else None
    counts, selected = torch.zeros_like(sae.fired), torch.zeros_like(sae.fired_over)
    grads = {name: torch.zeros_like(t) for name, t in {**leaves, "norms": norms}.items()}
    slope = task.slope() * _penalty_slope(task, x, W_enc, b_enc)
    sparse_sum, gate_sum, squares = (torch.zeros((), dtype=torch.float64, device=x.device) for _ in range(3))
    size = max(1, DENSE_PIECE // sae.d_sae)
    outer_grad = None

    def missed_by(acts: Tensor, here: slice) -> Tensor:
        """recon - target of a piece."""
        missed = acts @ W_dec - goal[here]
        return missed if task.bias is None else missed.add_(task.bias)

    if task.outer is not None:
        outer_grad = outer_of(task, _dense_error(task, x, goal, W_enc, b_enc, W_dec))
    for start in range(0, n, size):
        here = slice(start, min(start + size, n))
        z = torch.addmm(b_enc, x[here], W_enc.mT).requires_grad_()
        with torch.enable_grad():
            rows = {name: t.unsqueeze(0) for name, t in rule.per_latent(leaves).items()}
            acts = rule.activate(z, rows)
            sparsity = rule.sparsity(z, acts, rows, norms.unsqueeze(0))
            mean = None if sparsity is None else losses.fixed_sum(sparsity) / n
            gate = rule.gate(z)
        missed = missed_by(acts.detach(), here)
        error[here] = missed
        squares += losses.sum_of_squares(missed)
        g = missed * (2 / task.over)
        if outer_grad is not None:
            g += outer_grad[here]
        ends, slopes = [acts], [g.to(acts.dtype) @ W_dec.mT]
        if mean is not None:
            ends.append(mean)
            slopes.append(slope.to(mean.dtype))
            sparse_sum += mean.detach()
        if gate is not None:
            gate_error = torch.empty_like(goal) if gate_error is None else gate_error
            missed = missed_by(gate.detach(), here)
            gate_error[here] = missed
            gate_sum += losses.sum_of_squares(missed)
            ends.append(gate)
            slopes.append((missed * (2 / task.over)).to(gate.dtype) @ W_dec.mT)
        found = gradients_of(ends, slopes, {"z": z, **leaves, "norms": norms})
        dz = found.pop("z")
        for name, grad in found.items():
            grads[name] += grad
        dW_dec.addmm_(acts.detach().mT.to(g.dtype), g)
        dW_enc.addmm_(dz.mT, x[here])
        dpre += dz.sum(0)
        counts += (acts != 0).sum(0)
        selected += rule.considered(z.detach(), rows).sum()
        if dx is not None:
            dx[here] = dz @ W_enc
    nothing = SparseCodes(
        task.x.new_zeros(0), torch.zeros(0, dtype=torch.int32, device=x.device), sae.d_sae,
        torch.zeros(n + 1, dtype=torch.int64, device=x.device),
    )  # fmt: skip
    result = Pass(
        error=error.to(task.x.dtype), squares=squares, errors=[], parts=[nothing], active=counts.sum(), counts=counts,
        selected=selected, total=squares / task.over, outer_grad=outer_grad,
    )  # fmt: skip
    result.errors = [(result.error, 1.0)]
    if mean is not None:
        result.losses["sparsity"] = rule.penalty(sparse_sum)
        result.total = result.total + task.slope() * result.losses["sparsity"]
    if gate_error is not None:
        result.losses["gate"] = gate_sum / task.over
        result.total = result.total + result.losses["gate"]
        result.adds["gate_error"] = gate_error.to(task.x.dtype)
    result.adds["added"] = [dW_dec.add_(dW_enc), dpre] if sae.tied else [dW_enc, dW_dec, dpre]
    if dx is not None:
        result.adds["dx"] = dx
    if not rule.needs_norms:
        grads.pop("norms")
    sort_out(result, task, grads)
    return result


def _dense_error(task: Task, x: Tensor, goal: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor) -> Tensor:
    """recon - target of a dense pass, before any gradient."""
    rule, error = task.rule, torch.empty_like(goal)
    rows = {name: t.unsqueeze(0) for name, t in rule.per_latent(task.sae.rule_state).items()}
    size = max(1, DENSE_PIECE // task.sae.d_sae)
    for inputs, wanted, place in zip(x.split(size), goal.split(size), error.split(size), strict=True):
        torch.sub(rule.activate(torch.addmm(b_enc, inputs, W_enc.mT), rows) @ W_dec, wanted, out=place)
    return error if task.bias is None else error.add_(task.bias)


def _penalty_slope(task: Task, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor | float:
    """d penalty / d mean, at the mean of this batch; that takes a product of its own where it is not 1."""
    rule, sae = task.rule, task.sae
    if rule.penalty_is_mean:
        return 1.0
    rows = {name: t.unsqueeze(0) for name, t in rule.per_latent(leaves_of(sae)).items()}
    norms = reference.decoder_norms(wide(sae.W_dec), sae.layers).unsqueeze(0)
    mean = torch.zeros((), dtype=torch.float64, device=x.device)
    with torch.no_grad():
        for piece in x.split(max(1, DENSE_PIECE // sae.d_sae)):
            z = torch.addmm(b_enc, piece, W_enc.mT)
            sparsity = rule.sparsity(z, rule.activate(z, rows), rows, norms)
            assert sparsity is not None
            mean += sparsity.sum() / task.n
    mean.requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(rule.penalty(mean), mean)[0]


def sampled_density(task: Task, tokens: int) -> float:
    """The share of pre-acts that the rule looks at, on some tokens spread over the batch; a host sync."""
    sae, n = task.sae, task.n
    some = task.x[:: max(1, n // tokens)][:tokens]
    with torch.no_grad():
        z = torch.addmm(wide(sae.b_enc), wide(some), wide(sae.encoder_weight).mT)
        rows = {name: t.unsqueeze(0) for name, t in task.rule.per_latent(sae.rule_state).items()}
    return float(task.rule.considered(z, rows).double().mean())
