"""`python -m bench.parallel`: see the package's docstring."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from tqdm import tqdm

import bench.parallel as package
import fastsae
from bench import cases
from bench.machine import ROOT, describe, device_folder
from bench.parallel import model
from bench.parallel.model import Shape
from bench.plot import table, with_numbers
from bench.results import RESULTS
from bench.run import shape
from fastsae.atomic import replace_file, write_json
from fastsae.model.axis import Axis, bounds

PAGE = ROOT / "docs" / "distributed.md"
MEASURED = "<!-- measured: begin (python -m bench.parallel --draw) -->", "<!-- measured: end -->"
PREDICTED = "<!-- predicted: begin (python -m bench.parallel --draw) -->", "<!-- predicted: end -->"
WARM = 2
LARGE = [(131_072, "131k"), (2**20, "1M"), (2**24, "16M")]
"""Latents that the tables are carried to, at D = 4096, K = 64 and 65,536 tokens a step."""


def worker(rank: int, s: Shape, threads: int, steps: int, folder: Path) -> None:
    """One process: times some steps, and writes what it found."""
    torch.set_num_threads(threads)
    if s.processes > 1:
        store = dist.FileStore(str(folder / "store"), s.processes)
        dist.init_process_group("gloo", rank=rank, world_size=s.processes, store=store)
    sae = fastsae.SparseAutoencoder(s.D, s.M, fastsae.TopK(s.K), seed=0)
    grid = fastsae.parallel.mesh(s.data, s.latents) if s.processes > 1 else None
    share = 0 if grid is None else grid.get_local_rank("data")
    sae = sae if grid is None else fastsae.parallel.parallelize(sae, grid)
    step = fastsae.FusedTrainStep(sae, lr=1e-4)
    generator, ends = torch.Generator().manual_seed(1), bounds(s.N, s.data)
    batches = [torch.randn(s.N, s.D, generator=generator)[ends[share] : ends[share + 1]] for _ in range(2)]
    axes = [] if sae.placement is None else [sae.placement.tokens, sae.placement.latents]
    seconds, exchanged, depth = [], 0.0, 0

    def timed(method: Callable[..., Any], *arguments: Any) -> Any:
        nonlocal exchanged, depth
        depth += 1  # gather calls stack
        start = time.perf_counter()
        try:
            return method(*arguments)
        finally:
            depth -= 1
            exchanged += 0.0 if depth else time.perf_counter() - start

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: timed(method, *given)

    with mock.patch.multiple(Axis, sum=watched(Axis.sum), gather=watched(Axis.gather), stack=watched(Axis.stack)):
        for i in range(WARM + steps):
            if i == WARM:
                exchanged, before = 0.0, sum(axis.received for axis in axes)
            start = time.perf_counter()
            loss = float(step(batches[i % 2])["loss"])
            seconds.append(time.perf_counter() - start)
    found = {
        "seconds": seconds[WARM:], "exchanged": exchanged / sum(seconds[WARM:]), "loss": loss,
        "received": (sum(axis.received for axis in axes) - before) / steps,
    }  # fmt: skip
    write_json(folder / f"{rank}.json", found)
    if s.processes > 1:
        dist.destroy_process_group()


def launch(s: Shape, threads: int, steps: int) -> list[dict[str, Any]]:
    """What each process of a mesh found. Raises RuntimeError where one fails."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = ",".join(map(str, (s.N, s.D, s.M, s.K, s.data, s.latents)))
        command = [sys.executable, "-m", "bench.parallel", "--worker", sizes, str(threads), str(steps), folder]
        running = [
            subprocess.Popen([*command, str(rank)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
            for rank in range(s.processes)
        ]
        errors = [process.communicate()[1] for process in running]
        for process, error in zip(running, errors, strict=True):
            if process.returncode:
                raise RuntimeError(f"a process of {s} failed: {error}")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(s.processes)]


def measure(N: int, D: int, M: int, K: int, processes: int, rounds: int, steps: int) -> dict[str, Any]:
    """The three ways in turns. Raises ValueError if a loss differs from one process's."""
    ways = {
        f"1 process, {processes} threads": (Shape(N, D, M, K), processes),
        f"{processes} processes, the batch shared": (Shape(N, D, M, K, data=processes), 1),
        f"{processes} processes, the dictionary shared": (Shape(N, D, M, K, latents=processes), 1),
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    with tqdm(total=rounds * len(ways), unit="launch", disable=None) as bar:
        for _ in range(rounds):
            for name, (s, threads) in ways.items():
                bar.set_description(name)
                found[name] += launch(s, threads, steps)
                bar.update()
    losses = {name: one[0]["loss"] for name, one in found.items()}
    first = next(iter(losses.values()))
    if any(abs(loss - first) > 1e-4 * abs(first) for loss in losses.values()):
        raise ValueError(f"the losses differ: {losses}; nothing is timed")
    result = {}
    for name, (s, _) in ways.items():
        all_seconds = [second for one in found[name] for second in one["seconds"]]
        result[name] = {
            "data": s.data, "latents": s.latents, "ms": 1e3 * statistics.median(all_seconds), "runs": len(all_seconds),
            "exchanging": statistics.median(one["exchanged"] for one in found[name]),
            "received": max(one["received"] for one in found[name]), "formula": sum(model.received(s).values()),
        }  # fmt: skip
    return {"machine": describe(), "N": N, "D": D, "M": M, "K": K, "processes": processes, "ways": result}


def shown(result: dict[str, Any]) -> str:
    ways = result["ways"]
    one = next(iter(ways.values()))["ms"]
    lines = [
        [
            name, f"{way['ms']:,.0f}", f"{one / way['ms']:.2f}×", f"{way['exchanging']:.0%}",
            f"{way['received'] / 1e6:.1f}", f"{way['formula'] / 1e6:.1f}",
        ]
        for name, way in ways.items()
    ]  # fmt: skip
    head = ["step", "ms", "speed", "in exchanges", "MB received a step", "MB by formula"]
    sizes = " ".join(f"{name}={result[name]:,}" for name in "NDMK")
    return f"{result['machine']['device']}, {sizes}:\n\n{table(head, lines)}"


def measured(results: Path) -> str:
    """Every device's result, the newest first."""
    found = [json.loads(path.read_text()) for path in results.glob("*/parallel.json")]
    return "\n\n".join(shown(one) for one in sorted(found, key=lambda one: one["machine"]["date"], reverse=True))


def predicted() -> str:
    """The tables of exchange, memory and time for larger machines."""
    traffic, memory, times = [], [], []
    for M, name in LARGE:
        for data, latents in ((8, 1), (1, 8), (8, 8), (1, 64)):
            s = Shape(65_536, 4096, M, 64, data, latents)
            parts, t = model.received(s), model.seconds(s)
            where = f"{name}, {data} x {latents}"
            traffic.append([where, *(_size(x) for x in (sum(parts.values()), model.ddp(s), model.fsdp(s)))])
            memory.append(
                [
                    where, *(_room(x) for x in (model.kept(s), model.kept(s, "8bit"), model.kept_by_ddp(s),
                                                model.kept_by_fsdp(s))),
                ]
            )  # fmt: skip
            hours = 1e10 / s.N * sum(t.values()) / 3600
            times.append([where, *(f"{1e3 * value:,.1f}" for value in t.values()), f"{hours:,.1f}"])
    head = "latents, data x latents"
    return "\n\n".join(
        [
            table([head, "received a step and GPU", "DDP, dense", "FSDP2, dense"], traffic),
            table([head, "kept a GPU, fp32 moments", "8-bit moments", "DDP, dense", "FSDP2, dense"], memory),
            table([head, "product, ms", "update, ms", "exchange, ms", "10¹⁰ tokens, hours"], times),
        ]
    )


def _size(value: float) -> str:
    return f"{value / 1e9:,.2f} GB"


def _room(value: float) -> str:
    shown_value = f"{value / 1e9:,.1f}" if value < 1e10 else f"{value / 1e9:,.0f}"
    return f"{shown_value} GB" + ("" if value < model.H200.memory else " (does not fit)")


def renew(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Puts the tables between the page's markers."""
    text = with_numbers(page.read_text(), measured(results), *MEASURED)
    text = with_numbers(text, predicted(), *PREDICTED)
    replace_file(page, lambda partial_file: partial_file.write_text(text))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.parallel",
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", type=shape, default=None, metavar="N,D,M,K", help="left out: 4096,768,24576,32")
    parser.add_argument("--processes", type=int, default=2, help="processes, and threads of the one (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every way (%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a turn (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder of the result; left out: bench/results/<device>")
    parser.add_argument("--draw", action="store_true", help="only renew docs/distributed.md, from the stored results")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        sizes, threads, steps, folder, rank = options.worker
        worker(int(rank), Shape(*map(int, sizes.split(","))), int(threads), int(steps), Path(folder))
        return 0
    if not options.draw:
        torch.set_num_threads(options.processes)  # as results are filed: what the processes have together
        case = cases.PRIMARY if options.size is None else cases.named(options.size)
        sizes = {name: getattr(case, name) for name in "NDMK"}
        result = measure(**sizes, processes=options.processes, rounds=options.rounds, steps=options.steps)
        path = (options.out or RESULTS / device_folder()) / "parallel.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
        print(shown(result))
    if options.out is None:
        renew()
    return 0


if __name__ == "__main__":
    sys.exit(main())
