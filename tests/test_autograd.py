"""The one autograd layer: finite differences in float64, and torch's own autograd through the dense mathematics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastsae import SparseCodes, ops, reference
from tests import truth
from tests.cases import BY_NAME

pytestmark = pytest.mark.usefixtures("one_thread")
N, D, M, K = 3, 2, 5, 2


def leaf(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    return leaf(N, D), leaf(M, D, seed=1), leaf(M, seed=2)


def check_both(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    """First derivatives entry by entry, second ones along random directions: a whole Hessian takes seconds."""
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs, fast_mode=True)


def some_codes(ragged: bool) -> SparseCodes:
    x, W, b = leaves()
    if ragged:
        return ops.encode_above(x, W, b, 0.4, N * M)[0].detach()
    return ops.encode_topk(x, W, b, K).detach()


# -- finite differences: the formulas, in float64 ---------------------------------------------------------------------

ENCODERS: dict[str, Callable[..., Tensor]] = {
    "topk": lambda x, W, b: ops.encode_topk(x, W, b, K).acts,
    "topk-all": lambda x, W, b: ops.encode_topk(x, W, b, M).acts,
    "topk-rows": lambda x, W, b: ops.encode_topk(x, W, b, K, rows=torch.tensor([0, 2, 3, -1], dtype=torch.int32)).acts,
    "topk-shard": lambda x, W, b: ops.encode_topk(x, W, b, K, index_offset=50).acts,
    "above": lambda x, W, b: ops.encode_above(x, W, b, 0.4, N * M)[0].acts,
    "above-negative": lambda x, W, b: ops.encode_above(x, W, b, -1.0, N * M)[0].acts,
    "batch": lambda x, W, b: ops.encode_batch_topk(x, W, b, K).acts,
}


@pytest.mark.parametrize("name", ENCODERS)
def test_gradcheck_of_encoders(name: str) -> None:
    check_both(ENCODERS[name], leaves())


def test_gradcheck_of_a_gated_encoder() -> None:
    scale = torch.linspace(0.5, 2, M, dtype=torch.float64).requires_grad_()

    def gated(x: Tensor, W: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return ops.encode_topk(x, W, b, K, scale=scale).acts

    check_both(gated, (*leaves(), scale))


@pytest.mark.parametrize("ragged", [False, True])
def test_gradcheck_of_decode_dot_and_outer(ragged: bool) -> None:
    codes, (x, W, _) = some_codes(ragged), leaves()
    # A finite difference would fill an empty slot, so it perturbs the occupied slots only.
    slots = codes.occupied()
    acts = codes.acts[slots].requires_grad_()

    def filled(acts: Tensor) -> SparseCodes:
        return replace(codes, acts=torch.zeros_like(codes.acts).masked_scatter(slots, acts))

    for function, inputs in (
        (lambda a, W: ops.decode(filled(a), W), (acts, W)),
        (lambda a, x: ops.active_outer(filled(a), x), (acts, x)),
        (lambda a, x: ops.active_outer(filled(a), x, by_latent=ops.by_latent(codes)), (acts, x)),
        (lambda x, W: ops.active_dot(x, codes, W), (x, W)),
    ):
        check_both(function, inputs)


# -- against autograd through the dense mathematics, on every backend -------------------------------------------------


def dense_loss(x: Tensor, W: Tensor, b: Tensor, W_dec: Tensor, weight: Tensor, keep: Tensor, sign: bool) -> Tensor:
    """A whole SAE on a given choice of active latents, dense and in float64."""
    pre = reference.pre_acts(x, W, b)
    A = torch.where(keep, pre if sign else torch.relu(pre), 0)
    return (reference.decode(A, W_dec) * weight).sum() + 0.5 * A.square().sum()


@pytest.mark.parametrize("kind", ["topk", "above", "batch"])
@pytest.mark.parametrize("name", ["random", "odd", "hot-latent", "all-negative", "repeated-tokens", "strided"])
@pytest.mark.parametrize("backend", truth.BACKENDS)
def test_gradients_are_those_of_the_dense_sae(backend: str, name: str, kind: str) -> None:
    case = BY_NAME[name]
    x, W, b = (t.detach().requires_grad_() for t in case.inputs(torch.float32))
    g = torch.Generator().manual_seed(1)
    W_dec = torch.randn(case.M, case.D, generator=g).requires_grad_()
    weight = torch.randn(case.N, case.D, generator=g)
    if kind == "topk":
        codes = ops.encode_topk(x, W, b, case.K, backend=backend)
    elif kind == "above":
        codes, _ = ops.encode_above(x, W, b, 1.0 if name != "all-negative" else -99.0, case.N * case.M, backend=backend)
    else:
        codes = ops.encode_batch_topk(x, W, b, case.K, backend=backend)
    loss = (ops.decode(codes, W_dec, backend=backend) * weight).sum() + 0.5 * codes.acts.square().sum()
    loss.backward()

    keep = codes.detach().to_dense() != 0
    wide = [t.detach().double().requires_grad_() for t in (x, W, b, W_dec)]
    dense_loss(*wide, weight.double(), keep, sign=kind == "above").backward()
    for what, got, expected in zip(("x", "W", "b", "W_dec"), (x, W, b, W_dec), wide, strict=True):
        assert got.grad is not None
        assert expected.grad is not None
        scale = max(float(expected.grad.abs().max()), 1e-30)
        torch.testing.assert_close(
            got.grad.double() / scale, expected.grad / scale, rtol=1e-4, atol=1e-6, msg=f"gradient of {what}"
        )


@pytest.mark.parametrize("backend", truth.BACKENDS)
def test_empty_slots_give_and_receive_no_gradient(backend: str) -> None:
    acts = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
    codes = SparseCodes(acts, torch.tensor([[1, 3, 3]], dtype=torch.int32), 4)
    W = torch.ones(4, 5, requires_grad=True)
    ops.decode(codes, W, backend=backend).sum().backward()
    assert acts.grad is not None
    assert acts.grad.tolist() == [[5.0, 0.0, 0.0]]
    assert W.grad is not None
    assert W.grad.sum(1).tolist() == [0.0, 10.0, 0.0, 0.0]


@pytest.mark.parametrize("backend", truth.BACKENDS)
def test_each_gradient_can_be_requested_alone(backend: str) -> None:
    case = BY_NAME["strided"]
    x, W, b = case.inputs(torch.float32)
    for wanted in (x, W, b):
        wanted.requires_grad_()
        codes = ops.encode_topk(x, W, b, case.K, backend=backend)
        assert torch.autograd.grad(codes.acts.sum(), [wanted])[0].shape == wanted.shape
        wanted.requires_grad_(False)


@pytest.mark.parametrize("backend", truth.BACKENDS)
def test_bf16_gradients(backend: str) -> None:
    case = BY_NAME["odd" if backend in truth.GPU else "random"]
    x, W, b = (t.requires_grad_() for t in case.inputs(torch.bfloat16))
    codes = ops.encode_topk(x, W, b, case.K, backend=backend)
    ops.decode(codes, W, backend=backend).square().sum().backward()
    wide = [t.detach().double().requires_grad_() for t in (x, W, b)]
    keep = codes.detach().to_dense() != 0
    A = torch.where(keep, torch.relu(reference.pre_acts(*wide)), 0)
    reference.decode(A, wide[1]).square().sum().backward()
    for got, expected in zip((x, W, b), wide, strict=True):
        assert got.grad is not None
        assert got.grad.dtype == torch.bfloat16
        assert expected.grad is not None
        assert float((got.grad.double() - expected.grad).norm() / expected.grad.norm()) < 2e-2


def test_the_indices_carry_no_gradient() -> None:
    codes = ops.encode_topk(*leaves(), K)
    assert codes.acts.requires_grad
    assert not codes.indices.requires_grad
    above, overflow = ops.encode_above(*leaves(), 0.4, N * M)
    assert above.offsets is not None
    assert not above.offsets.requires_grad
    assert not overflow.requires_grad
