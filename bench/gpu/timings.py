"""Whole training steps: checked, then timed. A wrong result is not timed. (Single ops: op_times.py.)"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import check, contestants, memory, peers
from bench.cases import Case, Inputs
from bench.contestants import Contestant
from bench.dense import LR, Compiled, Dense
from bench.gpu.check_steps import has_graphs
from bench.gpu.clock import PartWatch, extra_peak_bytes, measure
from bench.gpu.faults import NotThere, free
from bench.gpu.op_times import build, seconds_of
from bench.gpu.plan import Job, Settings
from bench.ours import Fused, FusedByPart
from bench.run import rotating
from bench.timing import Sample

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
    """The items of the jobs "steps-<case>-<backend>", ours, "steps-<case>" and "more-steps-<case>", contestants; and of
    "sweep-<backend>", cases of our own.
    """

    def __init__(self, job: Job, settings: Settings) -> None:
        self.device, self.backend, self.toy = settings.device, job.backend, settings.is_toy
        self.seconds = seconds_of(settings)
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
        torch.compiler.reset()  # drop an earlier contestant's tensors and its share of recompilations
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
