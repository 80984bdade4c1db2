"""The first job of every run: build what is missing, then say what this machine is."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import machine
from bench.gpu.plan import Job, Settings
from bench.machine import ROOT

PARTS = ("fastsae.kernels", "fastsae._cpu")
BUILDS = (
    ("-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", "."),
    ("setup.py", "build_ext", "--inplace"),
)
BUILD_SECONDS = 150.0
MEASURED = ("fastsae", "kernels", "csrc", "bench")
NOT_MEASURED = ("report.py", "draw.py", "plot.py", "demo.py")


def missing() -> list[str]:
    """The parts of the package that do not import, in a fresh interpreter: this one remembers what it saw first."""
    script = f"import importlib.util as u; print(*[p for p in {PARTS!r} if u.find_spec(p) is None])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.split() if done.returncode == 0 else [*PARTS]


def build() -> dict[str, Any]:
    """Builds until nothing is missing. Whatever stays missing is said: each backend reports for itself afterwards."""
    found: dict[str, Any] = {"missing_at_first": missing(), "tried": []}
    left = found["missing_at_first"]
    for command in BUILDS:
        if not left:
            break
        try:
            done = subprocess.run(
                [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=BUILD_SECONDS
            )
            said = "" if done.returncode == 0 else (done.stdout + done.stderr)[-1000:]
        except subprocess.TimeoutExpired:
            said = f"not done within {BUILD_SECONDS:.0f} s"
        left = missing()
        found["tried"].append({"command": " ".join(command), "said": said, "missing_after": left})
    found["missing"] = left
    if left:
        return found | {"status": "error", "error": f"{', '.join(left)} could not be built; the rest goes on without"}
    return found


def fingerprint() -> str:
    """12 hex digits over the sources that results depend on, committed or not."""
    digest = hashlib.sha256()
    for folder in MEASURED:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh") and path.name not in NOT_MEASURED:
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def smi(*fields: str) -> str:
    """Fields of the first GPU as nvidia-smi tells them, "" where there is no such tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    command = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""


def describe(settings: Settings) -> dict[str, Any]:
    """Device, driver, versions, commit, date. Raises RuntimeError where there is no such device."""
    import torch

    found = machine.describe()
    found |= {"source": fingerprint(), "triton": version("triton"), "cuda": torch.version.cuda, "driver": ""}
    if settings.device != "cuda":
        return found | {"folder": machine.device_folder()}
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device; `--device cpu --size toy` tries the same path without one")
    about = torch.cuda.get_device_properties(0)
    return found | {
        "device": torch.cuda.get_device_name(),
        "folder": slug(torch.cuda.get_device_name()),
        "capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count,
        "memory_gb": round(about.total_memory / 1e9, 1),
        "l2_mb": round(about.L2_cache_size / 1e6, 1),
        "driver": smi("driver_version"),
        "clocks": smi("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu"),
    }


def version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    return str(importlib.import_module(package).__version__)


class Machine:
    """The items of the job "machine": build, device."""

    def __init__(self, job: Job, settings: Settings) -> None:
        self.settings = settings

    def __call__(self, item: str) -> dict[str, Any]:
        return build() if item == "build" else {"machine": describe(self.settings)}


def result_folder(root: Path, found: dict[str, Any], settings: Settings) -> Path:
    return root / found["folder"] / ("gpu-toy" if settings.is_toy else "gpu")
