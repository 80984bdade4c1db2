"""Checks at full size, before an op is timed: the code of some tokens and the rows of some latents, against float64.

The whole (N, M) in float64 would not fit, so TOKENS tokens spread over the batch and LATENTS latents are checked. Among
these is the most used latent, which a wrong split of a long latent would spoil.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bench.cases import Inputs
from bench.gpu import check_update
from bench.gpu.check_codes import top_k
from bench.gpu.truth import allowed, errors, scores, within
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

    def encode_topk(self, codes: SparseCodes, rows: Tensor | None = None) -> float:
        """rows: the latents that were considered, where not all were."""
        pre = self.pre
        if rows is not None:
            pre = torch.full_like(pre, -1).index_copy(1, rows.long(), pre[:, rows.long()])
        return top_k(codes[self.tokens], pre, self.magnitude, self.k, exact=False)

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


def gathered(codes: SparseCodes, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a code's stored entries: their token, their act and their row of W, the latter two in float64."""
    stored = codes.occupied().flatten()
    return (
        codes.token_ids()[stored],
        codes.acts.flatten()[stored].double(),
        W[codes.indices.flatten()[stored].long()].double(),
    )


def decoded(codes: SparseCodes, W: Tensor) -> tuple[Tensor, Tensor]:
    """A W in float64 and its magnitude |A||W|, without the dense A."""
    tokens, acts, rows = gathered(codes, W)
    nothing, moved = rows.new_zeros(codes.n_tokens, W.shape[1]), acts[:, None] * rows
    return nothing.index_add(0, tokens, moved), nothing.index_add(0, tokens, moved.abs())


def decode(codes: SparseCodes, W: Tensor, got: Tensor) -> float:
    tokens = some(codes.n_tokens, TOKENS, W.device)
    return within(got[tokens], *decoded(codes[tokens], W), "decode")


def decode_error(codes: SparseCodes, W: Tensor, target: Tensor, got: tuple[Tensor, Tensor]) -> float:
    tokens = some(codes.n_tokens, TOKENS, W.device)
    truth, size = decoded(codes[tokens], W)
    goal = target[tokens].double()
    return errors(truth - goal, size + goal.abs(), got[0][tokens], got[1][tokens])


def active_dot(codes: SparseCodes, x: Tensor, W: Tensor, got: Tensor) -> float:
    """got: like codes.acts."""
    spots = some(codes.n_tokens, TOKENS, W.device)
    few, dots, x = codes[spots], replace(codes, acts=got)[spots].acts, x[spots].double()
    tokens, _, rows = gathered(few, W)
    truth, size = (x[tokens] * rows).sum(-1), (x[tokens] * rows).abs().sum(-1)
    stored = few.occupied()
    if bool((dots[~stored] != 0).any()):
        raise AssertionError("active_dot: an empty slot is not 0")
    return within(dots[stored], truth, size, "active_dot")


def latents_of(codes: SparseCodes) -> Tensor:
    """Some latents, ascending, with the most used one."""
    used = torch.bincount(codes.indices[codes.occupied()].long(), minlength=codes.d_sae)
    return torch.cat([some(codes.d_sae, LATENTS, used.device), used.argmax()[None]]).unique()


def columns(codes: SparseCodes, latents: Tensor) -> Tensor:
    """A[:, latents] in float64, (N, LATENTS)."""
    place = torch.full((codes.d_sae,), -1, device=latents.device)
    place[latents] = torch.arange(len(latents), device=latents.device)
    stored, width = codes.occupied().flatten(), len(latents)
    at = place[codes.indices.flatten()[stored].long()]
    mine = at >= 0
    where = codes.token_ids()[stored][mine] * width + at[mine]
    flat = torch.zeros(codes.n_tokens * width, dtype=torch.float64, device=latents.device)
    return flat.index_add(0, where, codes.acts.flatten()[stored][mine].double()).view(-1, width)


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
    """Runs the problem's update in place and checks LATENTS rows of all that it wrote (b_dec, which all latents share,
    is checked by the small cases and by the whole step).
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
