"""The Triton backend: fastsae.kernels behind the raw-op signatures, on CUDA or ROCm tensors; backends.gpu orders them.

With Triton's interpreter on (TRITON_INTERPRET=1 before the first import) it computes on CPU tensors instead, slowly,
for tests, and only for calls with backend="triton".
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fastsae import env
from fastsae.backends import versions
from fastsae.backends.gpu.raw_ops import RawOps, refusal
from fastsae.codes import Screen
from fastsae.kernels import stages


def available() -> str | None:
    if reason := versions.too_old("triton", triton.__version__):
        return reason
    if not env.triton_is_interpreted() and not torch.cuda.is_available():
        return "there is no GPU that torch can use (torch.cuda.is_available() is False)"
    versions.warn_of("triton", triton.__version__)
    return None


def by_name_only() -> bool:
    return env.triton_is_interpreted()


def detail() -> dict[str, Any]:
    device = (
        "Triton's interpreter on the CPU, for tests" if env.triton_is_interpreted() else torch.cuda.get_device_name()
    )
    return {"triton": triton.__version__, "device": device, "screening": "fp16, scaled by row"}


def supports(op: str, *tensors: Tensor, **info: Any) -> str | None:
    return refusal(op, tensors, "cpu" if env.triton_is_interpreted() else "cuda")


def prepare_screen(W: Tensor, b: Tensor | None, x: Tensor | None, k: int | None) -> Screen | None:
    return Screen(_raw.screen(W), "triton/fp16")


_raw = RawOps(stages)
encode_topk, encode_above, encode_batch_topk = _raw.encode_topk, _raw.encode_above, _raw.encode_batch_topk
decode, decode_error, active_dot = _raw.decode, _raw.decode_error, _raw.active_dot
active_outer, by_latent, update_latents_ = _raw.active_outer, _raw.by_latent, _raw.update_latents_
