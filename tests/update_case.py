"""One update_latents_ on an SAE in the middle of training, and how far from float64 each of its outputs may be.

The outputs are checked stage by stage, so that each has a bound: the moments against the true gradients, projection,
clipping and averages; the weights against the float64 step from the moments that the backend wrote. Adam divides by √v,
which turns rounding noise in a tiny gradient into a step of any size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from fastsae import SparseCodes, UpdateTerm, ops, reference
from fastsae.reference import Optimizer, Params, Parts
from tests import truth
from tests.cases import Case

NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")
BETAS, EPS = (0.9, 0.999), 1e-8

CPU_DOUBLE = [pytest.param("cpu", torch.float64, id="cpu-float64")] if "cpu" in truth.BACKENDS else []
every_backend = pytest.mark.parametrize(
    ("backend", "dtype"), truth.backend_dtypes(*truth.NARROW, torch.float64) + CPU_DOUBLE
)
# For large sets of settings: GPU backends run in float32 only, since their kernels may be interpreted or emulated.
most_backends = pytest.mark.parametrize(
    ("backend", "dtype"),
    [p for p in truth.backend_dtypes(*truth.NARROW, torch.float64) if p.values[0] not in truth.GPU
     or p.values[1] == torch.float32] + CPU_DOUBLE,
)  # fmt: skip


@dataclass
class Problem:
    """An SAE in the middle of training, and the terms of one step."""

    params: Params
    moments: list[Tensor]
    terms: list[UpdateTerm]
    settings: dict = field(default_factory=dict)
    step: int = 3
    lr: float = 1e-2

    def run(self, backend: str, **extra) -> Tensor:
        return ops.update_latents_(
            *(self.params.get(name) for name in NAMES),
            self.moments,
            self.terms,
            lr=torch.tensor(self.lr, dtype=torch.float64),
            step=torch.tensor(self.step),
            betas=BETAS,
            eps=EPS,
            backend=backend,
            **self.settings,
            **extra,
        )

    def wide(self) -> tuple[Params, list[reference.Term]]:
        terms = [
            reference.Term(
                t.codes.to(torch.float64).to_dense(), t.x.double(), t.grad.double(), t.has_bias, dense_dacts(t)
            )
            for t in self.terms
        ]
        return {name: p.double().clone() for name, p in self.params.items()}, terms

    def rule(self) -> Optimizer:
        kind, decay = self.settings.get("optimizer", "adam"), self.settings.get("weight_decay", 0.0)
        return Optimizer(kind, BETAS, EPS, decay)

    def parts(self) -> Parts:
        """The parts of the gradients that come from no term, in float64."""
        *encoder, decoder, pre = self.settings.get("added") or (None, None)
        given = (self.settings.get("decoder_pull"), self.settings.get("db_enc"), *(encoder or [None]), decoder, pre)
        return Parts(*(None if t is None else t.double() for t in given))


def dense_dacts(t: UpdateTerm) -> Tensor | None:
    """dacts as (N, M) float64, without the values in empty slots."""
    if t.dacts is None:
        return None
    occupied, tokens = t.codes.occupied().flatten(), t.codes.token_ids()
    dense = torch.zeros(t.codes.n_tokens, t.codes.d_sae, dtype=torch.float64)
    dense[tokens[occupied], t.codes.indices.flatten()[occupied].long()] = t.dacts.flatten()[occupied].double()
    return dense


def make_problem(
    case: Case,
    dtype: torch.dtype,
    *,
    tied: bool = False,
    unit_norm: bool = True,
    pre_bias: bool = True,
    d_out: int | None = None,
    aux: bool = False,
    ragged: bool = False,
) -> Problem:
    g = torch.Generator().manual_seed(1)
    codes, x, W = (truth.ragged_codes if ragged else truth.fixed_codes)(case, dtype)
    D_out = d_out or case.D
    x = x.contiguous()

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    W_dec = reference.normalize(randn(case.M, D_out).double()).to(dtype)
    params = {"W_enc": W.contiguous(), "W_dec": W_dec, "b_enc": randn(case.M), "b_dec": randn(D_out)}
    if tied:
        del params["W_enc"]
    moment_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    moments = []
    for p in params.values():
        moments += [0.1 * randn(*p.shape).to(moment_dtype), 0.1 * randn(*p.shape).to(moment_dtype).square()]
    terms = [UpdateTerm(codes.flatten(), x, randn(case.N, D_out))]
    if aux:
        few = SparseCodes.from_dense(
            torch.where(codes.to_dense() != 0, 0, torch.rand(case.N, case.M, generator=g) > 0.9)
        )
        terms.append(UpdateTerm(few.to(dtype), x, randn(case.N, D_out), has_bias=False))
    settings = {"unit_norm": unit_norm, "pre_bias": pre_bias and D_out == case.D}
    return Problem(params, moments, terms, settings)


def gradient_truth(problem: Problem) -> tuple[Params, Params]:
    """The optimizer's gradients in float64, and their magnitudes: the same sums with every sign positive."""
    params, terms = problem.wide()
    settings, parts = problem.settings, problem.parts()
    grads = reference.gradients(params, terms, settings["pre_bias"], parts)
    positive = {name: p.abs() for name, p in params.items()}
    sizes = [
        reference.Term(t.A.abs(), t.x.abs(), t.grad.abs(), t.has_bias, None if t.dA is None else t.dA.abs())
        for t in terms
    ]
    given = (parts.decoder_pull, None, parts.W_enc, parts.W_dec, parts.pre)
    magnitudes = reference.gradients(positive, sizes, False, Parts(*(None if t is None else t.abs() for t in given)))
    if settings["pre_bias"]:
        magnitudes["b_dec"] += magnitudes["b_enc"] @ positive.get("W_enc", positive["W_dec"])
    if parts.db_enc is not None:
        magnitudes["b_enc"] = magnitudes["b_enc"] + parts.db_enc.abs()
    if settings["unit_norm"]:
        W, size = params["W_dec"], magnitudes["W_dec"]
        grads["W_dec"] = reference.project(grads["W_dec"], W)
        squares = W.square().sum(-1, keepdim=True)
        magnitudes["W_dec"] = size + (size * W.abs()).sum(-1, keepdim=True) * W.abs() / squares
    if (most := settings.get("clip_rows")) is not None:
        for name in set(grads) & {"W_enc", "W_dec"}:
            g, size = grads[name], magnitudes[name]
            norm = g.norm(dim=-1, keepdim=True)
            factor = torch.where(norm > most, most / norm, 1)
            unit = g.abs() / torch.where(norm > 0, norm, 1)
            grads[name], magnitudes[name] = factor * g, factor * (size + unit * size.norm(dim=-1, keepdim=True))
    if (scale := settings.get("grad_scale")) is not None:
        grads = {name: g * scale for name, g in grads.items()}
        magnitudes = {name: size * scale for name, size in magnitudes.items()}
    return grads, magnitudes


