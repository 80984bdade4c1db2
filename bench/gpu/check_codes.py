"""The ops that make and use codes against float64: what each must return on any backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bench.gpu.truth import Hard, allowed, errors, scores, within
from fastsae import SparseCodes, ops, reference


def all_equal(got: Tensor, expected: Tensor, what: str) -> None:
    if not torch.equal(got.cpu(), expected.cpu()):
        raise AssertionError(f"{what}: got {got.cpu().flatten()[:8].tolist()}…, expected "
                             f"{expected.flatten()[:8].tolist()}… ({tuple(expected.shape)})")  # fmt: skip


def top_k(codes: SparseCodes, pre: Tensor, magnitude: Tensor, k: int, exact: bool, offset: int = 0) -> float:
    """codes (on the CPU) are the k largest of relu(pre): the values are the truth's, and the indices reproduce them."""
    codes.check()
    top, chosen = reference.top_k(torch.relu(pre), k)
    worst = within(codes.acts.sort(dim=-1, descending=True).values, top, magnitude.gather(-1, chosen), "sorted acts")
    indices = (codes.indices.long() - offset).clamp(0, pre.shape[1] - 1)
    theirs = torch.where(codes.occupied(), torch.relu(pre).gather(-1, indices), 0)
    worst = max(worst, within(codes.acts, theirs, magnitude.gather(-1, indices), "acts at their indices"))
    if exact:
        expected = SparseCodes.from_dense(reference.keep_top_k(pre, k), k)
        all_equal(codes.indices - offset, expected.indices, "indices where many scores tie")
    return worst


def encode_topk(case: Hard, dtype: torch.dtype, device: str, backend: str) -> float:
    x, W, b = case.inputs(dtype)
    pre, magnitude = scores(x, W, b)
    codes = ops.encode_topk(x.to(device), W.to(device), b.to(device), case.K, backend=backend)
    return top_k(codes.to("cpu"), pre, magnitude, case.K, case.integers)


