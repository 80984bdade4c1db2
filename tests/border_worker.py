"""Every op and a step under another setting of torch: `python -m tests.border_worker SETTING WHEN`.

WHEN is "start": the setting changes before any tensor exists. Or it is "midway": weights, a kept screen, moments and a
trainer exist and have been used once when the setting changes, and a second set of them is used after it. The worker
prints one line of JSON. For each call it holds the SHA-256 of everything that the call returned and wrote under the
setting, or the error that it raised. With `hostile` as SETTING it holds what each malformed call raised.

The worker is a process of its own, because a fault here writes past the end of a buffer. A crash is then a failed test.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fastsae
from bench.hostile.spoil import gone, halved, odd_address
from fastsae import SparseCodes, UpdateTerm, ops
from fastsae.codes import Screen
from fastsae.reference import MOMENTS_OF, scales_shape

N, D, M, K = 96, 40, 512, 8
CPU = torch.device("cpu")
RULES = {
    "topk": fastsae.TopK(K),
    "batch_topk": fastsae.BatchTopK(K),
    "jump_relu": fastsae.JumpReLU(1e-3, 1e-3, 1e-3),
    "gated": fastsae.Gated(1.0),
    "matryoshka": fastsae.Matryoshka(fastsae.TopK(K), groups=(M // 4, M - M // 4)),
}


def _dtype(dtype: torch.dtype) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    return lambda: _done(torch.set_default_dtype, dtype)


def _done(change: Callable[..., None], *arguments: Any, **settings: Any) -> contextlib.AbstractContextManager[Any]:
    change(*arguments, **settings)
    return contextlib.nullcontext()


def _both_defaults() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")


SETTINGS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "as it is": contextlib.nullcontext,
    "bfloat16": _dtype(torch.bfloat16),
    "float64 on meta": lambda: _done(_both_defaults),
    "two threads": lambda: _done(torch.set_num_threads, 2),
    "deterministic": lambda: _done(torch.use_deterministic_algorithms, True),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


class Problem:
    """Weights of a dictionary, the tensors kept beside them, and SAEs that train on the same inputs."""

    def __init__(self, dtype: torch.dtype, backend: str):
        self.dtype, self.backend = dtype, backend
        g = torch.Generator().manual_seed(3)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float32, device=CPU, generator=g)

        self.x, self.W, self.b = randn(N, D).to(dtype), (randn(M, D) / D**0.5).to(dtype), (0.1 * randn(M)).to(dtype)
        self.W_dec = (self.W.float() / self.W.float().norm(dim=1, keepdim=True)).to(dtype)
        self.b_dec, self.grad, self.target = randn(D).to(dtype), randn(N, D).to(dtype), randn(N, D).to(dtype)
        self.scale = randn(M).abs().to(dtype)
        self.rows = torch.arange(0, M, 3, dtype=torch.int32, device=CPU)
        self.threshold = torch.full((M,), 1.0, dtype=torch.float32, device=CPU)
        self.screen = ops.prepare_screen(self.W, self.b, backend=backend)
        self.codes = ops.encode_topk(self.x, self.W, self.b, K, backend=backend)
        self.ragged, _ = ops.encode_above(self.x, self.W, self.b, 1.5, N * K, backend=backend)
        self.updates = {
            f"update {kind} {stored}": self._update(kind, stored)
            for kind in MOMENTS_OF
            for stored in ("wide", "bf16", "8bit")
            if stored == "wide" or (MOMENTS_OF[kind] and (stored == "bf16" or MOMENTS_OF[kind] == "mv"))
        }
        self.saes = {} if dtype != torch.float32 or backend != "cpu" else dict(self._saes())

    def _update(self, kind: str, stored: str) -> dict[str, Any]:
        """The arguments of update_latents_, with parameters of their own."""
        parameters = [t.clone() for t in (self.W, self.W_dec, self.b, self.b_dec)]
        moments, scales = [], []
        for p in parameters:
            dtype = torch.bfloat16 if stored == "bf16" else torch.float32
            dtype = torch.float8_e4m3fn if stored == "8bit" and p.ndim == 2 else dtype
            for _ in MOMENTS_OF[kind]:
                moments.append(torch.zeros(p.shape, dtype=dtype, device=CPU))
                if dtype == torch.float8_e4m3fn:
                    scales.append(torch.zeros(scales_shape(p), dtype=torch.float32, device=CPU))
        return {
            **dict(zip(("W_enc", "W_dec", "b_enc", "b_dec"), parameters, strict=True)),
            **{"moments": moments, "scales": scales, "optimizer": kind, "seed": 1, "backend": self.backend},
            "terms": [UpdateTerm(self.codes, self.x, self.grad), UpdateTerm(self.ragged, self.x, self.grad, False)],
            "lr": torch.full((), 1e-2, dtype=torch.float64, device=CPU),
            "step": torch.full((), 1, dtype=torch.int64, device=CPU),
            "screen": ops.prepare_screen(parameters[0], parameters[2], backend=self.backend),
            "clip_rows": 1.0 if stored == "bf16" else None,
        }

    def _saes(self) -> Iterator[tuple[str, fastsae.FusedTrainStep]]:
        for name, rule in RULES.items():
            moments = "8bit" if name == "batch_topk" else "bf16" if name == "gated" else "fp32"
            sae = fastsae.SparseAutoencoder(D, M, rule, dtype=torch.float32, device=CPU, seed=0)
            # The sparse way: a dense pass is torch's products, whose bits depend on the threads on some processors.
            yield name, fastsae.FusedTrainStep(sae, lr=1e-3, moments=moments, backend="cpu", dense_above=1.0)

    def calls(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        x, W, b, codes, ragged, backend = self.x, self.W, self.b, self.codes, self.ragged, self.backend
        more: dict[str, dict[str, Any]] = {
            "plain": {},
            "kept": {"screen": self.screen},
            "trusted": {"screen": self.screen, "precision": "screened"},
            "fp32": {"precision": "fp32"},
        }
        for name, given in more.items():
            given = {**given, "backend": backend}
            yield f"encode_topk {name}", lambda g=given: ops.encode_topk(x, W, b, K, **g)
            yield f"encode_above {name}", lambda g=given: ops.encode_above(x, W, b, 1.5, N * K, **g)
            yield f"encode_batch_topk {name}", lambda g=given: ops.encode_batch_topk(x, W, b, K, **g)
        yield "encode_topk rows", lambda: ops.encode_topk(x, W, b, K, rows=self.rows, backend=backend)
        yield "encode_topk scale", lambda: ops.encode_topk(x, W, b, K, scale=self.scale, backend=backend)
        yield "encode_above each", lambda: ops.encode_above(x, W, b, self.threshold, N * K, backend=backend)
        yield "encode_above short", lambda: ops.encode_above(x, W, b, 0.0, N, backend=backend)
        yield "prepare_screen", lambda: ops.prepare_screen(W, b, backend=backend)
        yield "prepare_screen x", lambda: ops.prepare_screen(W, b, x=x, k=K, backend=backend)
        yield "prepare_screen W", lambda: ops.prepare_screen(W, backend=backend)
        for name, code in (("fixed", codes), ("ragged", ragged)):
            order = ops.by_latent(code, backend=backend)
            yield f"by_latent {name}", lambda c=code: ops.by_latent(c, backend=backend)
            yield f"decode {name}", lambda c=code: ops.decode(c, W, backend=backend)
            yield (
                f"decode_error {name}",
                lambda c=code: ops.decode_error(c, W, self.target, self.b_dec, backend=backend),
            )
            yield f"active_dot {name}", lambda c=code: ops.active_dot(x, c, W, backend=backend)
            yield f"active_outer {name}", lambda c=code: ops.active_outer(c, x, backend=backend)
            yield (
                f"active_outer order {name}",
                lambda c=code, o=order: ops.active_outer(c, x, by_latent=o, backend=backend),
            )
            yield f"views {name}", lambda c=code: (c.to_dense(), c[::2], c.token_ids(), c.keep(c.acts > 1), c.l0)
        for name, given in self.updates.items():
            yield name, lambda g=given: (ops.update_latents_(**g), _leaves(g))
        for name, step in self.saes.items():
            yield (
                f"module {name}",
                lambda n=name: fastsae.SparseAutoencoder(D, M, RULES[n], dtype=torch.float32, device=CPU, seed=0),
            )
            yield f"encode {name}", lambda s=step: s.sae.encode(x)
            yield f"forward {name}", lambda s=step: s.sae(x)
            yield f"step {name}", lambda s=step: (s(x), s(x), s.sae, s.state_dict())


def _leaves(value: Any) -> list[Tensor]:
    """Every tensor inside value, in a fixed order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, torch.nn.Module):
        return _leaves(value.state_dict())
    if isinstance(value, SparseCodes):
        return _leaves([value.acts, value.indices, value.offsets])
    if isinstance(value, dict):
        return [t for name in sorted(value) for t in _leaves(value[name])]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in _leaves(item)]
    return _leaves(vars(value)) if hasattr(value, "__dict__") else []


