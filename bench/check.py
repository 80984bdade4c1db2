"""Correctness first: each contestant's results are compared before it is timed, and a wrong one is not timed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.cases import Inputs
from bench.dense import Dense
from bench.ours import Fused

TOKENS = 256
"""Tokens whose forward pass is compared in float64."""

STEP_LR = 1e-3
NARROW = (("bf16", 0.2), ("tf32", 0.1))


class WrongResult(AssertionError):
    """A contestant computed something other than the dense reference."""


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@torch.no_grad()
def truth(inputs: Inputs, k: int) -> tuple[Tensor, Tensor]:
    """The k best acts of the first tokens and their reconstruction, in float64 from the fp32 inputs."""
    x, W_enc, b_enc, W_dec, b_dec = (
        t.double() for t in (inputs.x[:TOKENS], inputs.W_enc, inputs.b_enc, inputs.W_dec, inputs.b_dec)
    )
    pre_acts = torch.relu(torch.addmm(b_enc, x - b_dec, W_enc.T))
    acts, indices = pre_acts.topk(k, dim=-1)
    recon = torch.stack([a @ W_dec[i] for a, i in zip(acts, indices, strict=True)]) + b_dec
    return acts, recon


def check_forward(contestant: Any, inputs: Inputs, recon: Tensor) -> None:
    """The reconstruction of the first tokens: rms error 1e-4 of its norm in fp32.

    A contestant with a narrower product may pick other latents where scores lie close together: 0.2 in bf16, 0.1 in
    tf32.
    """
    bound = next((bound for narrow, bound in NARROW if narrow in contestant.name), 1e-4)
    off = relative(contestant.reconstruct(inputs.x[:TOKENS]), recon)
    if not off <= bound:
        raise WrongResult(f"{contestant.name}: the reconstruction is off by {off:.2e} of its norm, expected <= {bound}")


def check_selection(fused: Fused, inputs: Inputs, acts: Tensor) -> None:
    """Exactness: sorted acts equal the float64 ones to fp32 rounding of a D-long dot product, token by token."""
    found = fused.encode(inputs.x[:TOKENS]).acts.double().sort(dim=-1, descending=True).values
    scale = inputs.x[:TOKENS].norm(dim=-1, keepdim=True).double() * float(inputs.W_enc.norm(dim=-1).max())
    bound = 1e-6 * scale + 2e-7 * acts
    off = (found - acts).abs()
    if bool((off > bound).any()):
        n = int((off > bound).any(dim=-1).sum())
        raise WrongResult(f"{fused.name}: {n} of {len(acts)} tokens do not have the {acts.shape[1]} largest pre-acts")


def check_step(fused: Fused, dense: Dense, inputs: Inputs) -> None:
    """One whole step from the same weights: the loss to 1e-5, and the same move of the weights.

    Adam's first step is lr · g/(|g| + eps), the sign of the gradient: entries whose gradient is rounding noise may
    differ, so the moves are compared in norm, 2e-3 of the whole.
    """
    before = [p.detach().clone() for p in dense.parameters()]
    expected, got = float(dense.step(inputs.x)), float(fused.step(inputs.x))
    if abs(got - expected) > 1e-5 * abs(expected):
        raise WrongResult(f"{fused.name}: the loss of a step is {got!r}, expected {expected!r}")
    sae = fused.sae
    for name, start, reference in zip(("W_enc", "b_enc", "W_dec", "b_dec"), before, dense.parameters(), strict=True):
        off = relative(getattr(sae, name).detach() - start, reference.detach() - start)
        if not off <= 2e-3:
            raise WrongResult(f"{fused.name}: {name} moved otherwise than in the dense step, by {off:.2e} of the move")


def check_fused(inputs: Inputs, k: int, backend: str | None = None, *, cuda_graph: bool = False) -> None:
    """Everything about fastsae on this case. Raises WrongResult."""
    acts, recon = truth(inputs, k)
    fused = Fused(inputs, k, lr=STEP_LR, backend=backend, cuda_graph=cuda_graph)
    check_forward(fused, inputs, recon)
    check_selection(fused, inputs, acts)
    check_step(fused, Dense(inputs, k, lr=STEP_LR), inputs)
