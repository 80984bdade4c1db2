"""The dense mathematics: examples worked by hand, torch's autograd, and torch.optim.Adam."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from fastsae import reference
from fastsae.model.rules import TopK
from fastsae.reference import Moments, Optimizer, Params

pytestmark = pytest.mark.usefixtures("one_thread")
NAN = float("nan")


def tensor(*rows) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def zeros_like(params: Params) -> Moments:
    """Adam's moments at the start."""
    return {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in params.items()}


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_pre_acts_by_hand() -> None:
    x, W, b = tensor([1, 2]), tensor([3, 4], [-1, 0], [0, 1]), torch.tensor([1.0, 1, -5]).double()
    assert reference.pre_acts(x, W, b).tolist() == [[12, 0, -3]]
    assert reference.pre_acts(x, W, b, torch.tensor([0.5, 2, -1]).double()).tolist() == [[6, 0, 3]]


def test_top_k_prefers_nan_then_the_larger_then_the_lower_index() -> None:
    values, indices = reference.top_k(tensor([1, 3, NAN, 3, 2, 3]), 4)
    assert indices.tolist() == [[2, 1, 3, 5]]
    assert values[0, 1:].tolist() == [3, 3, 3]


def test_keep_top_k_by_hand() -> None:
    pre = tensor([5, -1, 2, 2, 2], [-3, -2, -1, -4, -5], [1, 0, 0, 0, 7])
    assert reference.keep_top_k(pre, 3).tolist() == [[5, 0, 2, 2, 0], [0] * 5, [1, 0, 0, 0, 7]]


def test_batch_top_k_by_hand() -> None:
    """K = 2 on average over the batch: the first token may have three. Ties go to the lower token, then latent."""
    pre = tensor([9, 8, 4, -1], [4, 1, -2, 4])
    assert reference.batch_top_k(pre, 2).tolist() == [[9, 8, 4, 0], [4, 0, 0, 0]]


def test_above_is_strict_and_takes_nan() -> None:
    pre = tensor([1, 2, NAN], [-1, 3, 0])
    assert reference.is_above(pre, torch.tensor(1.0)).tolist() == [[False, True, True], [False, True, False]]
    assert reference.is_above(pre, tensor(0, 2, -1)).tolist() == [[True, False, True], [False, True, True]]
    assert reference.is_above(pre, tensor([0], [-2])).tolist() == [[True, True, True], [True, True, True]]


def test_gradients_by_hand() -> None:
    """One token, one active latent: every gradient is a product of two numbers."""
    params = {"W_enc": tensor([1, 0], [0, 1]), "W_dec": tensor([3, 4], [1, 1]), "b_enc": tensor(0, 0)}
    params["b_dec"] = tensor(0, 0)
    term = reference.Term(A=tensor([2, 0]), x=tensor([5, 6]), grad=tensor([1, -2]))
    grads = reference.gradients(params, [term], pre_bias=True)
    assert grads["W_dec"].tolist() == [[2, -4], [0, 0]]
    assert grads["W_enc"].tolist() == [[-25, -30], [0, 0]]  # dA = 1·3 - 2·4 = -5
    assert grads["b_enc"].tolist() == [-5, 0]
    assert grads["b_dec"].tolist() == [1 + 5, -2]  # the output's share, less db_enc · W_enc
    without = reference.gradients(params, [term], pre_bias=False)
    assert without["b_dec"].tolist() == [1, -2]
    assert reference.squared_norms(grads).tolist() == [1525, 20, 25, 40]
    del params["W_enc"]
    tied = reference.gradients(params, [term], pre_bias=False)
    assert tied["W_dec"].tolist() == [[-23, -34], [0, 0]]
    assert reference.squared_norms(tied).tolist() == [0, 23**2 + 34**2, 25, 5]


