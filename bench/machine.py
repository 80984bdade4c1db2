"""Describes this machine and its floors, from rates measured in the same run."""

from __future__ import annotations

import atexit
import datetime
import json
import platform
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from bench.cases import Case
from fastsae import env

ROOT = Path(__file__).resolve().parent.parent
INTERESTING_FLAGS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512f", "avx_vnni", "avx2")


@dataclass(frozen=True)
class Floors:
    """Rates that bench/probe.cpp measured, of all threads together: reads from L2, L3 and memory and copies (which
    count bytes read and written) in 1e9 bytes per second, products from registers in 1e12 operations; 0: no such
    instruction.
    """

    copy_gbs: float
    read_gbs: float
    l3_gbs: float
    l2_gbs: float
    fp32_tflops: float
    bf16_tflops: float = 0.0
    int8_tops: float = 0.0
    amx_bf16_tflops: float = 0.0
    amx_int8_tops: float = 0.0

    @property
    def best_product(self) -> float:
        """Operations per second of the fastest unit."""
        units = (self.fp32_tflops, self.bf16_tflops, self.int8_tops, self.amx_bf16_tflops, self.amx_int8_tops)
        return max(units) * 1e12


def measure_floors(seconds: float = 0.5) -> Floors:
    """The machine's rates with torch's present thread count, in so many seconds each. Raises FileNotFoundError without
    a C++ compiler."""
    widest = env.cpu_isa() or "all"
    done = subprocess.run(
        [probe(), str(torch.get_num_threads()), str(seconds), widest], capture_output=True, text=True, check=True
    )
    return Floors(**json.loads(done.stdout))


@cache
def probe() -> str:
    """The path of the compiled bench/probe.cpp; compiled once a process."""
    if shutil.which("c++") is None:
        raise FileNotFoundError("bench/probe.cpp measures the machine's rates: install a C++ compiler (c++)")
    folder = tempfile.mkdtemp(prefix="fastsae-probe-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = f"{folder}/probe"
    subprocess.run(["c++", "-O2", "-std=c++17", "-fopenmp", ROOT / "bench" / "probe.cpp", "-o", path], check=True)
    return path


@dataclass(frozen=True)
class StepFloor:
    """The least time of an exact step on this machine, in seconds, by part."""

    encode: float
    decode: float
    update: float

    @property
    def whole(self) -> float:
        return self.encode + self.decode + self.update


def step_floor(case: Case, floors: Floors) -> StepFloor:
    """Arithmetic from the measured rates, fp32 weights and moments:

    encode   the product N·M·D at the fastest unit's rate, and one gather of N·K rows for exact scores
    decode   one gather of N·K rows of D
    update   two gathers (the output's gradient and x) and, for each of the 2·M·D weights, w, m and v read and written
             (24 bytes), with the encoder's 2-byte copy written beside it
    A gather reads each row once, as fast as L3 gives it.
    """
    gather = case.N * case.K * case.D * 4 / (floors.l3_gbs * 1e9)
    product = 2 * case.N * case.M * case.D / floors.best_product
    adam = case.M * case.D * (2 * 24 + 2) / (floors.copy_gbs * 1e9)
    return StepFloor(encode=product + gather, decode=gather, update=2 * gather + adam)


def cpu_name() -> str:
    """The processor's name as the system gives it, with family and model, for hypervisors that cut names short."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", text, re.MULTILINE))
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name'].strip()} family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"


def cpu_flags() -> list[str]:
    """The instruction sets that matter here, of those this processor has."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    return [flag for flag in INTERESTING_FLAGS if flag in flags]


def git(*arguments: str) -> str:
    """What git says here; "" outside a clone, and where there is no git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def describe() -> dict[str, object]:
    """Everything that a reader of a result needs to know about where and when it was measured."""
    import fastsae

    changed = git("status", "--porcelain", "--", "fastsae", "csrc", "bench/*.py", "setup.py")
    return {
        "device": cpu_name(),
        "flags": cpu_flags(),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        # A reason names the command that mends it, with this machine's folder.
        "backends": json.loads(json.dumps(fastsae.backends()).replace(str(ROOT), ".")),
        "commit": git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else ""),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def slug(name: str) -> str:
    """A name as part of a path."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def device_folder() -> str:
    """The folder name of this device: the processor, its widest instruction set for this work, the thread count."""
    widest = next(iter(cpu_flags()), platform.machine())
    return slug(f"{cpu_name()} {widest} {torch.get_num_threads()}t")


def floors_dict(case: Case, floors: Floors) -> dict[str, object]:
    """For the result file: the measured rates and the case's floor in milliseconds."""
    floor = step_floor(case, floors)
    parts = {"encode": floor.encode, "decode": floor.decode, "update": floor.update, "step": floor.whole}
    return {**asdict(floors), "floor_ms": {name: seconds * 1e3 for name, seconds in parts.items()}}
