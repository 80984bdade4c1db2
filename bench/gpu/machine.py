"""The first job of every run: build what is missing, then say what this machine is."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import machine
from bench.gpu.plan import Job, Settings
from bench.machine import ROOT, slug

CUDA_PART = "fastsae._cuda"
"""Built too where there are a GPU and an nvcc; elsewhere its backend reports that it is not there."""
BUILD_SECONDS = 300.0


def missing(parts: list[str]) -> list[str]:
    """The parts of the package that do not import, in a fresh interpreter: this one remembers what it saw first."""
    script = f"import importlib.util as u; print(*[p for p in {parts!r} if u.find_spec(p) is None])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.split() if done.returncode == 0 else [*parts]


def cuda_target() -> str | None:
    """What nvcc calls the GPU that is here, or None where there is no GPU or no nvcc to build for it."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if not torch.cuda.is_available() or CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}{'a' if major >= 9 else ''}"


def build(settings: Settings) -> dict[str, Any]:
    """Builds what is missing, and says what stays missing; each backend reports its own state afterwards."""
    parts, before = ["fastsae._cpu"], ["env"]
    if "cuda" in settings.backends and settings.device == "cuda" and (target := cuda_target()):
        parts.append(CUDA_PART)
        before.append(f"FASTSAE_CUDA_ARCHITECTURES={target}")  # for this GPU alone, which takes a quarter of the time
    said = ""
    if missing(parts):
        command = [*before, sys.executable, "setup.py", "build_ext", "--inplace"]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=BUILD_SECONDS)
            said = f"exit code {done.returncode}: {(done.stdout + done.stderr)[-1000:]}"
        except subprocess.TimeoutExpired:
            said = f"not done within {BUILD_SECONDS:.0f} s"
    if left := missing(parts):
        return {"status": "error", "error": f"{', '.join(left)} could not be built: {said}"}
    return {"summary": f"there: {', '.join(parts)}"}


def smi(*fields: str) -> str:
    """Fields of the first GPU as nvidia-smi reports them, "" where there is no such tool."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return ""
    command = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    return (subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines() or [""])[0].strip()


def describe(settings: Settings) -> dict[str, Any]:
    """Device, driver, versions, commit, date, and what the backends say. Raises RuntimeError where there is no such
    device, or no such backend.
    """
    import torch

    found: dict[str, Any] = machine.describe()
    if unknown := [name for name in settings.backends if name not in found["backends"]]:
        raise RuntimeError(f"--backends {' '.join(unknown)}: expected some of {', '.join(found['backends'])}")
    found["backends"] = {name: found["backends"][name] for name in settings.backends}
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None
    found |= {"size": settings.size, "triton": triton, "cuda": torch.version.cuda, "driver": ""}
    if settings.device != "cuda":
        return found | {"folder": machine.device_folder()}
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device; --rehearse tries the same path without one")
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


class Machine:
    """The items of the job "machine": build, device."""

    def __init__(self, job: Job, settings: Settings) -> None:
        self.settings = settings

    def __call__(self, item: str) -> dict[str, Any]:
        return build(self.settings) if item == "build" else {"machine": describe(self.settings)}