def test_project_and_normalize_by_hand() -> None:
    W = tensor([3, 4], [0, 0])
    assert reference.normalize(W).tolist() == [[0.6, 0.8], [0, 0]]
    projected = reference.project(tensor([5, 10], [1, 2]), W)
    torch.testing.assert_close(projected, tensor([5 - 3 * 55 / 25, 10 - 4 * 55 / 25], [1, 2]))
    torch.testing.assert_close((projected * W).sum(-1), tensor(0, 0))


def test_adam_by_hand() -> None:
    """The first step moves every weight by lr against its gradient's sign."""
    lr, one = torch.tensor(0.1, dtype=torch.float64), torch.tensor(1)
    p, m, v = reference.adam(tensor(1, 1), tensor(4, -9), tensor(0, 0), tensor(0, 0), lr, one, (0.9, 0.99), 0.0)
    torch.testing.assert_close(p, tensor(0.9, 1.1))
    torch.testing.assert_close(m, tensor(0.4, -0.9))
    torch.testing.assert_close(v, tensor(0.16, 0.81))


def test_a_whole_step_by_hand() -> None:
    """D = M = 2, K = 1: x = (3, 1) activates latent 0 with 3; recon (3, 0); the error is (0, -1).

    L = 1, dL/d recon = (0, -2). dA = ⟨(0, -2), (1, 0)⟩ = 0, so the encoder stays. dW_dec[0] = 3·(0, -2) is already
    orthogonal to the row; Adam's first step moves the row by lr to (1, 0.1), which is normalized. b_dec moves by lr.
    """
    eye = torch.eye(2, dtype=torch.float64)
    params = {"W_enc": eye, "W_dec": eye, "b_enc": tensor(0, 0), "b_dec": tensor(0, 0)}
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    loss = reference.forward(leaves, tensor([3, 1]), TopK(1)).losses["loss"]
    grads = dict(zip(params, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    shaped = reference.shape_gradients(params, grads, unit_norm=True)
    moments, lr = zeros_like(params), torch.tensor(0.1, dtype=torch.float64)
    adam = Optimizer("adam", (0.9, 0.999), 1e-300)
    new, _ = reference.update(params, shaped, moments, lr, torch.tensor(1), adam, unit_norm=True)
    assert float(loss.detach()) == 1.0
    assert torch.equal(new["W_enc"], eye)
    assert new["b_enc"].tolist() == [0, 0]
    torch.testing.assert_close(new["W_dec"], tensor([1 / 1.01**0.5, 0.1 / 1.01**0.5], [0, 1]))
    torch.testing.assert_close(new["b_dec"], tensor(0, 0.1))


# -- against numerical differentiation and autograd -------------------------------------------------------------------

SETTINGS = [
    {},
    {"pre_bias": False},
    {"loss": "fvu"},
    {"tied": True},
    {"aux": True},
    {"tied": True, "aux": True, "loss": "fvu"},
    {"d_out": 4},
    {"unit_norm": False},
]


def over(settings: list[dict]):
    return pytest.mark.parametrize("setting", settings, ids=lambda s: "-".join(map(str, s)) or "plain")


every_setting = over(SETTINGS)


@dataclass(frozen=True)
class AuxK:
    """The auxiliary loss: the k most active of the dead latents, bool (M,), fit the residual, which is a constant."""

    dead: Tensor
    k: int
    coef: float


def make_problem(setting: dict) -> tuple[Params, Tensor, dict]:
    g = torch.Generator().manual_seed(0)
    N, D, M, K = 12, 6, 20, 3
    D_out = setting.get("d_out", D)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    params = {"W_enc": randn(M, D), "W_dec": reference.normalize(randn(M, D_out))}
    params |= {"b_enc": 0.3 * randn(M), "b_dec": randn(D_out)}
    if setting.get("tied"):
        del params["W_enc"]
    options = {
        "k": K,
        "target": randn(N, D_out) if D_out != D else None,
        "pre_bias": setting.get("pre_bias", D_out == D),
        "loss": setting.get("loss", "mse"),
        "aux": AuxK(torch.arange(M) % 2 == 0, k=4, coef=0.25) if setting.get("aux") else None,
    }
    return params, randn(N, D), options


def loss_of(params: Params, x: Tensor, *, k: int, target, pre_bias: bool, loss: str, aux: AuxK | None) -> Tensor:
    """The loss as a user would write it, for autograd: torch.topk, scatter, matmul."""
    target = x if target is None else target
    inputs = x - params["b_dec"] if pre_bias else x
    pre = torch.relu(inputs @ params.get("W_enc", params["W_dec"]).T + params["b_enc"])

    def sparse(values: Tensor, n: int) -> Tensor:
        top = values.topk(n, dim=-1)
        return torch.zeros_like(values).scatter(-1, top.indices, top.values)

    recon = sparse(pre, k) @ params["W_dec"] + params["b_dec"]
    unit = len(x) if loss == "mse" else (target - target.mean(0)).pow(2).sum()
    total = (recon - target).pow(2).sum() / unit
    if aux is not None:
        residual = (target - recon).detach()
        total = total + aux.coef * (sparse(pre * aux.dead, aux.k) @ params["W_dec"] - residual).pow(2).sum() / unit
    return total


def squared_error(recon: Tensor, target: Tensor, unit: Tensor | int) -> tuple[Tensor, Tensor]:
    """L = Σ(recon - target)² / unit, and dL/d recon = 2 (recon - target) / unit."""
    error = recon - target
    return error.square().sum() / unit, 2 * error / unit


def terms_of(
    params: Params, x: Tensor, *, k: int, target: Tensor | None, pre_bias: bool, loss: str, aux: AuxK | None
) -> tuple[list[reference.Term], Tensor]:
    """The terms whose closed-form gradients train the SAE, and the loss: that of `loss_of`."""
    target = x if target is None else target
    inputs = x - params["b_dec"] if pre_bias else x
    pre = reference.pre_acts(inputs, params.get("W_enc", params["W_dec"]), params["b_enc"])
    A = reference.keep_top_k(pre, k)
    recon = reference.decode(A, params["W_dec"]) + params["b_dec"]
    unit = len(x) if loss == "mse" else (target - target.mean(0)).square().sum()
    total, grad = squared_error(recon, target, unit)
    terms = [reference.Term(A, inputs, grad)]
    if aux is not None:
        A_aux = reference.keep_top_k(torch.where(aux.dead, pre, 0), aux.k)
        missed, grad_aux = squared_error(reference.decode(A_aux, params["W_dec"]), target - recon, unit)
        terms.append(reference.Term(A_aux, inputs, aux.coef * grad_aux, has_bias=False))
        total = total + aux.coef * missed
    return terms, total


class ClosedForm(torch.autograd.Function):
    """The reference's loss forward, and its closed-form gradients backward, for gradcheck."""

    @staticmethod
    def forward(ctx, x, options, names, *values):
        params = dict(zip(names, values, strict=True))
        terms, loss = terms_of(params, x, **options)
        grads = reference.gradients(params, terms, options["pre_bias"])
        ctx.save_for_backward(*grads.values())
        return loss

    @staticmethod
    def backward(ctx, grad):
        return None, None, None, *(grad * g for g in ctx.saved_tensors)


@over([setting for setting in SETTINGS if "aux" not in setting])  # finite differences move its constant residual
def test_closed_form_gradients_pass_gradcheck(setting: dict) -> None:
    params, x, options = make_problem(setting)
    values = [p.clone().requires_grad_() for p in params.values()]
    assert gradcheck(lambda *v: ClosedForm.apply(x, options, list(params), *v), values)


@every_setting
def test_closed_form_gradients_are_those_of_autograd(setting: dict) -> None:
    params, x, options = make_problem(setting)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    loss = loss_of(leaves, x, **options)
    loss.backward()
    terms, closed = terms_of(params, x, **options)
    grads = reference.gradients(params, terms, options["pre_bias"])
    torch.testing.assert_close(closed, loss.detach(), rtol=1e-12, atol=0)
    for name, leaf in leaves.items():
        torch.testing.assert_close(grads[name], leaf.grad, rtol=1e-10, atol=1e-12, msg=name)


@over([setting for setting in SETTINGS if "aux" not in setting])  # `forward` has no auxiliary loss
def test_forward_is_the_loss_as_a_user_writes_it(setting: dict) -> None:
    params, x, options = make_problem(setting)
    found = []
    for way in ("forward", "by hand"):
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        if way == "by hand":
            loss = loss_of(leaves, x, **options)
        else:
            others = {name: value for name, value in options.items() if name not in ("k", "aux")}
            loss = reference.forward(leaves, x, TopK(options["k"]), **others).losses["loss"]
        found.append([loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))])
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


