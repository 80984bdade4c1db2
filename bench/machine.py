"""Describes this machine and its floors, measured in the same run: copied bytes and product operations per second."""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from bench.cases import Case
from bench.timing import interleaved

ROOT = Path(__file__).resolve().parent.parent
INTERESTING_FLAGS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512f", "avx_vnni", "avx2")


@dataclass(frozen=True)
class Floors:
    """Measured rates: copy_gbs counts bytes read and written; torch's best products in 1e12 operations per second."""

    copy_gbs: float
    fp32_tflops: float
    bf16_tflops: float
    int8_tops: float

    @property
    def best_product(self) -> float:
        """Operations per second of the fastest of the three."""
        return max(self.fp32_tflops, self.bf16_tflops, self.int8_tops) * 1e12


def measure_floors(rounds: int = 5, scale: int = 1) -> Floors:
    """The machine's rates with torch's present thread count. scale > 1 shrinks the tensors, for tests."""
    n = 64_000_000 // scale  # 256 MB a tensor: far beyond any cache
    source, target = torch.ones(n), torch.empty(n)
    rows, width, columns = max(4096 // scale, 64), max(768 // scale, 64), max(4096 // scale, 64)
    shapes = {"wide": (rows, width, columns), "square": (rows // 2, rows // 2, rows // 2)}
    calls: dict[str, Callable[[], object]] = {"copy": partial(target.copy_, source)}
    flops = {}
    for dtype in (torch.float32, torch.bfloat16):
        for shape, (a, b, c) in shapes.items():
            left, right = torch.randn(a, b).to(dtype), torch.randn(c, b).to(dtype)
            out = torch.empty(a, c, dtype=dtype)
            name = f"{dtype}-{shape}"
            flops[name] = 2 * a * b * c
            calls[name] = partial(torch.mm, left, right.T, out=out)
    for shape, (a, b, c) in shapes.items():
        left, right = (torch.randint(-127, 128, size, dtype=torch.int8) for size in ((a, b), (c, b)))
        name = f"{torch.int8}-{shape}"
        flops[name] = 2 * a * b * c
        calls[name] = partial(torch._int_mm, left, right.T)
    times = interleaved(calls, rounds=rounds, min_seconds=0.2 / scale, warmup=2)

    def best(dtype: torch.dtype) -> float:
        return max(flops[name] / times[name].p20 for name in flops if name.startswith(str(dtype))) / 1e12

    copied = 2 * n * source.element_size()
    return Floors(copied / times["copy"].p20 / 1e9, best(torch.float32), best(torch.bfloat16), best(torch.int8))


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

    encode   the product N·M·D at the best of torch's rates, and one gather of N·K rows for exact scores
    decode   one gather of N·K rows of D
    update   two gathers (the output's gradient and x) and, for each of the 2·M·D weights, w, m and v read and written
             (24 bytes), with the encoder's 2-byte copy written beside it
    Gathers are read once at half the copy rate, which counts a byte when read and again when written.
    """
    gather = case.N * case.K * case.D * 4 / (floors.copy_gbs * 1e9)
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
