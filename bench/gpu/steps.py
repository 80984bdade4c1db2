"""Whole training steps, ours and others'; whether a CUDA graph's step is the step; and the kernels of a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench import check, contestants, memory, peers
from bench.contestants import Contestant
from bench.dense import Compiled, Dense
from bench.gpu.clock import extra_peak_bytes, measure
from bench.gpu.op_times import build, seconds_of
from bench.gpu.plan import Job, NotThere, Settings
from bench.ours import Fused
from bench.run import rotating

COMPARED = 4
"""Steps: a graph is captured in the third, and replayed in the fourth."""
PROFILED, SHOWN = 5, 25
"""Steps, and the kernels that took longest."""


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """The tensors that are not the same bits."""
    return [name for name, t in ours.items() if not torch.equal(t.view(torch.uint8), theirs[name].view(torch.uint8))]


class Steps:
    """The items of the jobs "steps-<case>-<backend>", "profile-<case>-<backend>", ours, and of the contestants'."""

    def __init__(self, job: Job, settings: Settings) -> None:
        assert job.case is not None
        self.case, self.device, self.backend = settings.cases[job.case], settings.device, job.backend
        self.seconds, self.inputs = seconds_of(settings), build(settings.cases[job.case], settings.device)

    def __call__(self, item: str) -> dict[str, Any]:
        match item:
            case "kernels":
                return self.kernels()
            case "graph is step":
                return self.graph_is_step()
            case "fastsae" | "fastsae graph":
                return self.ours(graph=item == "fastsae graph")
        return self.theirs(item)

    def fused(self, graph: bool) -> Fused:
        if graph and self.device != "cuda":
            raise NotThere("a CUDA graph needs a CUDA device")
        return Fused(self.inputs, self.case.K, backend=self.backend, cuda_graph=graph)

    def times(self, made: Any, step: Any) -> dict[str, Any]:
        whole = measure(rotating(self.inputs, step), self.device, self.seconds)
        alone = measure(rotating(self.inputs, made.encode), self.device, self.seconds / 2, flush=True)
        return {"step": whole.in_ms(), "encode": alone.in_ms()}

    def ours(self, graph: bool) -> dict[str, Any]:
        """The forward pass and the selection of some tokens are compared with float64 first, at this size."""
        made = self.fused(graph)
        acts, recon = check.truth(self.inputs, self.case.K)
        check.check_forward(made, self.inputs, recon)
        check.check_selection(made, self.inputs, acts)
        del acts, recon
        found = self.times(made, made.train_step)
        for x in self.inputs.batches:
            made.step(x)
        if (redone := made.redone()) is not None:
            found["redone_share"], found["redone_share_max"] = redone
        # A graph allocated its memory when it was captured: replaying it shows nothing.
        found["extra_peak_bytes"] = None if graph else extra_peak_bytes(made.train_step, self.inputs.x)
        found["memory_bound_bytes"] = memory.bound(self.case.N, self.case.D, self.case.M)
        return found

    def theirs(self, name: str) -> dict[str, Any]:
        if name in peers.PEERS and (reason := contestants.unavailable(name)):
            raise NotThere(reason)
        torch.compiler.reset()  # drop an earlier contestant's tensors and its share of recompilations
        made: Contestant
        if name.startswith("dense"):
            kind = Compiled if "compiled" in name else Dense
            made = kind(self.inputs, self.case.K, autocast="bf16" in name, tf32="tf32" in name)
        else:
            made = contestants.make(name, self.inputs, self.case.K)
        check.check_forward(made, self.inputs, check.truth(self.inputs, self.case.K)[1])
        found = self.times(made, made.step) | {"extra_peak_bytes": extra_peak_bytes(made.step, self.inputs.x)}
        return found | ({"version": peers.version(name)} if name in peers.PEERS else {})

    def after(self, made: Fused) -> dict[str, Tensor]:
        """What COMPARED steps leave behind, on the host, so that two models need not fit the device."""
        batches = [self.inputs.batches[i % len(self.inputs.batches)] for i in range(COMPARED)]
        losses = torch.stack([made.step(x).detach().clone() for x in batches])
        return {name: p.detach().cpu() for name, p in made.sae.named_parameters()} | {"losses": losses.cpu()}

    def graph_is_step(self) -> dict[str, Any]:
        """Steps with and without a graph, from the same weights, on the same batches: equal in every bit."""
        wrong = differing(self.after(self.fused(graph=False)), self.after(self.fused(graph=True)))
        if wrong:
            raise AssertionError(f"{COMPARED} steps with a graph leave other bits than without: {', '.join(wrong)}")
        return {"summary": f"{COMPARED} steps leave the same bits"}

    def kernels(self) -> dict[str, Any]:
        """The kernels of a step that took longest: how often a step launches one, and its mean time."""
        made = self.fused(graph=False)
        call = rotating(self.inputs, made.train_step)
        for _ in range(3):
            call()
        activity = torch.profiler.ProfilerActivity
        wanted = activity.CUDA if self.device == "cuda" else activity.CPU
        with torch.profiler.profile(activities=[wanted]) as profiled:
            for _ in range(PROFILED):
                call()
            if self.device == "cuda":
                torch.cuda.synchronize()
        own = "self_device_time_total" if self.device == "cuda" else "self_cpu_time_total"
        events = sorted(profiled.key_averages(), key=lambda event: -getattr(event, own))
        rows = [
            {"kernel": e.key[:160], "count": e.count / PROFILED, "mean_us": getattr(e, own) / max(e.count, 1)}
            for e in events if getattr(e, own) > 0
        ]  # fmt: skip
        total = sum(row["count"] * row["mean_us"] for row in rows) / 1e3
        return {"kernels": rows[:SHOWN], "of": len(rows), "busy_ms": total, "summary": f"busy {total:.3g} ms a step"}