@every_setting
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_train_steps_are_those_of_autograd_and_torch_adam(setting: dict, dtype: torch.dtype) -> None:
    params, x, options = make_problem(setting)
    params, x = {name: p.to(dtype) for name, p in params.items()}, x.to(dtype)
    if options["target"] is not None:
        options["target"] = options["target"].to(dtype)
    unit_norm = setting.get("unit_norm", True)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=3e-3, betas=(0.8, 0.99), eps=1e-8)
    moments, adam = zeros_like(params), Optimizer("adam", (0.8, 0.99), 1e-8)
    lr = torch.tensor(3e-3, dtype=torch.float64)
    for step in range(1, 5):
        optimizer.zero_grad()
        loss_of(leaves, x, **options).backward()
        W = leaves["W_dec"]
        with torch.no_grad():
            if unit_norm:
                W.grad -= (W.grad * W).sum(1, keepdim=True) * W / W.pow(2).sum(1, keepdim=True)
            optimizer.step()
            if unit_norm:
                W /= W.norm(dim=1, keepdim=True)
        grads = reference.gradients(params, terms_of(params, x, **options)[0], options["pre_bias"])
        shaped = reference.shape_gradients(params, grads, unit_norm)
        params, moments = reference.update(params, shaped, moments, lr, torch.tensor(step), adam, unit_norm)
    tight = dtype == torch.float64
    for name, leaf in leaves.items():
        assert params[name].dtype == dtype
        torch.testing.assert_close(
            params[name], leaf.detach(), rtol=1e-10 if tight else 1e-3, atol=1e-12 if tight else 1e-4, msg=name
        )
    if unit_norm:
        torch.testing.assert_close(params["W_dec"].norm(dim=1), torch.ones(20, dtype=dtype))


