"""Single ops of one backend: checked, then timed. A wrong result is not timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import cases, real
from bench.cases import Case, Inputs
from bench.gpu import layouts, spot
from bench.gpu.clock import measure
from bench.gpu.plan import Job, Settings
from bench.gpu.spot import Spots
from bench.run import rotating
from fastsae import LatentOrder, SparseCodes, UpdateTerm, ops

SECONDS, TOY_SECONDS = 0.6, 0.01
"""How long the timed runs of one call last."""
DEAD = 8
"""One latent in so many is listed in the rows of an encode."""
Timed = tuple[float, Callable[[], object], int]
"""The largest error in units of the bound, what to time, and how many activations are stored."""


def build(case: Case, device: str) -> Inputs:
    return cases.build(case, real.rows, real.trained, device)


def seconds_of(settings: Settings) -> float:
    return TOY_SECONDS if settings.is_toy else SECONDS


def timed(found: Timed, device: str, seconds: float) -> dict[str, Any]:
    """The result of an item, once it was checked."""
    worst, call, nnz = found
    return {"time": measure(call, device, seconds, flush=True).in_ms(), "nnz": nnz, "worst_of_bound": worst}


class OpTimes:
    """The items of a job "ops-<case>-<backend>": the ops on the inputs of a case."""

    def __init__(self, job: Job, settings: Settings) -> None:
        assert job.case is not None
        self.device, self.backend = settings.device, job.backend
        self.seconds = seconds_of(settings)
        case = self.case = settings.cases[job.case]
        self.inputs = build(case, self.device)
        self.spots = Spots(self.inputs, case.K)
        self.W, self.b = self.inputs.W_enc, self.inputs.b_enc
        # From torch, so that a broken encoder does not keep the other ops from being timed.
        pre = torch.relu(torch.addmm(self.b, self.inputs.x, self.W.T))
        acts, indices = pre.topk(case.K, dim=-1)
        del pre
        indices, order = indices.sort(dim=-1)
        self.codes = SparseCodes(acts.gather(-1, order), indices.int(), case.M)
        self.grad = (torch.randn_like(self.inputs.x)) * (2 / case.N)

    def __call__(self, item: str) -> dict[str, Any]:
        return timed(getattr(self, item.replace(".", "_").replace(" ", "_"))(), self.device, self.seconds)

    @property
    def nnz(self) -> int:
        return int(self.codes.nnz)

    def _encoder(self, op: Callable[..., Any], *more: Any) -> Callable[[Tensor], Any]:
        screen = ops.prepare_screen(self.W, self.b, x=self.inputs.x, k=self.case.K, backend=self.backend)
        return lambda x: op(x, self.W, self.b, *more, screen=screen, backend=self.backend)

    def encode_topk(self) -> Timed:
        encode = self._encoder(ops.encode_topk, self.case.K)
        codes = encode(self.inputs.x)
        return self.spots.encode_topk(codes), rotating(self.inputs, encode), int(codes.nnz)

    def encode_topk_rows(self) -> Timed:
        """Of every eighth latent, in a list with room for all of them, as AuxK asks for the dead ones."""
        rows = torch.full((self.case.M,), -1, dtype=torch.int32, device=self.device)
        listed = torch.arange(0, self.case.M, DEAD, dtype=torch.int32, device=self.device)
        rows[: len(listed)] = listed
        screen = ops.prepare_screen(self.W, self.b, backend=self.backend)

        def encode(x: Tensor) -> SparseCodes:
            return ops.encode_topk(x, self.W, self.b, self.case.K, rows=rows, screen=screen, backend=self.backend)

        codes = encode(self.inputs.x)
        return self.spots.encode_topk(codes, listed), rotating(self.inputs, encode), int(codes.nnz)

    def encode_batch_topk(self) -> Timed:
        encode = self._encoder(ops.encode_batch_topk, self.case.K)
        codes = encode(self.inputs.x)
        return self.spots.batch_topk(codes), rotating(self.inputs, encode), int(codes.nnz)

    def encode_above(self) -> Timed:
        bar = self.spots.threshold()
        encode = self._encoder(ops.encode_above, bar, 2 * self.case.N * self.case.K)
        codes, overflow = encode(self.inputs.x)
        if bool(overflow):
            raise AssertionError(f"more than twice N·K latents are above the bar of about K a token, {bar:.4g}")
        return self.spots.above(codes, bar), rotating(self.inputs, encode), int(codes.nnz)

    def decode(self) -> Timed:
        W = self.inputs.W_dec
        worst = spot.decode(self.codes, W, ops.decode(self.codes, W, backend=self.backend))
        return worst, lambda: ops.decode(self.codes, W, backend=self.backend), self.nnz

    def decode_error(self) -> Timed:
        x, W = self.inputs.x, self.inputs.W_dec

        def call() -> tuple[Tensor, Tensor]:
            return ops.decode_error(self.codes, W, x, backend=self.backend)

        return spot.decode_error(self.codes, W, x, call()), call, self.nnz

    def active_dot(self) -> Timed:
        x, W = self.inputs.x, self.inputs.W_dec
        worst = spot.active_dot(self.codes, x, W, ops.active_dot(x, self.codes, W, backend=self.backend))
        return worst, lambda: ops.active_dot(x, self.codes, W, backend=self.backend), self.nnz

    def by_latent(self) -> Timed:
        worst = spot.by_latent(self.codes, ops.by_latent(self.codes, backend=self.backend))
        return worst, lambda: ops.by_latent(self.codes, backend=self.backend), self.nnz

    def active_outer(self) -> Timed:
        order, grad, M = ops.by_latent(self.codes, backend=self.backend), self.grad, self.case.M

        def call() -> Tensor:
            return ops.active_outer(self.codes, grad, M, by_latent=order, backend=self.backend)

        return spot.active_outer(self.codes, grad, call()), call, self.nnz

    def update_latents_(self) -> Timed:
        problem = spot.update_problem(self.inputs, self.codes, self.grad)
        worst = spot.update(problem, self.backend)
        screen = ops.prepare_screen(problem.params["W_enc"], problem.params["b_enc"], backend=self.backend)
        problem.terms = [UpdateTerm(self.codes, self.inputs.x, self.grad)]
        return worst, lambda: problem.run(self.backend, screen=screen), self.nnz

    def torch_topk(self) -> Timed:
        """torch.topk alone on the pre-acts, which all the others have to compute first."""
        pre = torch.relu(F.linear(self.inputs.x, self.W, self.b))
        return 0.0, lambda: pre.topk(self.case.K, dim=-1), self.nnz


class Layouts:
    """A case's sizes without its inputs: codes of every layout, x and W. Items are "<op> <layout>"."""

    def __init__(self, job: Job, settings: Settings) -> None:
        assert job.case is not None
        case = self.case = settings.cases[job.case]
        self.device, self.backend, self.seconds = settings.device, job.backend, seconds_of(settings)
        generator = torch.Generator(self.device).manual_seed(case.seed)
        self.x, self.W = (torch.randn(n, case.D, generator=generator, device=self.device) for n in (case.N, case.M))

    def __call__(self, item: str) -> dict[str, Any]:
        op, layout = item.split()
        codes = layouts.make(layout, self.case, self.device)
        worst, call = getattr(self, op)(codes)
        return timed((worst, call, int(codes.nnz)), self.device, self.seconds)