def digest(value: Any) -> str:
    """A hash of dtypes, shapes and bits. A tensor on another device raises."""
    found = hashlib.sha256()
    for t in _leaves(value):
        found.update(f"{t.dtype} {tuple(t.shape)} {t.device}".encode())
        found.update(bytes(t.detach().contiguous().view(-1).view(torch.uint8).numpy()) if t.numel() else b"")
    return found.hexdigest()[:16]


def outcome(call: Callable[[], Any]) -> str:
    """The digest of what the call returns, or its error."""
    try:
        return digest(call())
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def problems() -> dict[str, Problem]:
    kinds = (("cpu", torch.float32), ("cpu", torch.bfloat16), ("reference", torch.float32))
    return {f"{backend} {dtype}": Problem(dtype, backend) for backend, dtype in kinds}


def run(made: dict[str, Problem]) -> dict[str, str]:
    return {f"{which}: {name}": outcome(call) for which, p in made.items() for name, call in p.calls()}


def main(setting: str, when: str) -> None:
    torch.set_num_threads(1)
    if setting == "hostile":
        print(json.dumps({name: outcome(call) for name, call in hostile()}))
        return
    if when == "start":
        with SETTINGS[setting]():
            print(json.dumps(run(problems())))
        return
    before, after = problems(), problems()
    run(before)
    with SETTINGS[setting]():
        print(json.dumps(run(after)))


