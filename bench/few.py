"""`python -m bench.few`: how long encoding a few tokens takes on a CPU, and at how many tokens a narrow copy pays off.

Contestants, in turns: dense PyTorch (pre-acts and torch.topk in float32); the engine; the engine with a copy of W that
it holds between calls, as a module in eval mode does; with a kept copy (`prepare_screen`), as in training; and both
forced to use a narrow copy for any number of tokens. All must find the same latents, which is checked first. Writes
bench/results/<device>/few.json and renews docs/benchmarks.md from all devices' files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.machine import ROOT, describe, device_folder
from bench.plot import table, with_numbers
from bench.results import RESULTS
from bench.timing import interleaved
from fastsae import ops
from fastsae.atomic import write_json
from fastsae.backends.cpu import screen as narrow_copies

TOKENS = (1, 4, 16, 64, 128, 256)
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- few: begin (python -m bench.few --draw) -->", "<!-- few: end -->"


def contestants(x: Tensor, W: Tensor, b: Tensor, k: int) -> dict[str, Callable[[], Tensor]]:
    """Functions by name that return the chosen latents (N, k), ascending."""
    kept, held = ops.prepare_screen(W, b), ops.HeldScreen()
    ops.encode_topk(x.expand(-(-512 // len(x)), *x.shape), W, b, k, screen=held)  # enough tokens for it to make one

    def dense() -> Tensor:
        return torch.relu(x @ W.mT + b).topk(k).indices

    def engine(screen: Any = None) -> Tensor:
        return ops.encode_topk(x, W, b, k, screen=screen).indices

    def through_a_copy(screen: Any = None) -> Tensor:
        with mock.patch.multiple(narrow_copies, FEW=0, FEW_KEPT=0):
            return engine(screen)

    return {
        "dense": dense, "engine": engine,
        "engine, held copy": lambda: engine(held), "engine, kept copy": lambda: engine(kept),
        "through a copy": through_a_copy, "through a kept copy": lambda: through_a_copy(kept),
    }  # fmt: skip


def measure(N: int, D: int, M: int, k: int, rounds: int) -> dict[str, Any]:
    """Raises ValueError if a contestant finds other latents."""
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(N, D, generator=g), torch.randn(M, D, generator=g) / D**0.5
    calls = contestants(x, W, torch.zeros(M), k)
    expected = calls["engine"]()
    for name, call in calls.items():
        # Dense scores are rounded differently: a near tie may go to another latent.
        agree = (call().sort().values == expected).double().mean().item()
        if agree < (0.999 if name == "dense" else 1):
            raise ValueError(f"{name} agrees with the engine on only {agree:.4f} of the chosen latents")
    return {"N": N, "contestants": {n: s.in_ms() for n, s in interleaved(calls, rounds, min_seconds=0.02).items()}}


def shown(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    names = list(results[0]["contestants"])
    lines = [[str(r["N"]), *(f"{r['contestants'][name]['ms']:.1f}" for name in names)] for r in results]
    return table(["tokens; ms", *names], lines)


def draw() -> None:
    """Puts the tables of all devices into docs/benchmarks.md."""
    parts = []
    for path in sorted(RESULTS.glob("*/few.json")):
        found = json.loads(path.read_text())
        shape = ", ".join(f"{name}={found[name]}" for name in "DMK")
        about = f"{found['machine']['device']}, {found['threads']} threads, {shape} ({path.relative_to(ROOT)}):"
        parts.append(f"{about}\n\n{shown(found['results'])}")
    PAGE.write_text(with_numbers(PAGE.read_text(), "\n\n".join(parts), BEGIN, END))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.few", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="left out: bench/results/<device>")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="how many at a time (%(default)s)")
    shape = (768, 24576, 32)
    parser.add_argument("--shape", type=int, nargs=3, default=shape, metavar=("D", "M", "K"), help="%(default)s")
    parser.add_argument("--rounds", type=int, default=10, help="turns of every contestant (%(default)s)")
    parser.add_argument("--draw", action="store_true", help="only renew docs/benchmarks.md, from the stored results")
    options = parser.parse_args()
    if options.draw:
        return draw()
    D, M, k = options.shape
    results = [measure(N, D, M, k, options.rounds) for N in options.tokens]
    path = (options.out or RESULTS / device_folder()) / "few.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"format": 1, "machine": describe(), "threads": torch.get_num_threads()}
    write_json(path, about | {"D": D, "M": M, "K": k, "results": results})
    print(shown(results))
    print(f"written: {path}")
    if options.out is None:
        draw()


if __name__ == "__main__":
    main()
