"""The CUDA backend: csrc/cuda behind the raw-op signatures, on CUDA tensors; fastsae.backends.gpu orders its stages.

With FASTSAE_CUDA_EMULATION it runs the same kernels on the CPU instead (library.py), slowly, for tests, and only for
calls with backend="cuda".
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsae.backends.cuda import stages as cuda_stages
from fastsae.backends.cuda.library import EMULATED, library
from fastsae.backends.errors import BackendError
from fastsae.backends.gpu.raw_ops import RawOps, refusal
from fastsae.codes import Screen

LEAST_CAPABILITY = (8, 0)
"""What the kernels need: devices have asynchronous copies and bfloat16 arithmetic since 8.0."""
MOST_K = 8192
"""Per token: top_k sorts the chosen latents in shared memory, 8 bytes each, and all these devices have 64 KiB."""


@functools.cache
def available() -> str | None:
    if EMULATED:
        return None
    devices, reason, runtime, driver = library.status()
    if not driver:
        return "no NVIDIA driver is installed"
    if not devices:
        return f"{reason} (the kernels were built with CUDA {_version(runtime)}, the driver is for {_version(driver)})"
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use (torch.cuda.is_available() is False)"
    return None


@functools.cache
def _too_old(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= LEAST_CAPABILITY:
        return None
    name = torch.cuda.get_device_name(device)
    return f"{name} has compute capability {capability}, expected {LEAST_CAPABILITY} at least"


def by_name_only() -> bool:
    return EMULATED


def detail() -> dict[str, Any]:
    device = "emulated on the CPU, for tests" if EMULATED else torch.cuda.get_device_name()
    return {"device": device, "built for": library.architectures, "screening": "fp16, scaled by row"}


def supports(op: str, *tensors: Tensor, **info: Any) -> str | None:
    reason = refusal(op, tensors, "cpu" if EMULATED else "cuda")
    if reason is None and op == "encode_topk" and info["k"] > MOST_K:
        return f"k is {info['k']}, and it chooses at most {MOST_K} latents of a token"
    if reason is None and tensors and not EMULATED:
        return _too_old(tensors[0].device)
    return reason


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _op(name: str) -> Callable[..., Any]:
    """The raw op of this name; a CUDA error becomes a BackendError that names the op."""
    run = getattr(_raw, name)

    def named(*args: Any) -> Any:
        try:
            return run(*args)
        except library.Error as error:
            raise BackendError(f"fastsae.{name} failed in {error}") from error

    return named


def prepare_screen(W: Tensor, b: Tensor | None, x: Tensor | None, k: int | None) -> Screen | None:
    return Screen(_screen(W), "cuda/fp16")


_raw = RawOps(cuda_stages)
_screen = _op("screen")
encode_topk, encode_above, encode_batch_topk = _op("encode_topk"), _op("encode_above"), _op("encode_batch_topk")
decode, decode_error, active_dot = _op("decode"), _op("decode_error"), _op("active_dot")
active_outer, by_latent, update_latents_ = _op("active_outer"), _op("by_latent"), _op("update_latents_")
