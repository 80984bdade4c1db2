"""Times a whole training step and its parts, after checking the results; the contestants take turns.

Each case: build the inputs, check fastsae against float64 and against the dense step, check every contestant's
reconstruction, time them interleaved, measure peak memory in processes of their own, write the case's result.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import cases, check, contestants, machine, memory, peers, real, results
from bench.cases import Case, Inputs
from bench.contestants import Contestant
from bench.ours import Fused, FusedByPart
from bench.timing import Mark, Sample, Stopwatch, interleaved

ISA_SETTINGS = {
    # Ours, ATen's own kernels, oneDNN's and MKL's; each library reads its own variable, and only at start.
    "avx2": [
        "FASTSAE_CPU_ISA=avx2",
        "ATEN_CPU_CAPABILITY=avx2",
        "ONEDNN_MAX_CPU_ISA=AVX2",
        "MKL_ENABLE_INSTRUCTIONS=AVX2",
    ]
}


def say(text: str) -> None:
    print(text, flush=True)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").split("\n\n")[0])
    p.add_argument(
        "--cases",
        nargs="+",
        default=[c.name for c in cases.CASES],
        choices=list(cases.BY_NAME),
        metavar="CASE",
        help=f"cases to run, from: {', '.join(cases.BY_NAME)} (default: the first five)",
    )
    p.add_argument(
        "--size",
        nargs="+",
        action="extend",
        default=[],
        type=shape,
        metavar="N,D,M,K",
        help="sizes of your own instead of --cases, with random inputs and weights: tokens, width, latents, active",
    )
    p.add_argument(
        "--contestants",
        nargs="+",
        default=list(contestants.NAMES),
        choices=contestants.NAMES,
        metavar="NAME",
        help=f"contestants to time, from: {', '.join(contestants.NAMES)} (default: all)",
    )
    p.add_argument("--sweep", action="store_true", help="time fastsae alone over growing N, D, M and K, not --cases")
    p.add_argument("--threads", type=int, default=2, help="torch's thread count (default: 2)")
    p.add_argument("--rounds", type=int, default=5, help="turns that each contestant takes (default: 5)")
    p.add_argument("--turn", type=float, default=1.0, help="seconds per turn; at least one step is run (default: 1)")
    p.add_argument(
        "--isa",
        choices=["best", *ISA_SETTINGS],
        default="best",
        help="instruction set to which fastsae and torch are restricted (default: best)",
    )
    p.add_argument("--out", type=Path, default=results.RESULTS, help="results folder (default: bench/results)")
    p.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    p.add_argument("--quick", action="store_true", help="toy sizes, one round; results are stored only with --out")
    p.add_argument("--held", action="store_true", help=argparse.SUPPRESS)  # set on the process that --isa starts
    return p  # fmt: skip


def shape(text: str) -> str:
    """The name of the case with that shape. Raises argparse's error, so that the usage is printed."""
    try:
        return cases.of_shape(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def rotating(inputs: Inputs, act: Callable[[torch.Tensor], object]) -> Callable[[], object]:
    """Calls act on the next batch each time."""
    turn = itertools.cycle(inputs.batches)
    return lambda: act(next(turn))


def split(step: Callable[[torch.Tensor, Mark], object], watch: Stopwatch) -> Callable[[torch.Tensor], object]:
    """The step, with the times of its parts recorded by the watch."""

    def run(x: torch.Tensor) -> None:
        watch.start()
        step(x, watch.mark)

    return run


def checked(case: Case, inputs: Inputs, names: Sequence[str]) -> tuple[dict[str, Contestant], dict[str, str]]:
    """The contestants with right results, ready to be timed; and those left out, each with its reason."""
    taking_part: dict[str, Contestant] = {}
    left_out = {name: reason for name in names if (reason := contestants.unavailable(name))}
    _, recon = check.truth(inputs, case.K)
    if "fastsae" in names:
        check.check_fused(inputs, case.K)  # a wrong fastsae ends the run
    for name in names:
        if name not in left_out:
            contestant = contestants.make(name, inputs, case.K)
            try:
                check.check_forward(contestant, inputs, recon)
            except check.WrongResult as error:
                left_out[name] = str(error)
            else:
                taking_part[name] = contestant
    for name, reason in left_out.items():
        say(f"  left out: {name}: {reason}")
    return taking_part, left_out


def time_case(inputs: Inputs, k: int, taking_part: dict[str, Contestant], rounds: int, turn: float) -> dict[str, Any]:
    """{contestant: {"parts": {part: times}, ...}}: step, encode, and the parts of a step where they are known."""
    watches: dict[str, Stopwatch] = {}
    calls: dict[str, Callable[[], object]] = {}
    for name, contestant in taking_part.items():
        # fastsae's step is one call, so its parts are timed separately, by calling the same ops one by one.
        parts = FusedByPart(inputs, k) if isinstance(contestant, Fused) else contestant
        watches[name] = Stopwatch()
        if parts is contestant:
            calls[f"{name}/step"] = rotating(inputs, split(contestant.step, watches[name]))
        else:
            calls[f"{name}/step"] = rotating(inputs, contestant.step)
            calls[f"{name}/parts"] = rotating(inputs, split(parts.step, watches[name]))
        calls[f"{name}/encode"] = rotating(inputs, contestant.encode)
    times = interleaved(calls, rounds, turn, on_round=lambda r: say(f"  round {r + 1} of {rounds}"))
    timed: dict[str, Any] = {}
    for name, contestant in taking_part.items():
        # The first step also allocates the optimizer's state: not part of a step.
        split_times = {part: Sample.of(seconds[1:] or seconds) for part, seconds in watches[name].seconds.items()}
        whole = {"step": times[f"{name}/step"], "encode alone": times[f"{name}/encode"]}
        timed[name] = {"parts": {part: sample.in_ms() for part, sample in {**whole, **split_times}.items()}}
        if name in peers.PEERS:
            timed[name]["version"] = peers.version(name)
        if isinstance(contestant, Fused) and (redone := contestant.redone()) is not None:
            timed[name]["redone_share"], timed[name]["redone_share_max"] = redone
    return timed


def add_memory(timed: dict[str, Any], case_name: str, threads: int, is_quick: bool) -> None:
    """Peak memory: of every contestant in the primary case, of fastsae alone in the others."""
    for name, entry in timed.items():
        if case_name != cases.PRIMARY.name and name != "fastsae":
            continue
        try:
            entry |= memory.measure(case_name, name, threads, is_quick)
        except memory.CannotMeasure as error:
            entry["memory_not_measured"] = str(error)
            say(f"  memory not measured: {error}")


def show(result: dict[str, Any]) -> None:
    """The case as a table on the screen."""
    case, floor = result["case"], result["floors"]["floor_ms"]["step"]
    say(f"\n{case['name']}: N={case['N']} D={case['D']} M={case['M']} K={case['K']}  (floor {floor:.1f} ms)")
    parts = ("step", "encode", "decode", "loss", "update", "encode alone")
    say(f"{'':24}" + "".join(f"{part:>13}" for part in parts) + f"{'tokens/s':>12}{'extra MB':>10}{'x fastsae':>11}")
    ours = result["contestants"].get("fastsae", {}).get("parts", {}).get("step", {}).get("ms")
    for name, entry in sorted(result["contestants"].items(), key=lambda item: item[1]["parts"]["step"]["ms"]):
        times = entry["parts"]
        cells = "".join(f"{times[part]['ms']:>10.2f} ms" if part in times else f"{'':>13}" for part in parts)
        peak = f"{entry['extra_peak_bytes'] / 1e6:.0f}" if "extra_peak_bytes" in entry else "-"
        ratio = f"{times['step']['ms'] / ours:.2f}" if ours else "-"
        say(f"{name:24}{cells}{case['N'] / times['step']['ms'] * 1e3:>12,.0f}{peak:>10}{ratio:>11}")
    share = result["contestants"].get("fastsae", {}).get("redone_share")
    if share is not None:
        say(f"tokens encoded twice: {share:.3%}")


def run_case(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Measures one case and returns its result."""
    name = case.name
    if options.quick:
        case = cases.quick(case)
    say(f"{name}: N={case.N} D={case.D} M={case.M} K={case.K}, {case.distribution} inputs, {case.weights} weights")
    inputs = cases.build(case, real.rows, real.trained)
    floors = machine.measure_floors(seconds=0.01) if options.quick else machine.measure_floors()
    taking_part, left_out = checked(case, inputs, options.contestants)
    timed = time_case(inputs, case.K, taking_part, options.rounds, options.turn)
    del taking_part
    gc.collect()
    if not options.no_memory:
        add_memory(timed, name, options.threads, options.quick)
    return {
        "machine": machine.describe(),
        "isa": options.isa,
        "settings": {"rounds": options.rounds, "turn_s": options.turn, "batches": len(inputs.batches)},
        "case": asdict(case),
        "inputs": inputs.provenance,
        "floors": machine.floors_dict(case, floors),
        "memory_bound_bytes": memory.bound(case.N, case.D, case.M),
        "contestants": timed,
        "left_out": left_out,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.isa != "best" and not options.held:
        given = list(sys.argv[1:] if arguments is None else arguments)
        command = ["env", *ISA_SETTINGS[options.isa], sys.executable, "-m", "bench", *given, "--held"]
        return subprocess.run(command, cwd=machine.ROOT, check=False).returncode
    if options.quick:
        options.rounds, options.turn = 1, 0.0
    if options.sweep:
        options.cases, options.contestants = [case.name for case in cases.SWEEP], ["fastsae"]
    options.cases = options.size or options.cases
    torch.set_num_threads(options.threads)
    begun = time.perf_counter()
    for name in options.cases:
        try:
            result = run_case(cases.named(name), options)
        except (check.WrongResult, real.NoActivations) as error:
            print(f"error: case {name}: {error}", file=sys.stderr)
            return 1
        show(result)
        if not options.quick or options.out != results.RESULTS:
            say(f"written: {results.write(options.out / machine.device_folder(), result)}\n")
    say(f"{len(options.cases)} cases in {time.perf_counter() - begun:.0f} s")
    return 0
