"""`python -m bench.batch`: B small SAEs trained at once, against the same SAEs trained one after the other.

Contestants: a BatchTrainStep over all; B of them with one SAE each; B FusedTrainSteps; B PlainTrainSteps. All make the
same updates, which is checked first. Then they are timed in turns, at the size of the `clustering` system and at other
sizes, to find the size above which single steps are faster. Writes bench/results/<device>/batch/batch.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastsae
from bench.machine import describe, device_folder
from bench.plot import table
from bench.results import RESULTS
from bench.timing import Sample
from fastsae.atomic import write_json
from fastsae.training.batch import BatchTrainStep, SAEBatch
from fastsae.training.step import PlainTrainStep

CLUSTERING = {"B": 10, "N": 100, "D": 100, "M": 18, "K": 1}
SIZES = [{"B": 4, "N": N, "D": 128, "M": M, "K": 8} for N, M in ((256, 256), (256, 1024), (1024, 1024), (1024, 4096))]


def contestants(case: dict[str, int], seed: int = 0) -> dict[str, Callable[[Tensor], list[Tensor]]]:
    """Functions by name, from x (B, N, D) to the losses of one update of all SAEs."""
    B, D, M = case["B"], case["D"], case["M"]
    rule, seeds = fastsae.TopK(case["K"]), range(seed, seed + case["B"])
    adam: dict[str, Any] = {"lr": 1e-4, "optimizer": "adamw", "weight_decay": 0.01}
    saes: dict[str, Any] = {"ghost": "pull", "ghost_coef": 0.1, "dead_after": 1000} if case["K"] == 1 else {}
    together = BatchTrainStep(SAEBatch(B, D, M, rule, seeds=seeds, **saes), measure=False, **adam)
    each = [BatchTrainStep(SAEBatch(1, D, M, rule, seeds=[s], **saes), measure=False, **adam) for s in seeds]
    fused, plain = (
        [kind(fastsae.SparseAutoencoder(D, M, rule, seed=s, **saes), **adam) for s in seeds]
        for kind in (fastsae.FusedTrainStep, PlainTrainStep)
    )
    return {
        "all at once": lambda x: list(together(x)["loss"]),
        "batches of one, in turn": lambda x: [step(x[i : i + 1])["loss"][0] for i, step in enumerate(each)],
        "fused steps in turn": lambda x: [step(x[i])["loss"] for i, step in enumerate(fused)],
        "plain steps in turn": lambda x: [step(x[i])["loss"] for i, step in enumerate(plain)],
    }


def inputs(case: dict[str, int]) -> Tensor:
    """Similarities of points to anchors, as the clustering system has them: correlated, between 0 and 1."""
    g = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(case["M"], 2, generator=g)
    points = [centres[torch.randint(case["M"], (n,), generator=g)] for n in (case["B"] * case["N"], case["D"])]
    noisy = [p + 0.3 * torch.randn(p.shape, generator=g) for p in points]
    return torch.exp(-torch.cdist(noisy[0], noisy[1]).square() / 2).view(case["B"], case["N"], case["D"])


def measure(case: dict[str, int], seconds: float) -> dict[str, Any]:
    """Times every contestant in turns, for about `seconds` in total. Raises ValueError if their losses differ."""
    x, steps = inputs(case), contestants(case)
    for _ in range(3):
        losses = {name: torch.stack(step(x)) for name, step in steps.items()}
        truth = losses["plain steps in turn"]
        for name, loss in losses.items():
            if not torch.allclose(loss.float(), truth.float(), rtol=1e-3):
                raise ValueError(f"{name} has losses {loss.tolist()}, but plain steps have {truth.tolist()}")
    times: dict[str, list[float]] = {name: [] for name in steps}
    begin = time.perf_counter()
    while len(times["all at once"]) < 5 or time.perf_counter() - begin < seconds:
        for name, step in steps.items():
            step(x)  # untimed: warms the caches as in a run without the other contestants
            start = time.perf_counter()
            step(x)
            times[name].append(time.perf_counter() - start)
    return {"case": case, "contestants": {name: Sample.of(taken).in_ms() for name, taken in times.items()}}


def shown(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    names = list(results[0]["contestants"])
    lines = []
    for result in results:
        ms = {name: result["contestants"][name]["ms"] for name in names}
        best = ms[names[0]]
        rest = [f"{ms[name]:.2f} ({ms[name] / best:.1f}×)" for name in names[1:]]
        lines.append([", ".join(f"{k}={v}" for k, v in result["case"].items()), f"{best:.2f}", *rest])
    return table(["milliseconds for one update of all", *names], lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.batch", description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help="default: bench/results/<device>/batch")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each size")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    out = options.out or RESULTS / device_folder() / "batch"
    results = []
    for case in (CLUSTERING, *SIZES):
        results.append(measure(case, options.seconds))
        print(json.dumps(results[-1]), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "batch.json", {"format": 1, "machine": describe(), "threads": options.threads, "results": results})
    print(shown(results))


if __name__ == "__main__":
    main()
