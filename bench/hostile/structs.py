"""The C++ extension called by itself: structs that Python made well, each of tensors of its own, joined at random.

No Python check stands before these calls. Each must raise ValueError or TypeError, or write nothing but its results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.hostile.calls import Draw
from fastsae.backends.cpu import memory, screen

SIZES = (0, 1, 2, 3, 16, 17, 33)
KINDS = tuple(memory.KINDS)


class Pool:
    """Random tensors and structs, nearly all of one size per dimension, so that many a call misses by one struct."""

    def __init__(self, draw: Draw):
        self.draw = draw
        self.usual, self.dtype = draw.of(SIZES), draw.of(memory.DTYPES)

    def size(self) -> int:
        return self.usual if self.draw.chance(0.95) else self.draw.of((*SIZES, self.usual + 1, max(0, self.usual - 1)))

    def floating(self) -> torch.dtype:
        return self.dtype if self.draw.chance(0.97) else self.draw.of(memory.DTYPES)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made = self.draw.randn(shape, torch.float32) if dtype.is_floating_point else None
        return made.to(dtype) if made is not None else torch.from_numpy(self.draw.rng.integers(-1, 20, shape)).to(dtype)

    def numbers(self, dtype: torch.dtype | None = None, size: int | None = None) -> Any:
        dtype = dtype if dtype and self.draw.chance(0.97) else self.draw.of(KINDS)
        size = self.size() * self.size() if size is None else size
        t = self.tensor((size if self.draw.chance(0.95) else max(0, size + self.draw.of((-1, 1, self.usual))),), dtype)
        return memory.numbers("numbers", t, dtype, tuple(t.shape))

    def maybe(self, *given: Any) -> Any:
        return self.numbers(*given) if self.draw.chance(0.5) else None

    def matrix(self) -> Any:
        return memory.matrix("matrix", self.tensor((self.size(), self.size()), self.floating()))

    def codes(self) -> Any:
        n, k, latents = self.size(), self.size(), self.size()
        dtype, high = self.floating(), max(1, latents + self.draw.of((0,) * 20 + (2,)))
        ragged = self.draw.chance(0.4)
        shape = (n * k,) if ragged else (n, k)
        indices = torch.from_numpy(
            self.draw.rng.integers(self.draw.of((0,) * 20 + (-1,)), high, shape).astype(np.int32)
        )
        offsets = torch.from_numpy(np.sort(self.draw.rng.integers(0, n * k + 1, n + 1)).astype(np.int64))
        offsets[0] = 0
        if self.draw.chance(0.05):
            offsets = offsets.flip(0)
        return memory.codes(self.tensor(shape, dtype), indices, offsets if ragged else None, latents)

    def order(self, code: Any = None) -> Any:
        code = self.codes() if code is None or self.draw.chance(0.1) else code
        if self.draw.chance(0.8):
            return memory.sort(code)[0]
        sizes = ((code.d_sae + 1, torch.int64), (code.slots, torch.int32), (code.slots, torch.int64))
        offsets, tokens, slots = (self.tensor((n,), dtype) for n, dtype in sizes)
        return memory.latent_order(code, offsets, tokens, slots)

    def screen(self) -> Any:
        latents, d = self.size(), self.size()
        formats = [f for f in memory._cpu.Format.__members__.values() if memory._cpu.format_supported(f)]
        made = screen.allocate(latents, d, self.draw.of(formats))
        for t in made[:2]:
            t.zero_()
        return screen.view(made, latents, d)

    def encode(self) -> Any:
        x, W, s = self.matrix(), self.matrix(), self.screen()
        self.k = self.draw.of((1,) * 10 + (0, 2, 40, -1))
        rows = self.numbers(torch.int32, s.latents) if self.draw.chance(0.2) else None
        return memory._cpu.EncodeArgs(
            x, W, self.numbers(torch.float32, self.size()), self.maybe(torch.float32, self.size()),
            rows, self.draw.of((0,) * 20 + (3, -1, 2**31)), self.k, self.draw.chance(0.8), self.draw.chance(0.8), s, 1,
        )  # fmt: skip


def _update(p: Pool) -> None:
    cpu, draw = memory._cpu, p.draw
    latents, d_in, d_out = p.size(), p.size(), p.size()
    wide = p.floating()
    kept = draw.of((torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn))
    kind, has_m, has_v = draw.of(
        (("adam", True, True), ("adamw", True, True), ("lion", True, False), ("signsgd", False, False))
    )
    if draw.chance(0.1):
        has_v = not has_v

    def parameter(size: int, scales: int) -> Any:
        eight = kept == torch.float8_e4m3fn
        given = [p.numbers(wide, size), *(p.numbers(kept, size) if held else None for held in (has_m, has_v))]
        return cpu.Parameter(*given, *(p.numbers(torch.float32, scales) if eight else None for _ in range(2)), 0, 0)

    terms = [
        cpu.UpdateTerm(code, p.order(code), p.matrix(), p.matrix(), p.maybe(wide, code.slots), True)
        for code in [p.codes() for _ in range(draw.of((0, 0, 1)))]
    ]
    tied = draw.chance(0.3)
    parts = cpu.UpdateParts(p.maybe(wide), draw.of((1,) * 9 + (2, 0)), None, None, None, p.maybe(wide, latents))
    cpu.update_latents(
        None if tied else parameter(latents * d_in, latents), parameter(latents * d_out, latents),
        parameter(latents, 1), parameter(d_out, 1), latents=latents, d_in=d_out if tied else d_in, d_out=d_out,
        terms=terms, parts=parts,
        optimizer=cpu.OptimizerArgs(getattr(cpu.OptimizerKind, kind), 0.1, 0.1, 1.0, 0.9, 0.9, 1e-8, 1.0),
        clip_rows=0.0, grad_scale=1.0, unit_norm=draw.chance(0.5), pre_bias=draw.chance(0.5), norms_only=False, seed=0,
        step=1, screen=cpu.Screen(None, None, cpu.Format.f32, latents, d_out if tied else d_in), threads=1,
        stats=p.numbers(torch.float64, 4),
    )  # fmt: skip


def _active_dot(p: Pool) -> None:
    code = p.codes()
    memory._cpu.active_dot(p.matrix(), code, p.matrix(), p.numbers(p.floating(), code.slots), 1)


def _active_outer(p: Pool) -> None:
    code = p.codes()
    memory._cpu.active_outer(code, p.order(code), p.matrix(), p.matrix(), 1)


def _by_latent(p: Pool) -> None:
    code = p.codes()
    memory._cpu.by_latent(code, p.order(code), 1)


def _calls() -> dict[str, Callable[[Pool], Any]]:
    cpu = memory._cpu
    f32, i32, i64 = torch.float32, torch.int32, torch.int64
    return {
        "decode": lambda p: cpu.decode(p.codes(), p.matrix(), p.matrix(), 1),
        "active_dot": _active_dot,
        "active_outer": _active_outer,
        "by_latent": _by_latent,
        "prepare_screen": lambda p: cpu.prepare_screen(p.matrix(), p.maybe(i32), p.screen(), 1),
        "encode_topk": lambda p: cpu.encode_topk(
            p.encode(), *(p.numbers(d, p.usual * max(p.k, 0)) for d in (f32, i32))
        ),
        "encode_above": lambda p: cpu.encode_above(
            p.encode(),
            *p.draw.of(((p.numbers(f32, p.usual), None), (None, p.numbers(f32, p.usual)), (None, None))),
            p.numbers(f32),
            p.numbers(i32),
            p.numbers(i64, p.usual + 1),
        ),
        "encode_batch_topk": lambda p: cpu.encode_batch_topk(
            p.encode(), *(p.numbers(d, p.usual * max(p.k, 0)) for d in (f32, i32)), p.numbers(i64, p.usual + 1)
        ),
        "update_latents": _update,
    }


def outcome(seed: int, number: int) -> tuple[str, str]:
    """("right" | "refused" | "wrong", what) of one call."""
    draw = Draw("structs", seed, number)
    calls = _calls()
    name = draw.of(calls)
    try:
        calls[name](Pool(draw))
    except (ValueError, TypeError) as error:
        return ("refused", type(error).__name__) if str(error) else ("wrong", f"{name}: an error without a word")
    return "right", ""