def encode_topk_options(case: Hard, dtype: torch.dtype, device: str, backend: str) -> float:
    """rows with absent ones, scale, index_offset, a screen made beforehand, and x that is not contiguous."""
    x, W, b = case.inputs(dtype)
    g = torch.Generator().manual_seed(3)
    scale = (0.5 + torch.rand(case.M, generator=g)).to(dtype)
    kept = torch.randperm(case.M, generator=g)[: max(case.M // 2, case.K)].sort().values
    rows = torch.cat([kept, kept.new_full((9,), -1)]).int()
    pre, magnitude = (s * scale.double() for s in scores(x, W, b))
    left = torch.ones(case.M, dtype=torch.bool).index_fill(0, kept, False)
    pre = pre.masked_fill(left, -1)
    spread = torch.zeros(case.N, 2 * case.D, dtype=dtype)
    spread[:, ::2] = x
    codes = ops.encode_topk(
        spread.to(device)[:, ::2], W.to(device), b.to(device), case.K,
        rows=rows.to(device), scale=scale.to(device), index_offset=1000, backend=backend,
    ).to("cpu")  # fmt: skip
    empty = ~codes.occupied()
    all_equal(codes.indices[empty], torch.full_like(codes.indices[empty], 1000 + case.M - 1), "empty slots")
    worst = top_k(codes, pre, magnitude, case.K, False, offset=1000)
    screen = ops.prepare_screen(W.to(device), b.to(device), backend=backend)
    plain = ops.encode_topk(x.to(device), W.to(device), b.to(device), case.K, backend=backend)
    screened = ops.encode_topk(x.to(device), W.to(device), b.to(device), case.K, screen=screen, backend=backend)
    all_equal(screened.indices, plain.indices.cpu(), "indices with a screen made beforehand")
    all_equal(screened.acts, plain.acts.cpu(), "acts with a screen made beforehand")
    return worst


def stored(codes: SparseCodes) -> tuple[Tensor, Tensor, Tensor]:
    """Token, latent and act of every stored entry of a ragged code on the CPU."""
    n = int(codes.nnz)
    return codes.token_ids()[:n], codes.indices[:n].long(), codes.acts[:n]


def encode_above(case: Hard, dtype: torch.dtype, device: str, backend: str) -> float:
    """Thresholds: a number, one per latent, one per token; then a capacity that is too small."""
    x, W, b = case.inputs(dtype)
    pre, magnitude = scores(x, W, b)
    X, V, c = (t.to(device) for t in (x, W, b))
    bar = float(pre.quantile(0.9)) + 0.01 if pre.numel() else 0.0
    bar = round(bar * 4) / 4 + 0.125  # between the whole numbers of a case of integers
    g = torch.Generator().manual_seed(4)
    spread = 0.5 * torch.rand(case.M, generator=g) if not case.integers else torch.zeros(case.M)
    worst = 0.0
    for threshold in (bar, bar + spread, torch.full((case.N, 1), bar)):
        level = torch.as_tensor(threshold, dtype=torch.float32)
        given = level.to(device) if isinstance(threshold, Tensor) else threshold
        codes, overflow = ops.encode_above(X, V, c, given, case.N * case.M, backend=backend)
        codes = codes.to("cpu").check()
        if bool(overflow):
            raise AssertionError("overflow is True at a capacity of N·M")
        tokens, latents, acts = stored(codes)
        worst = max(worst, within(acts, pre[tokens, latents], magnitude[tokens, latents], "pre-acts above"))
        got = torch.zeros_like(pre, dtype=torch.bool)
        got[tokens, latents] = True
        gap = pre - level.double()
        band = allowed(pre, magnitude, torch.float32)
        wrong = (got != (gap > 0)) & (gap.abs() > band)
        if bool(wrong.any()):
            raise AssertionError(f"{int(wrong.sum())} latents are on the wrong side of the threshold")
    few = max(int(codes.nnz) // 2, 0)
    cut, overflow = ops.encode_above(X, V, c, given, few, backend=backend)
    cut = cut.to("cpu").check()
    if bool(overflow) != (int(codes.nnz) > few):
        raise AssertionError(f"overflow is {bool(overflow)} with {int(codes.nnz)} latents above and room for {few}")
    all_equal(cut.indices, codes.indices[:few], "the first latents in token order, where they overflow")
    return worst


def encode_batch_topk(case: Hard, dtype: torch.dtype, device: str, backend: str) -> float:
    x, W, b = case.inputs(dtype)
    pre, magnitude = scores(x, W, b)
    codes = ops.encode_batch_topk(x.to(device), W.to(device), b.to(device), case.K, backend=backend)
    codes = codes.to("cpu").check()
    tokens, latents, acts = stored(codes)
    A = reference.batch_top_k(pre, case.K)
    positive = A[A > 0].sort(descending=True).values
    if abs(len(acts) - len(positive)) > int((positive < 1e-6).sum()):
        raise AssertionError(f"{len(acts)} activations are stored, expected {len(positive)}")
    worst = within(acts, pre[tokens, latents], magnitude[tokens, latents], "acts at their indices")
    size = magnitude.max().expand(len(acts)) if magnitude.numel() else magnitude.flatten()
    worst = max(worst, within(acts.sort(descending=True).values, positive[: len(acts)], size, "sorted acts"))
    if case.integers:
        expected = SparseCodes.from_dense(A)
        all_equal(latents, expected.indices.long(), "latents where many scores tie")
        all_equal(tokens, expected.token_ids(), "tokens where many scores tie")
    return worst


Layout = Callable[[Hard, torch.dtype], SparseCodes]
LAYOUTS: dict[str, Layout] = {"fixed": Hard.fixed, "ragged": Hard.ragged}


def decode(case: Hard, dtype: torch.dtype, device: str, backend: str) -> float:
    _, W, _ = case.inputs(dtype)
    worst = 0.0
    for name, layout in LAYOUTS.items():
        codes = layout(case, dtype)
        A = codes.to(torch.float64).to_dense()
        got = ops.decode(codes.to(device), W.to(device), backend=backend)
        worst = max(worst, within(got, A @ W.double(), A.abs() @ W.double().abs(), f"decode of a {name} code"))
    return worst


def decode_error(case: Hard, dtype: torch.dtype, device: str, backend: str) -> float:
    """With a bias and without."""
    x, W, _ = case.inputs(dtype)
    bias = torch.linspace(-1, 1, case.D).to(dtype)
    worst = 0.0
    for layout in LAYOUTS.values():
        codes = layout(case, dtype)
        A, on = codes.to(torch.float64).to_dense(), codes.to(device)
        for b in (None, bias):
            got = ops.decode_error(on, W.to(device), x.to(device), None if b is None else b.to(device), backend=backend)
            shift = torch.zeros(case.D, dtype=torch.float64) if b is None else b.double()
            truth = A @ W.double() + shift - x.double()
            size = A.abs() @ W.double().abs() + shift.abs() + x.double().abs()
            if backend == "cpu" and dtype != torch.float32:  # it rounds the decode before it subtracts
                size = size * 2**13
            worst = max(worst, errors(truth, size, *(t.cpu() for t in got)))
    return worst


def active_dot(case: Hard, dtype: torch.dtype, device: str, backend: str) -> float:
    x, W, _ = case.inputs(dtype)
    dense, size = x.double() @ W.double().mT, x.double().abs() @ W.double().abs().mT
    worst = 0.0
    for name, layout in LAYOUTS.items():
        codes = layout(case, dtype)
        got = ops.active_dot(x.to(device), codes.to(device), W.to(device), backend=backend).cpu()
        occupied = codes.occupied()
        if bool((got[~occupied] != 0).any()):
            raise AssertionError(f"active_dot of a {name} code: an empty slot is not 0")
        tokens = codes.token_ids().view(codes.acts.shape)[occupied]
        latents = codes.indices[occupied].long()
        worst = max(worst, within(got[occupied], dense[tokens, latents], size[tokens, latents], f"{name} active_dot"))
    return worst


def active_outer(case: Hard, dtype: torch.dtype, device: str, backend: str) -> float:
    x, _, _ = case.inputs(dtype)
    worst = 0.0
    for name, layout in LAYOUTS.items():
        codes = layout(case, dtype)
        A, on = codes.to(torch.float64).to_dense(), codes.to(device)
        truth, size = A.mT @ x.double(), A.abs().mT @ x.double().abs()
        got = ops.active_outer(on, x.to(device), case.M, backend=backend)
        worst = max(worst, within(got, truth, size, f"active_outer of a {name} code"))
        order = ops.by_latent(on, backend=backend)
        same = ops.active_outer(on, x.to(device), case.M, by_latent=order, backend=backend)
        all_equal(same, got.cpu(), "active_outer with its order at hand")
    return worst


def by_latent(case: Hard, dtype: torch.dtype, device: str, backend: str) -> float:
    for name, layout in LAYOUTS.items():
        codes = layout(case, dtype)
        order = ops.by_latent(codes.to(device), backend=backend)
        occupied = codes.occupied().flatten()
        latents = torch.where(occupied, codes.indices.flatten().long(), case.M)
        slots = latents.argsort(stable=True)[: int(occupied.sum())]
        counts = torch.bincount(latents, minlength=case.M + 1)[: case.M]
        n = len(slots)
        all_equal(order.offsets, torch.cat([counts.new_zeros(1), counts.cumsum(0)]), f"offsets of a {name} code")
        all_equal(order.slots[:n], slots, f"slots of a {name} code")
        all_equal(order.tokens[:n], codes.token_ids()[slots].int(), f"tokens of a {name} code")
    return 0.0


def exact_is_fp32(case: Hard, dtype: torch.dtype, device: str, backend: str) -> float:
    """A screen never changes the result: precision "exact" and "fp32" give the same bits."""
    x, W, b = (t.to(device) for t in case.inputs(dtype))
    exact, full = (ops.encode_topk(x, W, b, case.K, precision=p, backend=backend) for p in ("exact", "fp32"))
    batch, batch_full = (
        ops.encode_batch_topk(x, W, b, case.K, precision=p, backend=backend) for p in ("exact", "fp32")
    )
    above, above_full = (
        ops.encode_above(x, W, b, 0.5, case.N * case.M, precision=p, backend=backend)[0] for p in ("exact", "fp32")
    )
    for name, one, other in (
        ("encode_topk", exact, full), ("encode_batch_topk", batch, batch_full), ("encode_above", above, above_full),
    ):  # fmt: skip
        n = one.acts.numel() if one.offsets is None else int(one.nnz)
        if one.offsets is not None and other.offsets is not None:
            all_equal(one.offsets, other.offsets.cpu(), f"{name}: offsets")
        all_equal(one.indices.flatten()[:n], other.indices.flatten()[:n].cpu(), f"{name}: indices")
        all_equal(one.acts.flatten()[:n], other.acts.flatten()[:n].cpu(), f"{name}: acts")
    return 0.0


def everything(case: Hard, dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
    """One call of every op but the update: its tensors, cut to what counts."""
    x, W, b = (t.to(device) for t in case.inputs(dtype))
    fixed, ragged = case.fixed(dtype).to(device), case.ragged(dtype).to(device)
    found: list[Tensor] = []
    for codes in (
        ops.encode_topk(x, W, b, case.K, backend=backend),
        ops.encode_batch_topk(x, W, b, case.K, backend=backend),
        ops.encode_above(x, W, b, 0.5, case.N * case.M, backend=backend)[0],
    ):
        n = codes.acts.numel() if codes.offsets is None else int(codes.nnz)
        found += [codes.acts.flatten()[:n], codes.indices.flatten()[:n]]
    for codes in (fixed, ragged):
        order = ops.by_latent(codes, backend=backend)
        n = int(order.offsets[-1])
        found += [order.offsets, order.tokens[:n], order.slots[:n]]
        found += [*ops.decode_error(codes, W, x, backend=backend)]
        found += [ops.decode(codes, W, backend=backend), ops.active_outer(codes, x, case.M, backend=backend)]
        dots = ops.active_dot(x, replace(codes, acts=codes.acts.nan_to_num(0)), W, backend=backend)
        found.append(dots)
    return found


CHECKS: dict[str, Callable[[Hard, torch.dtype, str, str], float]] = {
    "encode_topk": encode_topk,
    "encode_batch_topk": encode_batch_topk,
    "encode_above": encode_above,
    "decode": decode,
    "decode_error": decode_error,
    "active_dot": active_dot,
    "active_outer": active_outer,
    "by_latent": by_latent,
    "exact is fp32": exact_is_fp32,
}
