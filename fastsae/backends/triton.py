"""The Triton backend: kernels/ behind the raw-op signatures, on CUDA (or ROCm) tensors.

With Triton's interpreter on (TRITON_INTERPRET=1 before the first import) it computes on CPU tensors instead, slowly,
for tests, and only for those who name it.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

from fastsae import env
from fastsae.backends import triton_update as _update
from fastsae.codes import Screen
from fastsae.kernels import active_dot as _active_dot
from fastsae.kernels import decode as _decode
from fastsae.kernels import decode_error as _decode_error
from fastsae.kernels import encode_above as _encode_above
from fastsae.kernels import encode_batch_topk as _encode_batch_topk
from fastsae.kernels import encode_topk as _encode_topk
from fastsae.kernels.narrow import WIDEST, Narrow, narrowed

SUPPORTED = ((3, 6), (3, 7))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available() -> str | None:
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version not in SUPPORTED:
        wanted = " or ".join(".".join(map(str, v)) for v in SUPPORTED)
        return f"Triton {triton.__version__} is installed, expected {wanted}"
    if not env.triton_is_interpreted() and not torch.cuda.is_available():
        return "there is no GPU that torch can use (torch.cuda.is_available() is False)"
    return None


def by_name_only() -> bool:
    return env.triton_is_interpreted()


def detail() -> dict[str, Any]:
    device = (
        "Triton's interpreter on the CPU, for tests" if env.triton_is_interpreted() else torch.cuda.get_device_name()
    )
    return {"triton": triton.__version__, "device": device, "screening": "fp16, scaled by row"}


def supports(op: str, *tensors: Tensor, **info: Any) -> str | None:
    wanted = "cpu" if env.triton_is_interpreted() else "cuda"
    for t in tensors:
        if t.device.type != wanted:
            return f"it computes on {wanted} tensors here, and a tensor is on {t.device}"
        if t.is_floating_point() and t.dtype not in DTYPES and t.ndim:
            return f"{op} has no kernel for {t.dtype}"
        if op.startswith(("encode", "prepare")) and t.ndim == 2 and t.shape[1] > WIDEST:
            return f"a row has {t.shape[1]} columns, and the screen's scale allows {WIDEST}"
    return None


def _on(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches go to t's device; torch's current stream of it is the caller's."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def prepare_screen(W: Tensor, b: Tensor | None, x: Tensor | None, k: int | None) -> Screen | None:
    with _on(W):
        return Screen(narrowed(W.contiguous()).tensors(), "triton/fp16")


def _screen(tensors: list[Tensor] | None) -> Narrow | None:
    return Narrow(*tensors) if tensors else None


def encode_topk(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    k: int,
    rows: Tensor | None,
    scale: Tensor | None,
    index_offset: int,
    screen: list[Tensor] | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with _on(W):
        return _encode_topk.encode_topk(x, W, b, k, rows, scale, index_offset, _screen(screen), precision)


def encode_above(
    x: Tensor, W: Tensor, b: Tensor, threshold: Tensor, capacity: int, screen: list[Tensor] | None, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with _on(W):
        return _encode_above.encode_above(x, W, b, threshold, capacity, _screen(screen), precision)


def encode_batch_topk(
    x: Tensor, W: Tensor, b: Tensor, k: int, screen: list[Tensor] | None, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with _on(W):
        return _encode_batch_topk.encode_batch_topk(x, W, b, k, _screen(screen), precision)


def decode(acts: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor) -> Tensor:
    with _on(W):
        return _decode.decode(acts, indices, offsets, W)


def decode_error(
    acts: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor, target: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    with _on(W):
        return _decode_error.decode_error(acts, indices, offsets, W, target, bias)


def active_dot(x: Tensor, acts: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor) -> Tensor:
    with _on(W):
        return _active_dot.active_dot(x, acts, indices, offsets, W)


def active_outer(
    acts: Tensor, indices: Tensor, offsets: Tensor | None, x: Tensor, d_sae: int, by_latent: list[Tensor] | None
) -> Tensor:
    with _on(x):
        return _update.active_outer(acts, indices, offsets, x, d_sae, by_latent)


def by_latent(acts: Tensor, indices: Tensor, offsets: Tensor | None, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    with _on(acts):
        return _update.by_latent(acts, indices, offsets, d_sae)


def update_latents_(W_enc: Tensor | None, W_dec: Tensor, *args: Any) -> Tensor:
    with _on(W_dec):
        return _update.update_latents_(W_enc, W_dec, *args)