class CodeTimes(Layouts):
    """The items of a job "codes-<case>-<backend>": the ops of a backend on those codes."""

    def decode(self, codes: SparseCodes) -> tuple[float, Callable[[], object]]:
        def call() -> Tensor:
            return ops.decode(codes, self.W, backend=self.backend)

        return spot.decode(codes, self.W, call()), call

    def decode_error(self, codes: SparseCodes) -> tuple[float, Callable[[], object]]:
        def call() -> tuple[Tensor, Tensor]:
            return ops.decode_error(codes, self.W, self.x, backend=self.backend)

        return spot.decode_error(codes, self.W, self.x, call()), call

    def active_dot(self, codes: SparseCodes) -> tuple[float, Callable[[], object]]:
        def call() -> Tensor:
            return ops.active_dot(self.x, codes, self.W, backend=self.backend)

        return spot.active_dot(codes, self.x, self.W, call()), call

    def active_outer(self, codes: SparseCodes) -> tuple[float, Callable[[], object]]:
        """Without the regrouping by latent."""
        order = ops.by_latent(codes, backend=self.backend)

        def call() -> Tensor:
            return ops.active_outer(codes, self.x, self.case.M, by_latent=order, backend=self.backend)

        return spot.active_outer(codes, self.x, call()), call

    def active_outer_regrouped(self, codes: SparseCodes) -> tuple[float, Callable[[], object]]:
        """Regrouping included."""

        def call() -> Tensor:
            return ops.active_outer(codes, self.x, self.case.M, backend=self.backend)

        return spot.active_outer(codes, self.x, call()), call

    def by_latent(self, codes: SparseCodes) -> tuple[float, Callable[[], object]]:
        def call() -> LatentOrder:
            return ops.by_latent(codes, backend=self.backend)

        return spot.by_latent(codes, call()), call
