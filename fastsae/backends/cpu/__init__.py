"""The CPU backend: csrc/cpu behind the raw-op signatures, on torch.get_num_threads() threads.

The screened encoders and the update have their own files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae import _cpu, env
from fastsae.backends import buffers
from fastsae.backends.cpu.memory import CPU, DTYPES, codes, latent_order, matrix, numbers, sort
from fastsae.backends.cpu.screen import encode_above, encode_batch_topk, encode_topk, hold_screen, prepare_screen
from fastsae.backends.cpu.update import update_latents_
from fastsae.reference import wide

if isa := env.cpu_isa():
    _cpu.use_isa(isa)


def available() -> str | None:
    return None


def detail() -> dict[str, Any]:
    return {
        "isa": _cpu.isa(),
        "isas": _cpu.isas(),
        "screening": _cpu.fastest_format(1024).name,
        "threads": torch.get_num_threads(),
    }


def supports(op: str, *tensors: Tensor, **info: Any) -> str | None:
    for t in tensors:
        if t.device.type != "cpu":
            return f"it computes on the CPU, and a tensor is on {t.device}"
    floating = [t.dtype for t in tensors if t.is_floating_point()]
    # The screened encoders' exact score is fp32 by definition, too little for float64 inputs.
    served = tuple(DTYPES)[:2] if op.startswith(("encode", "prepare")) else tuple(DTYPES)
    if op != "update_latents_":
        odd = [dtype for dtype in floating if dtype not in served]
        if odd:
            return f"{op} has no kernel for {odd[0]}; cast to {' or '.join(map(str, served))}"
    elif torch.float16 in floating:
        return "update_latents_ has no kernel for torch.float16; cast to torch.float32 or torch.bfloat16"
    return None


def by_name_only() -> bool:
    return False


def decode(acts: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor) -> Tensor:
    code = codes(acts, indices, offsets, W.shape[0])
    out = buffers.empty((code.n, W.shape[1]), W.dtype, CPU)
    _cpu.decode(code, matrix("W", W), matrix("out", out), torch.get_num_threads())
    return out


def decode_error(
    acts: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor, target: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    error = decode(acts, indices, offsets, W)
    if bias is not None:
        error.add_(bias)
    error.sub_(target)
    return error, torch.linalg.vector_norm(error, dim=-1, dtype=wide(error).dtype).double().square()


def active_dot(x: Tensor, acts: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor) -> Tensor:
    code = codes(acts, indices, offsets, W.shape[0])
    out = buffers.zeros(acts.shape, acts.dtype, CPU)  # zeros: a ragged code's spare slots are not written
    place = numbers("out", out, acts.dtype, tuple(acts.shape))
    _cpu.active_dot(matrix("x", x), code, matrix("W", W), place, torch.get_num_threads())
    return out


def active_outer(
    acts: Tensor, indices: Tensor, offsets: Tensor | None, x: Tensor, d_sae: int, by_latent: list[Tensor] | None
) -> Tensor:
    code = codes(acts, indices, offsets, d_sae)
    order = sort(code)[0] if by_latent is None else latent_order(code, *by_latent)
    out = buffers.empty((d_sae, x.shape[1]), x.dtype, CPU)
    _cpu.active_outer(code, order, matrix("x", x), matrix("out", out), torch.get_num_threads())
    return out


def by_latent(acts: Tensor, indices: Tensor, offsets: Tensor | None, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    offsets, tokens, slots = sort(codes(acts, indices, offsets, d_sae))[1]
    return offsets, tokens, slots


__all__ = [
    "active_dot", "active_outer", "available", "by_latent", "by_name_only", "decode", "decode_error", "detail",
    "encode_above", "encode_batch_topk", "encode_topk", "hold_screen", "prepare_screen", "supports",
    "update_latents_",
]  # fmt: skip