def check(problem: Problem, backend: str) -> None:
    """Runs one step and compares everything it wrote with float64."""
    before, terms = problem.wide()
    old = [m.double().clone() for m in problem.moments]
    grads, magnitudes = gradient_truth(problem)
    stats = problem.run(backend)

    raw = reference.gradients(before, terms, problem.settings["pre_bias"], problem.parts())
    assert stats.dtype == torch.float64
    torch.testing.assert_close(stats, reference.squared_norms(raw), rtol=1e-4, atol=1e-10)
    kept = len(problem.rule().moments)
    for i, (name, p) in enumerate(before.items()):
        here = slice(i * kept, (i + 1) * kept)
        move = _check_moments(problem, name, old[here], problem.moments[here], grads[name], magnitudes[name])
        new = p * (1 - problem.lr * problem.rule().weight_decay) - problem.lr * move
        size = p.abs() + (problem.lr * move).abs()
        if name == "W_dec" and problem.settings["unit_norm"]:
            new = reference.normalize(new)
            size = size + new.abs()
        got = problem.params[name]
        # Where rounding decides a sign, the entry is not compared; in a normalized row then no entry is.
        sure = move.isfinite()
        if name == "W_dec" and problem.settings["unit_norm"]:
            sure = sure.all(-1, keepdim=True).expand_as(sure)
        truth.assert_within(torch.where(sure, got, 0), torch.where(sure, new, 0), torch.where(sure, size, 0), name)
        assert bool(got.isfinite().all())


def _check_moments(
    problem: Problem, name: str, old: list[Tensor], moments: list[Tensor], g: Tensor, size: Tensor
) -> Tensor:
    """Checks the written moments. Returns how far p moves at a rate of 1, NaN where rounding decides the sign."""
    (beta1, beta2), kind = BETAS, problem.rule().kind
    if kind in ("adam", "adamw"):
        m, v = moments
        m_true, v_true = beta1 * old[0] + (1 - beta1) * g, beta2 * old[1] + (1 - beta2) * g**2
        truth.assert_within(m, m_true, beta1 * old[0].abs() + (1 - beta1) * size, f"m of {name}")
        truth.assert_within(v, v_true, beta2 * old[1] + 2 * (1 - beta2) * size**2, f"v of {name}")
        move = m.double() / (1 - beta1**problem.step)
        return move / (v.double().sqrt() / (1 - beta2**problem.step) ** 0.5 + EPS)
    turning, error = g, size
    if kind == "lion":
        m_true = beta2 * old[0] + (1 - beta2) * g
        truth.assert_within(moments[0], m_true, beta2 * old[0].abs() + (1 - beta2) * size, f"m of {name}")
        turning, error = beta1 * old[0] + (1 - beta1) * g, beta1 * old[0].abs() + (1 - beta1) * size
    open_sign = (turning.abs() <= truth.bound(turning, error, problem.params[name].dtype)) & (error > 0)
    return torch.where(open_sign, torch.nan, turning.sign())
