"""The only place that reads environment variables.

FASTSAE_BACKEND   the backend that backend=None means ("reference", "cpu", ...); a call that it cannot serve raises
FASTSAE_CPU_ISA   the widest instruction set that the cpu backend may use, by the names that `fastsae info` shows
FASTSAE_CPU_BUILD  another build of the C++ extension, for tests (`make test-asan`)
FASTSAE_CUDA_EMULATION  a build of the CUDA kernels for the CPU, for tests (tests/emulation)
TRITON_INTERPRET  Triton's own: "1" runs its kernels in an interpreter on the CPU, for tests
"""

from __future__ import annotations

import os


def default_backend() -> str | None:
    """The backend named by FASTSAE_BACKEND, or None."""
    return os.environ.get("FASTSAE_BACKEND") or None


def cpu_isa() -> str | None:
    """The instruction set named by FASTSAE_CPU_ISA, or None."""
    return os.environ.get("FASTSAE_CPU_ISA") or None


def cpu_build() -> str | None:
    """The extension module named by FASTSAE_CPU_BUILD, or None."""
    return os.environ.get("FASTSAE_CPU_BUILD") or None


def cuda_emulation() -> str | None:
    """The extension module named by FASTSAE_CUDA_EMULATION, or None."""
    return os.environ.get("FASTSAE_CUDA_EMULATION") or None


def triton_is_interpreted() -> bool:
    """Whether Triton's interpreter is on; it must be set before the first kernel is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
