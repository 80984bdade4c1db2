"""Valid calls of each raw op on the CPU, drawn at random: what spoil.py then makes hostile.

Tensors are made from NumPy arrays, so they do not depend on torch's defaults.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsae import ops
from fastsae.reference import MOMENTS_OF

RAW_OPS = (
    "encode_topk", "encode_above", "encode_batch_topk", "decode", "decode_error", "active_dot", "active_outer",
    "by_latent", "update_latents_",
)  # fmt: skip
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.float64, torch.float16)


@dataclass
class Call:
    """arguments: those of the raw op by name, `backend` among them. spoiled: what was done to them, in words."""

    op: str
    arguments: dict[str, Any]
    spoiled: list[str] = field(default_factory=list)
    setting: str = "as it is"

    def __str__(self) -> str:
        return f"{self.op} with {', '.join(self.spoiled) or 'nothing spoiled'}; torch's settings: {self.setting}"


class Draw:
    """Random choices of one call."""

    def __init__(self, op: str, seed: int, number: int):
        self.rng = np.random.default_rng([seed, zlib.crc32(op.encode()), number])

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def of(self, options: Any) -> Any:
        options = list(options)
        return options[int(self.rng.integers(len(options)))]

    def randn(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(self.rng.standard_normal(shape, dtype=np.float32)).to(dtype)


def scalar(value: float | int | bool) -> Tensor:
    """0-d: float64, int64 or bool."""
    return torch.from_numpy(np.array([value]))[0]


@dataclass(frozen=True)
class Sizes:
    N: int
    D: int
    M: int
    K: int
    dtype: torch.dtype


def sizes(draw: Draw) -> Sizes:
    large = draw.chance(0.02)
    N = draw.of((40, 260, 700)) if large else draw.of((0, 1, 1, 2, 3, 5, 9, 20))
    D = draw.of((64, 130)) if large else draw.of((0, 1, 3, 8, 16, 17, 33, 40))
    M = draw.of((600, 2100)) if large else draw.of((1, 2, 5, 16, 17, 33, 64, 100))
    return Sizes(N, D, M, int(draw.rng.integers(1, min(M, 12) + 1)), draw.of(DTYPES))


def code(draw: Draw, s: Sizes) -> dict[str, Any]:
    """acts, indices, offsets of a code: fixed, or ragged with spare slots of nonsense. No latent twice in a token."""
    if draw.chance(0.5):
        acts = draw.randn((s.N, s.K), s.dtype)
        acts[torch.from_numpy(draw.rng.random((s.N, s.K)) < 0.25)] = 0
        return {"acts": acts, "indices": _latents(draw, s, [s.K] * s.N).view(s.N, s.K), "offsets": None}
    lengths = draw.rng.integers(0, min(s.M, s.K + 2), s.N)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    nnz, spare = int(offsets[-1]), int(draw.of((0, 3)))
    acts = draw.randn((nnz + spare,), s.dtype)
    acts[nnz:] = float("nan")
    indices = torch.cat([_latents(draw, s, lengths), torch.from_numpy(np.full(spare, -7, np.int32))])
    return {"acts": acts, "indices": indices, "offsets": torch.from_numpy(offsets)}


def _latents(draw: Draw, s: Sizes, lengths: Any) -> Tensor:
    """So many of each token, ascending, all of them in one row."""
    chosen = [np.sort(draw.rng.choice(s.M, int(n), replace=False)) for n in lengths]
    return torch.from_numpy(np.concatenate([np.zeros(0), *chosen]).astype(np.int32))


def _backend(draw: Draw) -> str | None:
    return draw.of(("cpu", "cpu", "cpu", None, None, "reference"))


def _encoder(draw: Draw, s: Sizes) -> dict[str, Any]:
    return {
        "x": draw.randn((s.N, s.D), s.dtype),
        "W": draw.randn((s.M, s.D), s.dtype),
        "b": draw.randn((s.M,), s.dtype),
    }


def _kept(draw: Draw, given: dict[str, Any]) -> list[Tensor] | None:
    if given["W"].dtype not in (torch.float32, torch.bfloat16) or draw.chance(0.7):
        return None
    made = ops.prepare_screen(given["W"], given["b"], backend="cpu")
    return None if made is None else made.tensors


def _encode_topk(draw: Draw) -> dict[str, Any]:
    s = sizes(draw)
    given = _encoder(draw, s)
    rows, k = None, s.K
    if draw.chance(0.3):
        kept = np.flatnonzero(draw.rng.random(s.M) < 0.6).astype(np.int32)
        listed = np.concatenate([kept, np.full(int(draw.of((0, 4))), -1, np.int32)])
        rows, k = torch.from_numpy(listed), max(1, min(k, len(listed)))
    scale = draw.randn((s.M,), s.dtype).abs() if draw.chance(0.2) else None
    return given | {
        "k": k, "rows": rows, "scale": scale, "index_offset": draw.of((0, 0, 0, 7)), "screen": _kept(draw, given),
        "precision": draw.of(("exact", "exact", "screened", "fp32")), "backend": _backend(draw),
    }  # fmt: skip


def _encode_above(draw: Draw) -> dict[str, Any]:
    s = sizes(draw)
    given, wide = _encoder(draw, s), torch.float64 if s.dtype == torch.float64 else torch.float32
    shape = draw.of(((), (s.M,), (s.N, 1)))
    return given | {
        "threshold": draw.randn(shape, wide) if shape else scalar(float(draw.rng.random())).to(wide),
        "capacity": draw.of((0, s.N, s.N * s.K, s.N * s.M, s.N * s.M + 3)), "screen": _kept(draw, given),
        "precision": draw.of(("exact", "exact", "screened", "fp32")), "backend": _backend(draw),
    }  # fmt: skip


def _encode_batch_topk(draw: Draw) -> dict[str, Any]:
    s = sizes(draw)
    given = _encoder(draw, s)
    precision = draw.of(("exact", "exact", "screened", "fp32"))
    return given | {"k": s.K, "screen": _kept(draw, given), "precision": precision, "backend": _backend(draw)}


def _decode(draw: Draw) -> dict[str, Any]:
    s = sizes(draw)
    return code(draw, s) | {"W": draw.randn((s.M, s.D), s.dtype), "backend": _backend(draw)}


def _decode_error(draw: Draw) -> dict[str, Any]:
    s = sizes(draw)
    given = code(draw, s) | {"W": draw.randn((s.M, s.D), s.dtype), "target": draw.randn((s.N, s.D), s.dtype)}
    return given | {"bias": draw.randn((s.D,), s.dtype) if draw.chance(0.5) else None, "backend": _backend(draw)}


def _active_dot(draw: Draw) -> dict[str, Any]:
    s = sizes(draw)
    given = {"x": draw.randn((s.N, s.D), s.dtype)} | code(draw, s)
    return given | {"W": draw.randn((s.M, s.D), s.dtype), "backend": _backend(draw)}


def _active_outer(draw: Draw) -> dict[str, Any]:
    s = sizes(draw)
    made = code(draw, s)
    order = None
    if draw.chance(0.4):
        order = list(torch.ops.fastsae.by_latent(made["acts"], made["indices"], made["offsets"], s.M, "reference"))
    x = draw.randn((s.N, s.D), s.dtype)
    return made | {"x": x, "d_sae": s.M, "by_latent": order, "backend": _backend(draw)}


def _by_latent(draw: Draw) -> dict[str, Any]:
    s = sizes(draw)
    return code(draw, s) | {"d_sae": s.M, "backend": _backend(draw)}


def _update_latents(draw: Draw) -> dict[str, Any]:
    s = sizes(draw)
    dtype = torch.float32 if s.dtype == torch.float16 else s.dtype
    s = Sizes(s.N, s.D, s.M, s.K, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tied, d_out = draw.chance(0.2), s.D
    pre_bias = draw.chance(0.5)
    if not tied and not pre_bias and draw.chance(0.3):
        d_out = draw.of((0, 1, 5, 40))
    optimizer = draw.of(MOMENTS_OF)
    kept = MOMENTS_OF[optimizer]
    params = {} if tied else {"W_enc": draw.randn((s.M, s.D), dtype)}
    params |= {
        "W_dec": draw.randn((s.M, d_out), dtype), "b_enc": draw.randn((s.M,), dtype),
        "b_dec": draw.randn((d_out,), dtype),
    }  # fmt: skip
    stored = draw.of(("wide", "wide", "bf16", "8bit") if kept == "mv" else ("wide", "bf16"))
    moments, scales = [], []
    for p in params.values():
        for which in kept:
            moment = draw.randn(tuple(p.shape), wide)
            moment = moment.abs() + 0.1 if which == "v" else moment
            if stored == "bf16":
                moment = moment.bfloat16()
            elif stored == "8bit" and p.ndim == 2:
                moment = moment.to(torch.float8_e4m3fn)
                scales.append(draw.randn((p.shape[0], -(-p.shape[1] // 128)), torch.float32).abs())
            moments.append(moment)
    terms = [code(draw, s) for _ in range(draw.of((0, 1, 1, 2)))]
    none = torch.from_numpy(np.zeros(0, np.float32)).to(dtype)
    no_offsets = torch.from_numpy(np.zeros(0, np.int64))
    for term in terms:
        term["dacts"] = draw.randn(tuple(term["acts"].shape), dtype) if draw.chance(0.3) else none
    segments = draw.of([n for n in (1, 2, 5) if d_out % n == 0])
    added = []
    if draw.chance(0.2):
        shapes = [*([] if tied else [(s.M, s.D)]), (s.M, d_out), (s.M,)]
        added = [draw.randn(shape, wide) for shape in shapes]
    screen: list[Tensor] = []
    if dtype != torch.float64 and draw.chance(0.3):
        made = ops.prepare_screen(params["W_dec" if tied else "W_enc"], params["b_enc"], backend="cpu")
        screen = [] if made is None else made.tensors
    return {
        "W_enc": params.get("W_enc"), "W_dec": params["W_dec"], "b_enc": params["b_enc"], "b_dec": params["b_dec"],
        "moments": moments, "scales": scales, "screen": screen,
        "acts": [t["acts"] for t in terms], "indices": [t["indices"] for t in terms],
        "offsets": [no_offsets if t["offsets"] is None else t["offsets"] for t in terms],
        "dacts": [t["dacts"] for t in terms], "xs": [draw.randn((s.N, s.D), dtype) for _ in terms],
        "grads": [draw.randn((s.N, d_out), dtype) for _ in terms], "has_bias": [draw.chance(0.7) for _ in terms],
        "decoder_pull": draw.randn((s.M, segments), wide) if draw.chance(0.2) else None,
        "db_enc": draw.randn((s.M,), wide) if draw.chance(0.2) else None, "added": added,
        "lr": scalar(0.01), "step": scalar(3),
        "grad_scale": scalar(0.5) if draw.chance(0.2) else None,
        "skip": scalar(draw.chance(0.5)) if draw.chance(0.2) else None,
        "optimizer": optimizer, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8,
        "weight_decay": 0.0 if optimizer == "adam" else draw.of((0.0, 0.1)),
        "clip_rows": 1.0 if draw.chance(0.2) else None, "unit_norm": draw.chance(0.5) and d_out > 0,
        "pre_bias": pre_bias, "norms_only": draw.chance(0.15), "seed": draw.of((0, 5, 2**40)),
        "first_latent": draw.of((0, 0, 7, 2**40)),
        "backend": _backend(draw),
    }  # fmt: skip


MAKERS: dict[str, Callable[[Draw], dict[str, Any]]] = {
    "encode_topk": _encode_topk, "encode_above": _encode_above, "encode_batch_topk": _encode_batch_topk,
    "decode": _decode, "decode_error": _decode_error, "active_dot": _active_dot, "active_outer": _active_outer,
    "by_latent": _by_latent, "update_latents_": _update_latents,
}  # fmt: skip
