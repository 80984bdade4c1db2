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

PARTS: tuple[str, ...] = ("fastsae.kernels", "fastsae._cpu")
CUDA_PART = "fastsae._cuda"
"""Built too where there are a GPU and an nvcc; elsewhere its backend reports that it is not there."""
BUILDS = (
    ("-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", "."),
    ("setup.py", "build_ext", "--inplace"),
)
BUILD_SECONDS = 150.0
CUDA_BUILD_SECONDS = 300.0
MEASURED = ("fastsae", "csrc", "bench")
NOT_MEASURED = ("report.py", "sections.py", "draw.py", "plot.py", "demo.py")


def missing(parts: tuple[str, ...]) -> list[str]:
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
    """Builds until nothing is missing, and says what stays missing; each backend reports its own state afterwards."""
    target = cuda_target() if "cuda" in settings.backends and settings.device == "cuda" else None
    parts, limit, before = PARTS, BUILD_SECONDS, ["env"]
    if target is not None:  # for this GPU alone, which takes a quarter of the time
        parts, limit, before = (*parts, CUDA_PART), CUDA_BUILD_SECONDS, ["env", f"FASTSAE_CUDA_ARCHITECTURES={target}"]
    found: dict[str, Any] = {"missing_at_first": missing(parts), "tried": []}
    left = found["missing_at_first"]
    for command in BUILDS:
        if not left:
            break
        try:
            whole = [*before, sys.executable, *command]
            done = subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, check=False, timeout=limit)
            said = "" if done.returncode == 0 else (done.stdout + done.stderr)[-1000:]
        except subprocess.TimeoutExpired:
            said = f"not done within {limit:.0f} s"
        left = missing(parts)
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
    """Fields of the first GPU as nvidia-smi reports them, "" where there is no such tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    command = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""


def describe(settings: Settings) -> dict[str, Any]:
    """Device, driver, versions, commit, date, and what the backends say. Raises RuntimeError where there is no such
    device, or no such backend.
    """
    import torch

    found: dict[str, Any] = {**machine.describe(), "backends": about_backends(settings)}
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


def about_backends(settings: Settings) -> dict[str, dict[str, Any]]:
    """Of each backend asked for: {"available", "reason", "detail"}. Raises RuntimeError for an unknown name."""
    from fastsae.backends import backends

    known = backends()
    if unknown := [name for name in settings.backends if name not in known]:
        raise RuntimeError(f"--backends {' '.join(unknown)}: expected some of {', '.join(known)}")
    return {name: known[name] for name in settings.backends}


def version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    return str(importlib.import_module(package).__version__)


class Machine:
    """The items of the job "machine": build, device."""

    def __init__(self, job: Job, settings: Settings) -> None:
        self.settings = settings

    def __call__(self, item: str) -> dict[str, Any]:
        return build(self.settings) if item == "build" else {"machine": describe(self.settings)}


def result_folder(root: Path, found: dict[str, Any], settings: Settings) -> Path:
    return root / found["folder"] / ("gpu-toy" if settings.is_toy else "gpu")
