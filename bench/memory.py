"""Peak memory of one step beyond what it keeps: `python -m bench.memory --case random --contestant fastsae`.

Measured in a process of its own, by the kernel: one step on a few tokens makes the lasting state (weights, moments,
screening copy, thread stacks) resident; then the high-water mark of resident memory is reset and two steps on the whole
batch run. Extra = high-water mark - what was resident before. Gradients and activations count; inputs do not.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import subprocess
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class CannotMeasure(RuntimeError):
    """This system does not report a process's peak memory in the way needed here."""


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    if not STATUS.exists():
        raise CannotMeasure("no /proc/self/status: peak memory is measured on Linux only")
    found = re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise CannotMeasure(f"/proc/self/status has no {field}")
    return int(found.group(1)) * 1024


def settle() -> None:
    """Hand freed memory back to the system, so that what stays resident is in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def extra_peak(case_name: str, contestant: str, is_quick: bool) -> dict[str, int]:
    """In this process: bytes beyond the lasting state, and the lasting state's own bytes."""
    from bench import cases, contestants, real

    case = cases.named(case_name)
    if is_quick:
        case = cases.quick(case)
    inputs = cases.build(case, real.rows, real.trained)
    taking_part = contestants.make(contestant, inputs, case.K)
    taking_part.step(inputs.x[: min(64, case.N)])
    settle()
    try:
        CLEAR_REFS.write_text("5")
    except OSError as error:
        raise CannotMeasure(f"{CLEAR_REFS} cannot be written ({error.strerror})") from error
    before = resident("VmRSS")
    for batch in inputs.batches[:2]:
        taking_part.step(batch)
    return {"extra_peak_bytes": resident("VmHWM") - before, "state_bytes": taking_part.state_bytes()}


def bound(N: int, D: int, M: int) -> float:
    """The target: a tenth of (N, M) in bf16, and 8·N·D bytes."""
    return 0.1 * 2 * N * M + 8 * N * D


def measure(case_name: str, contestant: str, threads: int, is_quick: bool = False) -> dict[str, int]:
    """extra_peak in a fresh process. Raises CannotMeasure with that process's last line."""
    command = [sys.executable, "-m", "bench.memory", "--case", case_name, "--contestant", contestant]
    command += ["--threads", str(threads), *(["--quick"] if is_quick else [])]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CannotMeasure(f"{contestant}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.memory", description="Peak extra memory of one contestant's step, as JSON."
    )
    parser.add_argument("--case", required=True)
    parser.add_argument("--contestant", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(extra_peak(options.case, options.contestant, options.quick)))


if __name__ == "__main__":
    main()
