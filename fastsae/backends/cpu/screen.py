"""The CPU backend's narrow copy of an encoder, and the encoders that screen with it (bounds: csrc/cpu/encode.h)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae import _cpu
from fastsae.backends.cpu.memory import address, matrix
from fastsae.codes import Screen

_Tensors = list[Tensor]


def allocate(latents: int, d: int, fmt: _cpu.Format) -> _Tensors:
    """[words int32, tables fp32 (3, positions), format int32 ()]: the memory of one narrow copy, not filled."""
    blocks = _cpu.blocks_of(latents)
    words = 0 if fmt == _cpu.Format.f32 else blocks * _cpu.words_per_row(fmt, d) * 16
    return [
        torch.empty(words, dtype=torch.int32),
        torch.empty(3, blocks * 16),
        torch.tensor(int(fmt), dtype=torch.int32),
    ]


def view(tensors: _Tensors, latents: int, d: int) -> _cpu.Screen:
    """The C++ view of a narrow copy. Raises ValueError for one of another dictionary or processor; TypeError."""
    words, tables, code = tensors
    fmt = _cpu.Format(int(code))
    if not _cpu.format_supported(fmt):
        raise ValueError(f"the screen is in {fmt.name}, which {_cpu.isa()} has no code for; make it anew")
    blocks = _cpu.blocks_of(latents)
    expected = 0 if fmt == _cpu.Format.f32 else blocks * _cpu.words_per_row(fmt, d) * 16
    for name, t, dtype in (("words", words, torch.int32), ("tables", tables, torch.float32)):
        if t.dtype != dtype or not t.is_contiguous():
            raise TypeError(f"the screen's {name} are {t.dtype} with strides {t.stride()}, expected contiguous {dtype}")
    if tables.shape != (3, blocks * 16) or words.numel() != expected:
        raise ValueError(f"the screen is of another dictionary than W ({latents}, {d}); make it anew")
    scale, norm, residual = (row.data_ptr() for row in tables)
    return _cpu.Screen(words.data_ptr(), scale, norm, residual, fmt, latents, d)


def fill(W: Tensor, rows: Tensor | None, fmt: _cpu.Format) -> tuple[_cpu.Screen, _Tensors]:
    """A narrow copy of W, or of some of its rows, with the tensors that hold it."""
    latents = W.shape[0] if rows is None else rows.shape[0]
    tensors = allocate(latents, W.shape[1], fmt)
    screen = view(tensors, latents, W.shape[1])
    _cpu.prepare_screen(matrix(W), address(rows), screen, torch.get_num_threads())
    return screen, tensors


def prepare_screen(W: Tensor, b: Tensor | None, x: Tensor | None, k: int | None) -> Screen | None:
    W = W.contiguous()
    b = W.new_zeros(W.shape[0]) if b is None else b
    fmt, tensors = _best_copy(x, W, b.float().contiguous(), k, None, None)
    return Screen(tensors, f"cpu/{fmt.name}")


# 8 bits have twice the product rate of bf16 and a bound several times wider. Where the bound lets in more rivals than
# this share of the latents, scoring them costs more than the product saves (Zen 5: 22 us a token at M = 24576, 40 ns a
# rival).
RIVALS_WORTH = 0.02
REDONE_WORTH = 0.01
PROBED = 192
PROBED_K = 32  # stands for a threshold, which has no K


def _best_copy(
    x: Tensor | None, W: Tensor, b: Tensor, k: int | None, rows: Tensor | None, scale: Tensor | None
) -> tuple[_cpu.Format, _Tensors]:
    """The narrow copy that encodes such inputs fastest, found by encoding a few. Exact results never depend on it."""
    fmt = _cpu.fastest_format(W.shape[1])
    narrow, tensors = fill(W, rows, fmt)
    tight = _cpu.tight_format()
    if x is None or k is None or fmt == tight or not x.shape[0] or not narrow.latents:
        return fmt, tensors
    few = x[:: max(1, x.shape[0] // PROBED)][:PROBED].to(W.dtype).contiguous()
    n, latents = few.shape[0], W.shape[0] if rows is None else rows.shape[0]
    acts, indices = torch.empty(n, k), torch.empty(n, k, dtype=torch.int32)
    args = _cpu.EncodeArgs(
        matrix(few), matrix(W), b.data_ptr(), address(scale), address(rows), latents,
        0, k, True, False, narrow, torch.get_num_threads(),
    )  # fmt: skip
    redone, rivals = _cpu.encode_topk(args, acts.data_ptr(), indices.data_ptr())
    if redone <= REDONE_WORTH * n and rivals <= RIVALS_WORTH * latents * n:
        return fmt, tensors
    return tight, fill(W, rows, tight)[1]


def arguments(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    k: int,
    rows: Tensor | None,
    scale: Tensor | None,
    index_offset: int,
    screen: _Tensors | None,
    precision: str,
) -> tuple[_cpu.EncodeArgs, list[Any]]:
    """What every encoder hands to C++, and the tensors that must live as long."""
    bias = b.float().contiguous()
    gain = None if scale is None else scale.float().contiguous()
    considered = None if rows is None else rows[rows >= 0].contiguous()
    count = W.shape[0] if considered is None else considered.shape[0]
    if screen is not None and considered is None and precision != "fp32":
        held = screen
    elif precision == "fp32":
        held = fill(W, considered, _cpu.Format.f32)[1]
    else:
        held = _best_copy(x, W, bias, k, considered, gain)[1]
    narrow = view(held, count, W.shape[1])
    args = _cpu.EncodeArgs(
        matrix(x), matrix(W), bias.data_ptr(), address(gain), address(considered), count,
        index_offset, k, precision != "screened", True, narrow, torch.get_num_threads(),
    )  # fmt: skip
    return args, [bias, gain, considered, held]


def encode_topk(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    k: int,
    rows: Tensor | None,
    scale: Tensor | None,
    index_offset: int,
    screen: _Tensors | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    args, held = arguments(x, W, b, k, rows, scale, index_offset, screen, precision)
    acts = torch.empty(x.shape[0], k)
    indices = torch.empty(x.shape[0], k, dtype=torch.int32)
    redone, _ = _cpu.encode_topk(args, acts.data_ptr(), indices.data_ptr())
    del held
    return acts.to(x.dtype), indices, torch.tensor(redone)


def encode_above(
    x: Tensor, W: Tensor, b: Tensor, threshold: Tensor, capacity: int, screen: _Tensors | None, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    per_token = threshold.ndim == 2
    per_latent = None if per_token else threshold.float().expand(W.shape[0]).contiguous()
    bars = threshold.float().expand(x.shape[0], 1).contiguous() if per_token else None
    args, held = arguments(x, W, b, min(PROBED_K, W.shape[0]), None, None, 0, screen, precision)
    acts, indices, offsets = _ragged(x.shape[0], capacity)
    above, redone = _cpu.encode_above(
        args, address(per_latent), address(bars), acts.data_ptr(), indices.data_ptr(), offsets.data_ptr(), capacity
    )
    del held
    return acts.to(x.dtype), indices, offsets, torch.tensor(above > capacity), torch.tensor(redone)


def encode_batch_topk(
    x: Tensor, W: Tensor, b: Tensor, k: int, screen: _Tensors | None, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args, held = arguments(x, W, b, k, None, None, 0, screen, precision)
    acts, indices, offsets = _ragged(x.shape[0], x.shape[0] * k)
    redone = _cpu.encode_batch_topk(args, acts.data_ptr(), indices.data_ptr(), offsets.data_ptr())
    del held
    return acts.to(x.dtype), indices, offsets, torch.tensor(redone)


def _ragged(n: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(capacity), torch.zeros(capacity, dtype=torch.int32), torch.zeros(n + 1, dtype=torch.int64)
