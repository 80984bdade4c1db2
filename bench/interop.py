"""`python -m bench.interop`: a training step of SAELens, dictionary_learning and sparsify, before and after accelerate.

Each library's own step in fp32, as its trainer makes it, three times in turns: as it is; with its SAE given to
`fastsae.accelerate` and its own torch optimizer; and with `fastsae.optim.Adam` in the optimizer's place. All start from
the same weights and get the same batches; the losses of their first steps are compared before anything is timed.
Writes bench/results/<device>/interop.json. `.venv-peers` has the libraries (`make .venv-peers/.installed`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import fastsae
from bench import cases, peers, real
from bench.cases import Inputs
from bench.dense import LR
from bench.machine import describe, device_folder
from bench.plot import table
from bench.results import RESULTS
from bench.run import rotating, shape
from bench.timing import interleaved
from fastsae.atomic import write_json

LIBRARIES = ("sae-lens", "dictionary-learning", "sparsify")
AS_IT_IS, SWAPPED, FUSED = WAYS = ("as it is", "accelerated", "accelerated, fastsae.optim")
STEPS = 3
"""Steps whose losses are compared."""
TOLERANCE = 1e-3
"""Relative: fp32 sums of thousands of terms, in another order, three steps on."""


def contestant(library: str, way: str, inputs: Inputs, k: int) -> Any:
    """The library's training step, from the inputs' weights."""
    made = peers.PEERS[library][1](inputs, k)
    if way == AS_IT_IS:
        return made
    if way == FUSED and hasattr(made, "trainer"):
        fastsae.accelerate(made.trainer)
        return made
    fastsae.accelerate(made.sae)
    if way == FUSED:
        made.optimizer = fastsae.optim.Adam(made.sae, lr=LR)
    return made


def measure(library: str, inputs: Inputs, k: int, rounds: int, bar: tqdm) -> dict[str, Any]:
    """Milliseconds of a step, each way. Raises ValueError where a loss differs from the library's own."""
    calls: dict[str, Callable[[], Any]] = {
        way: rotating(inputs, contestant(library, way, inputs, k).step) for way in WAYS
    }
    losses = {way: [float(call()) for _ in range(STEPS)] for way, call in calls.items()}
    for way, found in losses.items():
        for step, (got, expected) in enumerate(zip(found, losses[AS_IT_IS], strict=True)):
            if not abs(got - expected) <= TOLERANCE * abs(expected):
                raise ValueError(
                    f"{library}, {way}: the loss of step {step} is {got:.7g}, and the library's own is {expected:.7g}; "
                    "nothing is timed"
                )
    times = interleaved(calls, rounds, min_seconds=0.2, on_round=lambda _: bar.update())
    return {
        "version": peers.version(library), "losses": losses,
        "ways": {way: sample.in_ms() for way, sample in times.items()},
    }  # fmt: skip


def shown(results: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table: milliseconds, and how many times as fast as the library as it is."""

    def cell(ways: dict[str, dict[str, float]], way: str) -> str:
        times = f"{ways[way]['ms']:,.0f}"
        return times if way == AS_IT_IS else f"{times} ({ways[AS_IT_IS]['ms'] / ways[way]['ms']:.1f}×)"

    lines = [[found["version"], *(cell(found["ways"], way) for way in WAYS)] for found in results.values()]
    return table(["training step, ms", *WAYS], lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.interop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=shape, metavar="N,D,M,K", help="left out: 4096,768,24576,32")
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=LIBRARIES, help="these only")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every contestant (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path, help="folder of the result; left out: bench/results/<device>")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    for library in options.libraries:
        if reason := peers.unavailable(library):
            print(f"{reason} into .venv-peers: .venv-peers/bin/python -m bench.interop", file=sys.stderr)
            return 2
    case = cases.PRIMARY if options.shape is None else cases.named(options.shape)
    inputs = cases.build(case, real.rows, real.trained)
    results = {}
    with tqdm(total=len(options.libraries) * options.rounds, unit="round") as bar:
        for library in options.libraries:
            bar.set_description(library)
            results[library] = measure(library, inputs, case.K, options.rounds, bar)
    path = (options.out or RESULTS / device_folder()) / "interop.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = {name: getattr(case, name) for name in "NDMK"}
    write_json(path, {"format": 1, "machine": describe(), **sizes, "libraries": results})
    print(shown(results))
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