# -- stochastic rounding ----------------------------------------------------------------------------------------------


def test_rounding_keeps_what_bf16_can_hold() -> None:
    t = torch.tensor([0.0, 1.0, -2.5, float("inf"), -float("inf"), NAN, 2.0**-130, -0.0])
    rounded = reference.round_to_bf16(t, seed=7, step=torch.tensor(3), stream=1)
    assert torch.equal(rounded.float().nan_to_num(nan=9.0), t.nan_to_num(nan=9.0))
    assert rounded.dtype == torch.bfloat16


def test_rounding_goes_either_way_with_the_right_odds() -> None:
    step = torch.tensor(1)
    for sign in (1.0, -1.0):
        t = torch.full((40_000,), sign * (1 + 2**-7 * 0.25))  # a quarter of the way from 1 to the next bf16
        rounded = reference.round_to_bf16(t, seed=1, step=step, stream=0).float()
        assert set(rounded.tolist()) == {sign, sign * (1 + 2**-7)}
        share = float((rounded != sign).float().mean())
        assert abs(share - 0.25) < 0.01


def test_rounding_depends_on_seed_step_stream_and_place() -> None:
    t = torch.full((1000,), 1 + 2**-8)

    def draw(seed: int, step: int, stream: int) -> Tensor:
        return reference.round_to_bf16(t, seed, torch.tensor(step), stream)

    base = draw(1, 1, 0)
    assert torch.equal(base, draw(1, 1, 0))
    assert base.unique().numel() == 2
    for other in (draw(2, 1, 0), draw(1, 2, 0), draw(1, 1, 1), draw(-1, 1, 0)):
        assert 300 < int((base != other).sum()) < 700
