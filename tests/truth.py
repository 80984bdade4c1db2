"""How far from the truth an op may be, written once, and the float64 truth itself.

|got - truth| <= C · u · magnitude + u_out · |truth|

where magnitude is the same product with absolute values (|A||W| for a decode), u the unit roundoff of the dtype that
is computed in (float32 for everything narrower) and u_out that of the dtype that is returned. C covers a fixed-order
sum of some hundred products: errors of random sign grow like a square root, and in blocked sums slower still.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastsae
from fastsae import SparseCodes, reference
from tests.cases import Case

C = 16
BACKENDS = [name for name, entry in fastsae.backends().items() if entry["available"]]
ENGINES = [name for name in BACKENDS if name != "reference"]
THREADED = [name for name in ENGINES if name == "cpu"]  # the others do not use torch's CPU threads
GPU = tuple(name for name in ENGINES if name in ("cuda", "triton"))
NARROW = (torch.float32, torch.bfloat16)


def backend_dtypes(*dtypes: torch.dtype) -> list:
    """(backend, dtype) parameters of every available backend: only the reference has float64, only GPUs have fp16."""
    return [
        pytest.param(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}")
        for backend in BACKENDS
        for dtype in dtypes
        if backend == "reference" or dtype in NARROW or (backend in GPU and dtype == torch.float16)
    ]


def roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def bound(truth: Tensor, magnitude: Tensor, dtype: torch.dtype, c: float = C) -> Tensor:
    """The error allowed for a result of this dtype."""
    u = roundoff(torch.float64 if dtype == torch.float64 else torch.float32)
    return c * u * magnitude.double() + roundoff(dtype) * truth.abs()


def assert_within(got: Tensor, truth: Tensor, magnitude: Tensor, what: str = "result", c: float = C) -> None:
    """got against a float64 truth; reports the worst coordinate, max and RMS in units of the bound."""
    assert got.shape == truth.shape, f"{what} has shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    assert truth.dtype == torch.float64
    if truth.numel() == 0:
        return
    finite = truth.isfinite()
    assert torch.equal(got.isfinite(), finite), f"{what} and the truth are not finite in different places"
    error = torch.where(finite, (got.double() - truth).abs(), 0)
    allowed = bound(torch.where(finite, truth, 0), torch.where(finite, magnitude.double(), 0), got.dtype, c)
    ratio = torch.where(error == 0, 0, error / allowed).nan_to_num(nan=float("inf"), posinf=float("inf"))
    if bool((ratio <= 1).all()):
        return
    worst = int(ratio.argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), ratio.shape))
    rms = float(ratio.square().mean().sqrt())
    raise AssertionError(
        f"{what} is off by {float(ratio.max()):.3g} times what is allowed (RMS {rms:.3g}, {int((ratio > 1).sum())} of "
        f"{ratio.numel()} entries); the worst at {place}: got {float(got.flatten()[worst])!r}, expected "
        f"{float(truth.flatten()[worst])!r} within {float(allowed.flatten()[worst]):.3g}"
    )


def scores(x: Tensor, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Pre-acts in float64, (N, M), and their magnitude |x||W|ᵀ + |b|."""
    x, W, b = x.double(), W.double(), b.double()
    return reference.pre_acts(x, W, b), reference.pre_acts(x.abs(), W.abs(), b.abs())


def assert_top_k(codes: SparseCodes, pre: Tensor, magnitude: Tensor, k: int, exact: bool, offset: int = 0) -> None:
    """codes are k largest of relu(pre): their values are the truth's, and their indices reproduce them.

    Indices are compared only where the scores are exact; elsewhere two latents nearer than the bound may change places.
    """
    codes.check()
    acts, indices = codes.acts.double(), codes.indices.long() - offset
    top, chosen = reference.top_k(torch.relu(pre), k)
    assert_within(codes.acts.sort(dim=-1, descending=True).values, top, magnitude.gather(-1, chosen), "the sorted acts")
    occupied = codes.occupied()
    theirs = torch.where(occupied, torch.relu(pre).gather(-1, indices.clamp(0, pre.shape[1] - 1)), 0)
    allowed = magnitude.gather(-1, indices.clamp(0, pre.shape[1] - 1))
    assert_within(codes.acts, theirs, allowed, "the acts at the indices")
    if exact:
        truth = SparseCodes.from_dense(reference.keep_top_k(pre, k), k)
        assert torch.equal(indices, truth.indices.long()), "ties do not go to the lower index"
        assert torch.equal(acts, truth.acts)


def fixed_codes(case: Case, dtype: torch.dtype) -> tuple[SparseCodes, Tensor, Tensor]:
    """The case's top k, computed in float64 and rounded to dtype; x and W along with it."""
    x, W, b = case.inputs(dtype)
    pre, _ = scores(x, W, b)
    return SparseCodes.from_dense(reference.keep_top_k(pre, case.K), case.K).to(dtype), x, W


def ragged_codes(case: Case, dtype: torch.dtype, spare: int = 7) -> tuple[SparseCodes, Tensor, Tensor]:
    """The case's pre-acts above half of the largest, sign kept, with spare slots of invalid values at the end."""
    x, W, b = case.inputs(dtype)
    pre, _ = scores(x, W, b)
    bar = 0.5 * pre.amax() if pre.numel() else pre.new_zeros(())
    codes = SparseCodes.from_dense(torch.where((pre > bar) | (pre == pre.amax() if pre.numel() else False), pre, 0))
    nonsense = torch.full((spare,), float("nan"), dtype=torch.float64)
    wild = torch.full((spare,), 2**30, dtype=torch.int32)
    return (
        SparseCodes(
            torch.cat([codes.acts, nonsense]).to(dtype),
            torch.cat([codes.indices, wild]),
            codes.d_sae,
            codes.offsets,
        ),
        x,
        W,
    )
