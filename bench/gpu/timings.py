"""Ops and whole steps: checked, then timed. A wrong result is not timed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import cases, check, contestants, memory, peers, real
from bench.cases import Case, Inputs
from bench.contestants import Contestant
from bench.dense import LR, Compiled, Dense
from bench.gpu import spot
from bench.gpu.check_steps import has_graphs
from bench.gpu.clock import PartWatch, extra_peak_bytes, measure
from bench.gpu.faults import NotThere, free
from bench.gpu.plan import Job, Settings
from bench.gpu.spot import Spots
from bench.ours import Fused, FusedByPart
from bench.run import rotating
from bench.timing import Sample
from fastsae import SparseCodes, UpdateTerm, ops

SECONDS, TOY_SECONDS = 0.6, 0.01
"""Of timed runs of one call."""
STEP_BATCHES = (None, 1024, 256)
"""Tokens of the step that is compared with the dense one in fp32: all of them, or as many as the memory holds."""
SWAPPED = 1e-3
"""Share of the rows that may have moved otherwise: where two scores are equal to rounding, the dense reference may
pick the other latent, and both rows then move differently."""
MOVE_OFF = 2e-3

DENSE: dict[str, Callable[[Inputs, int], Contestant]] = {
    "dense tf32": lambda inputs, k: Dense(inputs, k, tf32=True),
    "dense fp32 compiled": Compiled,
    "dense tf32 compiled": lambda inputs, k: Compiled(inputs, k, tf32=True),
    "dense bf16 compiled": lambda inputs, k: Compiled(inputs, k, autocast=True),
}


def build(case: Case, device: str) -> Inputs:
    return cases.build(case, real.rows, real.trained, device)


class OpTimes:
    """The items of a job "ops-<case>"."""

    def __init__(self, job: Job, settings: Settings) -> None:
        assert job.case is not None
        self.device, self.backend = settings.device, job.backend
        self.seconds = TOY_SECONDS if settings.is_toy else SECONDS
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
        checked, call, nnz = getattr(self, item.replace(".", "_"))()
        sample = measure(call, self.device, self.seconds, flush=True)
        return {"time": sample.in_ms(), "nnz": nnz, "worst_of_bound": checked}

    @property
    def nnz(self) -> int:
        return int(self.codes.nnz)

    def _encoder(self, op: Callable[..., Any], *more: Any) -> Callable[[Tensor], Any]:
        screen = ops.prepare_screen(self.W, self.b, x=self.inputs.x, k=self.case.K, backend=self.backend)
        return lambda x: op(x, self.W, self.b, *more, screen=screen, backend=self.backend)

    def encode_topk(self) -> tuple[float, Callable[[], object], int]:
        encode = self._encoder(ops.encode_topk, self.case.K)
        codes = encode(self.inputs.x)
        return self.spots.encode_topk(codes), rotating(self.inputs, encode), int(codes.nnz)

    def encode_batch_topk(self) -> tuple[float, Callable[[], object], int]:
        encode = self._encoder(ops.encode_batch_topk, self.case.K)
        codes = encode(self.inputs.x)
        return self.spots.batch_topk(codes), rotating(self.inputs, encode), int(codes.nnz)

    def encode_above(self) -> tuple[float, Callable[[], object], int]:
        bar = self.spots.threshold()
        encode = self._encoder(ops.encode_above, bar, 2 * self.case.N * self.case.K)
        codes, overflow = encode(self.inputs.x)
        if bool(overflow):
            raise AssertionError(f"more than twice N·K latents are above the bar of about K a token, {bar:.4g}")
        return self.spots.above(codes, bar), rotating(self.inputs, encode), int(codes.nnz)

    def decode(self) -> tuple[float, Callable[[], object], int]:
        W = self.inputs.W_dec
        worst = self.spots.decode(self.codes, W, ops.decode(self.codes, W, backend=self.backend))
        return worst, lambda: ops.decode(self.codes, W, backend=self.backend), self.nnz

    def active_dot(self) -> tuple[float, Callable[[], object], int]:
        x, W = self.inputs.x, self.inputs.W_dec
        worst = self.spots.active_dot(self.codes, W, ops.active_dot(x, self.codes, W, backend=self.backend))
        return worst, lambda: ops.active_dot(x, self.codes, W, backend=self.backend), self.nnz

    def by_latent(self) -> tuple[float, Callable[[], object], int]:
        worst = spot.by_latent(self.codes, ops.by_latent(self.codes, backend=self.backend))
        return worst, lambda: ops.by_latent(self.codes, backend=self.backend), self.nnz

    def active_outer(self) -> tuple[float, Callable[[], object], int]:
        order, grad, M = ops.by_latent(self.codes, backend=self.backend), self.grad, self.case.M

        def call() -> Tensor:
            return ops.active_outer(self.codes, grad, M, by_latent=order, backend=self.backend)

        return spot.active_outer(self.codes, grad, call()), call, self.nnz

    def update_latents_(self) -> tuple[float, Callable[[], object], int]:
        problem = spot.update_problem(self.inputs, self.codes, self.grad)
        worst = spot.update(problem, self.backend)
        screen = ops.prepare_screen(problem.params["W_enc"], problem.params["b_enc"], backend=self.backend)
        problem.terms = [UpdateTerm(self.codes, self.inputs.x, self.grad)]
        return worst, lambda: problem.run(self.backend, screen=screen), self.nnz

    def torch_topk(self) -> tuple[float, Callable[[], object], int]:
        """torch.topk alone on the pre-acts, which everyone else has to form first."""
        pre = torch.relu(F.linear(self.inputs.x, self.W, self.b))
        return 0.0, lambda: pre.topk(self.case.K, dim=-1), self.nnz


def moved_alike(before: Tensor, ours: Tensor, theirs: Tensor, name: str) -> None:
    """The moves of a parameter in norm, leaving out the share SWAPPED of its rows that differ most."""
    off = (ours - theirs).double().square()
    size = (theirs - before).double().square()
    if off.ndim == 2:
        off, size = off.sum(-1), size.sum(-1)
        off = off.sort().values[: len(off) - int(SWAPPED * len(off))]
    share = float((off.sum() / size.sum()).sqrt())
    if not share <= MOVE_OFF:
        raise check.WrongResult(f"fastsae: {name} moved otherwise than in the dense step, by {share:.2e} of the move")


def check_step(case: Case, inputs: Inputs, make: Callable[[Inputs], Fused], x: Tensor) -> None:
    """One whole step from the same weights as the dense one in fp32: the same loss, and the same moves."""
    dense = Dense(inputs, case.K, lr=check.STEP_LR)
    expected = float(dense.step(x))
    theirs = [p.detach() for p in dense.parameters()]
    del dense
    fused = make(inputs)
    got = float(fused.step(x))
    if not abs(got - expected) <= 1e-5 * abs(expected):
        raise check.WrongResult(f"fastsae: the loss of a step is {got!r}, expected {expected!r}")
    for name, moved in zip(("W_enc", "b_enc", "W_dec", "b_dec"), theirs, strict=True):
        moved_alike(getattr(inputs, name), getattr(fused.sae, name).detach(), moved, name)


class StepTimes:
    """The items of the jobs "steps-<case>" and "more-steps-<case>", contestants; and of "sweep", cases of our own."""

    def __init__(self, job: Job, settings: Settings) -> None:
        self.device, self.backend, self.toy = settings.device, job.backend, settings.is_toy
        self.seconds = TOY_SECONDS if settings.is_toy else SECONDS
        self.cases = settings.cases
        self.case = settings.cases[job.case] if job.case else None
        self.inputs: Inputs | None = None

    def __call__(self, item: str) -> dict[str, Any]:
        if self.case is None:
            return self.sweep_point(self.cases[item])
        if self.inputs is None:
            self.inputs = build(self.case, self.device)
            self.acts, self.recon = check.truth(self.inputs, self.case.K)
        return self.contestant(item, self.case, self.inputs)

    def contestant(self, name: str, case: Case, inputs: Inputs) -> dict[str, Any]:
        if name.startswith("fastsae"):
            return self.by_part(case, inputs) if name == "fastsae by part" else self.ours(name, case, inputs)
        if name in peers.PEERS and (reason := contestants.unavailable(name)):
            raise NotThere(reason)
        torch.compiler.reset()  # nothing of an earlier contestant: neither its tensors nor its share of recompilations
        made = DENSE[name](inputs, case.K) if name in DENSE else contestants.make(name, inputs, case.K)
        check.check_forward(made, inputs, self.recon)
        found = self.times(made.step, made.encode, inputs)
        found["extra_peak_bytes"] = extra_peak_bytes(made.step, inputs.x)
        if name in peers.PEERS:
            found["version"] = peers.version(name)
        return found

    def ours(self, name: str, case: Case, inputs: Inputs) -> dict[str, Any]:
        graph = name == "fastsae graph"
        if graph and not has_graphs():
            raise NotThere("not there yet: FusedTrainStep takes no cuda_graph")
        if graph and self.device != "cuda":
            raise NotThere("a CUDA graph needs a CUDA device")

        def make(inputs: Inputs, lr: float = check.STEP_LR) -> Fused:
            return Fused(inputs, case.K, lr=lr, backend=self.backend, cuda_graph=graph)

        tokens = self.check_ours(case, inputs, make)
        timed = make(inputs, LR)
        found = self.times(timed.train_step, timed.encode, inputs)
        for x in inputs.batches:
            timed.step(x)
        if (redone := timed.redone()) is not None:
            found["redone_share"], found["redone_share_max"] = redone
        found["tokens_of_checked_step"] = tokens
        # A graph allocated its memory when it was captured: replaying it shows nothing.
        found["extra_peak_bytes"] = None if graph else extra_peak_bytes(timed.train_step, inputs.x)
        found["memory_bound_bytes"] = memory.bound(case.N, case.D, case.M)
        return found

    def check_ours(self, case: Case, inputs: Inputs, make: Callable[[Inputs], Fused]) -> int:
        """Forward, selection and one whole step. Returns the tokens of that step."""
        fused = make(inputs)
        check.check_forward(fused, inputs, self.recon)
        check.check_selection(fused, inputs, self.acts)
        del fused
        for tokens in STEP_BATCHES:
            x = inputs.x[:tokens]
            try:
                check_step(case, inputs, make, x)
            except torch.OutOfMemoryError:
                gc.collect()
                free()
            else:
                return len(x)
        raise torch.OutOfMemoryError(
            f"a dense fp32 step does not fit beside fastsae's even with {STEP_BATCHES[-1]} tokens"
        )

    def by_part(self, case: Case, inputs: Inputs) -> dict[str, Any]:
        parts, watch = FusedByPart(inputs, case.K, backend=self.backend), PartWatch(self.device)
        expected = float((Dense(inputs, case.K).reconstruct(inputs.x) - inputs.x).square().sum(-1).mean())
        got = float(parts.step(inputs.x))
        if not abs(got - expected) <= 1e-5 * abs(expected):
            raise check.WrongResult(f"fastsae by part: the loss of a step is {got!r}, expected {expected!r}")
        whole = measure(rotating(inputs, parts.step), self.device, self.seconds)

        def step(x: Tensor) -> None:
            watch.start()
            parts.step(x, watch.mark)

        call = rotating(inputs, step)
        for _ in range(max(3, min(whole.n, 50))):
            call()
        return {"parts": {name: sample.in_ms() for name, sample in watch.samples().items()}, "step": whole.in_ms()}

    def times(
        self, step: Callable[[Tensor], object], encode: Callable[[Tensor], object], inputs: Inputs
    ) -> dict[str, Any]:
        whole: Sample = measure(rotating(inputs, step), self.device, self.seconds)
        alone: Sample = measure(rotating(inputs, encode), self.device, self.seconds / 2, flush=True)
        return {"step": whole.in_ms(), "encode": alone.in_ms()}

    def sweep_point(self, case: Case) -> dict[str, Any]:
        """Our own step at one size, as a graph where there are graphs; the selection and forward checked."""
        inputs = build(case, self.device)
        graph = has_graphs() and self.device == "cuda"
        fused = Fused(inputs, case.K, backend=self.backend, cuda_graph=graph)
        acts, recon = check.truth(inputs, case.K)
        check.check_forward(fused, inputs, recon)
        check.check_selection(fused, inputs, acts)
        found = self.times(fused.train_step, fused.encode, inputs)
        del fused
        return found | {"parts": self.by_part(case, inputs)["parts"], "cuda_graph": graph}