# -- what the border refuses -------------------------------------------------------------------------------------------


def screens(p: Problem) -> dict[str, list[Tensor]]:
    """Screens that do not belong to W."""
    words, tables, code, factors = p.screen.tensors
    other = torch.randn(M, D + 64, dtype=torch.float32, device=CPU)
    return {
        "fewer latents": ops.prepare_screen(p.W[: M // 2], backend="cpu").tensors,
        "more latents": ops.prepare_screen(torch.cat([p.W, p.W]), backend="cpu").tensors,
        "wider": ops.prepare_screen(other, backend="cpu").tensors,
        "words cut": [words[:-1], tables, code, factors],
        "tables cut": [words, tables[:, :-16].contiguous(), code, factors],
        "words narrow": [words.to(torch.int16), tables, code, factors],
        "tables bfloat16": [words, tables.bfloat16(), code, factors],
        "words apart": [torch.stack([words, words], 1)[:, 0], tables, code, factors],
        "tables transposed": [words, tables.mT.contiguous().mT, code, factors],
        "words without memory": [gone(words), tables, code, factors],
        "tables without memory": [words, gone(tables), code, factors],
        "unknown format": [words, tables, torch.full_like(code, 99), factors],
        "format float": [words, tables, code.float(), factors],
        "two tensors": [words, tables],
        "factors of one side": [words, tables, code, factors[:1]],
        "factors bfloat16": [words, tables, code, factors.bfloat16()],
        "factors without memory": [words, tables, code, gone(factors)],
        "format of two": [words, tables, torch.stack([code, code]), factors],
    }


def hostile() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls that must never reach C++, by name. All of them work on copies."""
    from fastsae import _cpu
    from fastsae.backends.cpu import memory

    p = Problem(torch.float32, "cpu")
    x, W, b, codes, raw = p.x, p.W, p.b, p.codes, torch.ops.fastsae
    whole = p.screen.format == f"cpu/{_cpu.Format.f32.name}"  # processors without 8-bit products: W itself is read
    for name, tensors in screens(p).items():
        if whole and (name == "wider" or name.startswith("words")):
            continue
        kept = Screen(tensors, p.screen.format)
        given = {**p.updates["update adam wide"], "screen": kept}
        yield f"update_latents_, screen {name}", lambda g=given: ops.update_latents_(**g)
        if name in ("words apart", "tables transposed"):
            continue  # the encoders copy what they only read, and the copy is a valid screen
        yield f"encode_topk, screen {name}", lambda s=kept: ops.encode_topk(x, W, b, K, screen=s)
        yield f"encode_above, screen {name}", lambda s=kept: ops.encode_above(x, W, b, 1.5, N * K, screen=s)
        yield f"encode_batch_topk, screen {name}", lambda s=kept: ops.encode_batch_topk(x, W, b, K, screen=s)
    for name, spoil in (
        ("without memory", gone),
        ("of half its memory", halved),
        ("at an odd address", odd_address),
    ):
        yield f"encode_topk, W {name}", lambda f=spoil: ops.encode_topk(x, f(W), b, K, backend="cpu")
        yield f"encode_topk, b {name}", lambda f=spoil: ops.encode_topk(x, W, f(b), K, backend="cpu")
        yield f"decode, W {name}", lambda f=spoil: ops.decode(codes, f(W), backend="cpu")
        acts = SparseCodes(spoil(codes.acts), codes.indices, M)
        yield f"decode, acts {name}", lambda c=acts: ops.decode(c, W, backend="cpu")
        yield f"active_outer, x {name}", lambda f=spoil: ops.active_outer(codes, f(x), backend="cpu")
        for what in ("W_enc", "W_dec", "b_enc", "b_dec"):
            given = {**p.updates["update adam wide"], what: spoil(p.updates["update adam wide"][what])}
            yield f"update_latents_, {what} {name}", lambda g=given: ops.update_latents_(**g)
        for i in range(8):
            moments = list(p.updates["update adam 8bit"]["moments"])
            if moments[i].itemsize == 1 and spoil is odd_address:
                continue  # single bytes need no alignment
            moments[i] = spoil(moments[i])
            given = {**p.updates["update adam 8bit"], "moments": moments}
            yield f"update_latents_, moment {i} {name}", lambda g=given: ops.update_latents_(**g)
        scales = [spoil(t) for t in p.updates["update adam 8bit"]["scales"]]
        yield (
            f"update_latents_, scales {name}",
            lambda s=scales: ops.update_latents_(**{**p.updates["update adam 8bit"], "scales": s}),
        )
    order = list(vars(ops.by_latent(codes, backend="cpu")).values())
    for i, what in enumerate(("offsets", "tokens", "slots")):
        cut = [t[:-1] if j == i else t for j, t in enumerate(order)]
        yield (
            f"active_outer, {what} of the order cut",
            lambda o=cut: raw.active_outer(codes.acts, codes.indices, None, x, M, o, "cpu"),
        )
    yield "encode_above, no room", lambda: ops.encode_above(x, W, b, 1.5, 2**62, backend="cpu")
    yield "encode_above, past int64", lambda: ops.encode_above(x, W, b, 1.5, 2**63 - 1, backend="cpu")

    # Structs that do not fit each other: a caller in Python may pass them, and C++ refuses them.
    A, small = memory.matrix("W", W), memory.matrix("W", W[: M // 2])
    code, f32 = memory.codes(codes.acts, codes.indices, None, M), _cpu.Dtype.f32
    wrong = memory.codes(codes.acts, codes.indices + 2, None, M)
    few = memory.codes(codes.acts[:4], codes.indices[:4], None, M)
    tokens, numbers = memory.matrix("x", x), _cpu.Numbers(x.data_ptr(), N * D, f32)
    yield "decode, a dictionary of half the latents", lambda: _cpu.decode(code, small, tokens, 1)
    yield "decode, out of half the tokens", lambda: _cpu.decode(code, A, memory.matrix("x", x[: N // 2]), 1)
    yield "decode, out bfloat16", lambda: _cpu.decode(code, A, memory.matrix("x", x.bfloat16()), 1)
    yield "decode, out of one row", lambda: _cpu.decode(code, A, memory.matrix("x", x[:1].expand(N, D)), 1)
    yield "decode, no thread", lambda: _cpu.decode(code, A, tokens, 0)
    yield "decode, codes outside", lambda: _cpu.decode(wrong, A, tokens, 1)
    yield "active_dot, half the tokens", lambda: _cpu.active_dot(memory.matrix("x", x[: N // 2]), code, A, numbers, 1)
    yield "active_dot, out of x's size", lambda: _cpu.active_dot(tokens, code, A, numbers, 1)
    yield "by_latent, an order of fewer slots", lambda: _cpu.by_latent(code, memory.sort(few)[0], 1)
    yield "active_outer, another code's order", lambda: _cpu.active_outer(few, memory.sort(code)[0], tokens, A, 1)
    yield (
        "active_outer, an order of the same size",
        lambda: ops.active_outer(codes, x, by_latent=ops.by_latent(SparseCodes(codes.acts, codes.indices.flip(0), M))),
    )
    yield "a matrix of -1 rows", lambda: _cpu.Matrix(_cpu.Numbers(0, 0, f32), -1, 4, 4)
    yield "a matrix past int64", lambda: _cpu.Matrix(_cpu.Numbers(0, 0, f32), 2**40, 2**40, 2**40)
    yield "a matrix past its numbers", lambda: _cpu.Matrix(numbers, N + 1, D, D)
    yield "a matrix of integers", lambda: _cpu.Matrix(_cpu.Numbers(16, 16, _cpu.Dtype.i32), 4, 4, 4)
    yield "numbers without an address", lambda: _cpu.Numbers(0, 1, f32)
    yield "numbers at an odd address", lambda: _cpu.Numbers(17, 1, f32)
    yield "fewer than no numbers", lambda: _cpu.Numbers(16, -1, f32)
    yield "codes of too few slots", lambda: _cpu.Codes(numbers, numbers, None, 4, 4, 8)
    indices = _cpu.Numbers(16, N * D, _cpu.Dtype.i32)
    yield "codes of 2^31 latents", lambda: _cpu.Codes(numbers, indices, None, N, D, 2**31)
    ends = torch.tensor([0, N * K + 1], dtype=torch.int64, device=CPU)
    past = memory.codes(codes.acts.flatten(), codes.indices.flatten(), ends, M)
    yield "codes that end past their slots", lambda: _cpu.by_latent(past, memory.sort(past)[0], 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
