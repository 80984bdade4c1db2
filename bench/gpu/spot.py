"""Checks at full size, before an op is timed: the code of some tokens and the rows of some latents, against float64.

The whole (N, M) in float64 would not fit, so TOKENS tokens spread over the batch and LATENTS latents are held, among
them the most used one, which is what a wrong split of a long latent spoils.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.cases import Inputs
from bench.gpu import check_update
from bench.gpu.check_codes import top_k
from bench.gpu.truth import allowed, scores, within
from fastsae import LatentOrder, SparseCodes, UpdateTerm, reference

TOKENS, LATENTS = 128, 64


def some(n: int, of: int, device: torch.device) -> Tensor:
    """Up to `of` of n places, first and last among them."""
    return torch.linspace(0, n - 1, min(n, of), device=device).round().long().unique()


class Spots:
    """Truths of one case's inputs, made once."""

    def __init__(self, inputs: Inputs, k: int) -> None:
        self.k, self.x = k, inputs.x
        self.tokens = some(len(inputs.x), TOKENS, inputs.x.device)
        self.pre, self.magnitude = scores(inputs.x[self.tokens], inputs.W_enc, inputs.b_enc)

    def threshold(self) -> float:
        """A bar that about k latents of a token clear: the mean of the sampled tokens' k-th pre-act."""
        return float(torch.relu(self.pre).topk(self.k, dim=-1).values[:, -1].mean())

    def encode_topk(self, codes: SparseCodes) -> float:
        return top_k(codes[self.tokens], self.pre, self.magnitude, self.k, exact=False)

    def above(self, codes: SparseCodes, bar: float) -> float:
        """Every sampled token holds what lies above the bar and nothing below, within the rounding of a score."""
        few = codes[self.tokens]
        tokens, latents = few.token_ids(), few.indices.long()
        worst = within(few.acts, self.pre[tokens, latents], self.magnitude[tokens, latents], "acts at their indices")
        got = torch.zeros_like(self.pre, dtype=torch.bool)
        got[tokens, latents] = True
        gap, band = self.pre - bar, allowed(self.pre, self.magnitude, torch.float32)
        wrong = (got != (gap > 0)) & (gap.abs() > band)
        if bool(wrong.any()):
            raise AssertionError(f"{int(wrong.sum())} latents are on the wrong side of the bar {bar:.6g}")
        return worst

    def batch_topk(self, codes: SparseCodes) -> float:
        """N·k are stored, and the smallest of them is the bar of every token."""
        n = int(codes.nnz)
        if n != len(self.x) * self.k:
            raise AssertionError(f"{n} activations are stored, expected {len(self.x) * self.k}")
        return self.above(codes, float(codes.acts[:n].min()))

    def decode(self, codes: SparseCodes, W: Tensor, got: Tensor) -> float:
        few = codes[self.tokens]
        rows, acts = W[few.indices.long()].double(), few.acts.double()
        truth, size = torch.einsum("nk,nkd->nd", acts, rows), torch.einsum("nk,nkd->nd", acts.abs(), rows.abs())
        return within(got[self.tokens], truth, size, "decode")

    def active_dot(self, codes: SparseCodes, W: Tensor, got: Tensor) -> float:
        few, x = codes[self.tokens], self.x[self.tokens].double()
        rows = W[few.indices.long()].double()
        truth, size = torch.einsum("nd,nkd->nk", x, rows), torch.einsum("nd,nkd->nk", x.abs(), rows.abs())
        occupied = few.occupied()
        return within(got[self.tokens], truth * occupied, size * occupied, "active_dot")


def latents_of(codes: SparseCodes) -> Tensor:
    """Some latents, ascending, with the most used one."""
    used = torch.bincount(codes.indices[codes.occupied()].long(), minlength=codes.d_sae)
    return torch.cat([some(codes.d_sae, LATENTS, used.device), used.argmax()[None]]).unique()


def columns(codes: SparseCodes, latents: Tensor) -> Tensor:
    """A[:, latents] in float64, (N, LATENTS), of a fixed code."""
    place = torch.full((codes.d_sae,), -1, device=latents.device)
    place[latents] = torch.arange(len(latents), device=latents.device)
    at = torch.where(codes.occupied(), place[codes.indices.long()], -1)
    wide = torch.zeros(codes.n_tokens, len(latents) + 1, dtype=torch.float64, device=latents.device)
    # Every empty or foreign slot adds 0 to the spare column.
    return wide.scatter_add(1, at % (len(latents) + 1), torch.where(at >= 0, codes.acts.double(), 0))[:, :-1]


def active_outer(codes: SparseCodes, x: Tensor, got: Tensor) -> float:
    latents = latents_of(codes)
    A = columns(codes, latents)
    return within(got[latents], A.mT @ x.double(), A.abs().mT @ x.double().abs(), "active_outer")


def by_latent(codes: SparseCodes, order: LatentOrder) -> float:
    """All of it, by sorting."""
    occupied = codes.occupied().flatten()
    latents = torch.where(occupied, codes.indices.flatten().long(), codes.d_sae)
    slots = latents.sort(stable=True).indices[: int(occupied.sum())]
    counts = torch.bincount(latents, minlength=codes.d_sae + 1)[: codes.d_sae]
    expected = {"offsets": torch.cat([counts.new_zeros(1), counts.cumsum(0)]), "slots": slots}
    expected["tokens"] = codes.token_ids()[slots].int()
    for name, truth in expected.items():
        if not torch.equal(getattr(order, name)[: len(truth)], truth):
            raise AssertionError(f"by_latent: {name} are not those of a stable sort")
    return 0.0


def update(problem: check_update.Problem, backend: str | None) -> float:
    """Runs the problem's update in place and holds LATENTS rows of all that it wrote (b_dec, which all latents share,
    is held by the small cases and by the whole step).
    """
    term = problem.terms[0]
    latents = latents_of(term.codes)

    def rows(t: Tensor) -> Tensor:
        return t[latents].cpu().clone()

    def part(p: check_update.Problem) -> tuple[dict[str, Tensor], list[Tensor]]:
        params = {name: t.cpu() if name == "b_dec" else rows(t) for name, t in p.params.items()}
        return params, [m.cpu() if i >= 6 else rows(m) for i, m in enumerate(p.moments)]

    before, old = part(problem)
    problem.run(backend)
    after, moments = part(problem)
    terms = [reference.Term(columns(term.codes, latents).cpu(), term.x.cpu().double(), term.grad.cpu().double())]
    written = check_update.Problem(after, moments, [], problem.unit_norm, problem.pre_bias)
    wide = {name: p.double() for name, p in before.items()}
    return check_update.hold(written, old, wide, terms, ("W_enc", "W_dec", "b_enc"))


def update_problem(inputs: Inputs, codes: SparseCodes, grad: Tensor) -> check_update.Problem:
    """The first step of training on these inputs."""
    params = {name: getattr(inputs, name).clone() for name in check_update.NAMES}
    moments = [torch.zeros_like(p) for p in params.values() for _ in range(2)]
    return check_update.Problem(params, moments, [UpdateTerm(codes, inputs.x, grad)])
