"""FusedTrainStep of the whole family against autograd through the module, torch.optim, projection, renormalization."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsae
from fastsae.model.resample import resample_
from fastsae.runs.schedules import AnnealK, Schedule, inverse_sqrt_lr
from fastsae.training.step import FusedTrainStep, PlainTrainStep
from tests.dense_sae import moments_of
from tests.family_case import RULES, SHAPED, D, M, N, family_sae, tokens
from tests.truth import BACKENDS

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: list[dict[str, Any]] = [
    {"aux_k": 3},
    {"tied": True, "skip": True, "ghost": "residual"},
    {"skip": True, "decoder_norm": "unit", "loss": "fvu", "normalize": "layer_norm", "ghost": "pull"},
    {"layers": 2, "decoder_norm": "unit", "normalize": "constant", "aux_k": 2},
    {"tied": True, "decoder_norm": "unit", "pre_bias": False},
    {"loss": "fvu", "ghost": "residual"},
    {"d_out": 9, "pre_bias": False, "skip": True, "loss": "fvu"},
]


def behind(recon: Tensor) -> Tensor:
    """A loss downstream of the reconstruction."""
    return 0.01 * recon.sin().square().sum()


def assert_equal_training(sae: fastsae.SparseAutoencoder, step: FusedTrainStep, *, steps: int = 2) -> None:
    """Takes steps with `step` on sae and as many with autograd and Adam on a copy, and compares losses, metrics, the
    gradient of x and the parameters.

    Adam's first steps are nearly lr·sign(g): where g is pure rounding noise the sign is arbitrary, so eps is large.
    """
    plain = copy.deepcopy(sae)
    adam = torch.optim.Adam(plain.parameters(), lr=float(step.lr), eps=1e-4)
    for i in range(steps):
        x = tokens(seed=i).requires_grad_()
        copied = x.detach().clone().requires_grad_()
        target = tokens(seed=i + 50, width=sae.d_out) if sae.d_out != sae.d_in else None
        out = plain(x, target)
        (out.loss + behind(out.recon)).backward()
        metrics = step(copied, target, outer=behind)
        torch.testing.assert_close(metrics["loss"], (out.loss + behind(out.recon)).detach(), rtol=1e-11, atol=1e-12)
        for name, value in out.losses.items():
            torch.testing.assert_close(metrics[name], value.detach(), rtol=1e-11, atol=1e-12)
        assert float(metrics["l0"]) == float(out.codes.l0.double().mean())
        torch.testing.assert_close(copied.grad, x.grad, rtol=1e-9, atol=1e-11)
        plain.project_gradients_()
        adam.step()
        adam.zero_grad()
        plain.normalize_decoder_()
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(
                sae.state_dict()[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: n + m
            )
        assert torch.equal(sae.fired, plain.fired)


# Every rule with every setting. Beside cpu, the reference has two settings of each rule; the others are long.
EVERY = [
    pytest.param(
        *(name, settings, backend),
        id=f"{name}-{settings}-{backend}",
        marks=[pytest.mark.long] if "cpu" in BACKENDS and backend == "reference" and (i - j) % 7 not in (0, 3) else [],
    )
    for i, name in enumerate(RULES)
    for j, settings in enumerate(SETTINGS)
    for backend in ("cpu", "reference")
    if backend in BACKENDS
]


@pytest.mark.parametrize(("name", "settings", "backend"), EVERY)
def test_a_fused_step_is_autograd_and_adam(name: str, settings: dict, backend: str) -> None:
    sae = family_sae(RULES[name], **settings)
    assert_equal_training(sae, FusedTrainStep(sae, lr=1e-2, eps=1e-4, backend=None if backend == "cpu" else backend))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", SHAPED)
def test_a_dense_fused_step_is_autograd_and_adam(name: str, settings: dict, monkeypatch) -> None:
    monkeypatch.setattr("fastsae.model.dense.PIECE", 10 * M)  # pieces of ten tokens; the last one has seven
    sae = family_sae(RULES[name], **settings)
    assert_equal_training(sae, FusedTrainStep(sae, lr=1e-2, eps=1e-4, dense_above=0.0))


@pytest.mark.long
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("cuda", "triton")])
@pytest.mark.parametrize("name", ["batch_topk", "relu", "jumprelu", "gated", "matryoshka"])
def test_gpu_backends_train_the_family(name: str, backend: str) -> None:
    """In float32 rounding may change which latents are active, so losses and parameters are only near the reference."""
    ours, truth = (family_sae(RULES[name], dtype=torch.float32, aux_k=2) for _ in range(2))
    ours.backend, truth.backend = backend, "reference"
    steps = [FusedTrainStep(sae, lr=1e-3, eps=1e-3, backend=sae.backend) for sae in (ours, truth)]
    x = tokens().float()
    for _ in range(2):
        mine, theirs = (step(x) for step in steps)
        torch.testing.assert_close(mine["loss"], theirs["loss"], rtol=1e-4, atol=1e-5)
    for key, value in truth.named_parameters():
        torch.testing.assert_close(ours.get_parameter(key), value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPED)
def test_narrow_weights_train_and_rule_parameters_stay_float32(name: str, dtype: torch.dtype) -> None:
    sae = family_sae(RULES[name], dtype=dtype)
    step = FusedTrainStep(sae, lr=1e-2)
    first = float(step(tokens().to(dtype))["loss"])
    for _ in range(10):
        metrics = step(tokens().to(dtype))
    assert float(metrics["loss"]) < first
    assert all(p.dtype == torch.float32 for p in sae.rule_parameters.values())


# -- the dense path and back ------------------------------------------------------------------------------------------


def test_the_dense_path_serves_dense_codes_and_switching_leaves_no_jump(monkeypatch) -> None:
    """An L1 run whose density falls from one half gives the same curve whichever path each step takes."""
    ways: list[str] = []
    for name in ("_densely", "_activated"):
        real = getattr(fastsae.SparseAutoencoder, name)
        monkeypatch.setattr(
            fastsae.SparseAutoencoder, name, lambda *a, real=real, name=name: ways.append(name) or real(*a)
        )
    curves, densities = [], []
    for dense_above in (0.0, 0.2, 1.0):
        ways.clear()
        sae = family_sae(fastsae.ReLU(4.0), dead=False, dtype=torch.float64)
        step = FusedTrainStep(sae, lr=2e-2, dense_above=dense_above)
        metrics = [step(tokens(seed=i % 4)) for i in range(60)]
        curves.append(torch.stack([m["loss"] for m in metrics]))
        densities = [float(m["l0"]) / M for m in metrics]
        if dense_above == 0.2:
            mixed = list(ways)
        else:
            assert set(ways) == {"_densely" if dense_above == 0.0 else "_activated"}
    assert densities[0] > 0.4
    assert densities[-1] < 0.2
    assert mixed[0] == "_densely"
    assert mixed[-1] == "_activated"
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-8, atol=0)
    torch.testing.assert_close(curves[2], curves[0], rtol=1e-8, atol=0)


def test_a_code_that_outgrows_its_capacity_takes_the_dense_path_in_the_same_step() -> None:
    sae = family_sae(fastsae.ReLU(0.1), dead=False)
    with torch.no_grad():
        sae.b_enc.fill_(-3.0)
    step = FusedTrainStep(sae, lr=0.0, dense_above=0.3)
    assert float(step(tokens())["l0"]) < 0.1 * M
    with torch.no_grad():
        sae.b_enc.fill_(0.0)
    assert float(step(tokens())["loss"]) == pytest.approx(float(sae(tokens()).loss.detach()), rel=1e-11)
    assert float(step(tokens())["l0"]) > 0.3 * M


# -- optimizers, clipping, schedules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["topk", "jumprelu", "gated"])
def test_adamw_and_clipping_are_torchs(name: str) -> None:
    ours = family_sae(RULES[name], decoder_norm="unit", skip=True)
    plain = copy.deepcopy(ours)
    options: dict[str, Any] = {"lr": 1e-2, "eps": 1e-4, "optimizer": "adamw", "weight_decay": 0.1, "clip_norm": 0.05}
    steps = (FusedTrainStep(ours, **options), PlainTrainStep(plain, **options))
    for i in range(4):
        mine, theirs = (step(tokens(seed=i)) for step in steps)
        torch.testing.assert_close(mine["loss"], theirs["loss"], rtol=1e-10, atol=0)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("optimizer", ["lion", "signsgd"])
def test_sign_optimizers_reach_every_parameter(optimizer: str) -> None:
    sae = family_sae(RULES["jumprelu"], skip=True, dead=False)
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    FusedTrainStep(sae, lr=1e-3, optimizer=optimizer)(tokens())
    for name, p in sae.named_parameters():
        moved = (p.detach() - before[name]).abs()
        assert float(moved.max()) == pytest.approx(1e-3, rel=1e-6), name


@pytest.mark.long
def test_eight_bit_moments_follow_the_curve_and_come_back() -> None:
    curves = {}
    for moments in ("fp32", "8bit"):
        sae = fastsae.SparseAutoencoder(32, 128, fastsae.BatchTopK(4), dtype=torch.float32, seed=0)
        step = FusedTrainStep(sae, lr=2e-3, moments=moments)
        rows = tokens(4096, 3, 8).float() @ tokens(8, 4, 32).float()
        losses = [float(step(rows[i * 64 % 4096 :][:64])["fvu"]) for i in range(256)]
        curves[moments] = sum(losses[-64:]) / 64
    assert curves["8bit"] == pytest.approx(curves["fp32"], rel=0.02)
    state = copy.deepcopy(step.state_dict())
    assert state["optimizer"]["state"]["W_enc"]["exp_avg"].dtype == torch.float8_e4m3fn
    again = FusedTrainStep(copy.deepcopy(sae), lr=2e-3, moments="8bit")
    again.load_state_dict(state)
    for _ in range(3):
        step(rows[:64])
        again(rows[:64])
    for key, value in sae.state_dict().items():
        assert torch.equal(value, again.sae.state_dict()[key]), key


def test_schedules_of_penalty_and_k() -> None:
    for make in (FusedTrainStep, PlainTrainStep):
        sae = family_sae(fastsae.ReLU(0.5), dead=False)
        step = make(sae, lr=0.0, penalty_schedule=Schedule(4, warmup=4))
        for scale in (0.25, 0.5, 0.75, 1.0, 1.0):
            metrics = step(tokens())
            assert float(metrics["loss"] - metrics["mse"]) == pytest.approx(0.5 * scale * float(metrics["sparsity"]))
        sae = family_sae(fastsae.TopK(2), dead=False)
        step = make(sae, lr=1e-3, k_schedule=AnnealK(10, 2, 4))
        assert [float(step(tokens())["l0"]) for _ in range(6)] == [10, 8, 6, 4, 2, 2]
        assert float(sae(tokens()).codes.l0.double().mean()) == 2
    assert inverse_sqrt_lr(2e-4, 2**16) == pytest.approx(1e-4)


# -- density and resampling -------------------------------------------------------------------------------------------


def test_density_counts_the_training_tokens() -> None:
    sae = family_sae(RULES["jumprelu"], dead=False)
    step = FusedTrainStep(sae, lr=0.0)
    step(tokens(seed=1))
    step(tokens(seed=2))
    acts = torch.cat([sae.eval().encode(tokens(seed=i)).to_dense() for i in (1, 2)])
    assert torch.equal(sae.density, (acts != 0).double().mean(0))
    sae.reset_density_()
    assert not sae.density.any()


@pytest.mark.parametrize("make", [FusedTrainStep, PlainTrainStep])
@pytest.mark.parametrize("settings", [{}, {"decoder_norm": "unit"}, {"tied": True}], ids=str)
def test_resampling_follows_the_recipe(settings: dict, make) -> None:
    sae = family_sae(RULES["jumprelu"], **settings)
    step = make(sae, lr=1e-3)
    step(tokens())
    dead = torch.zeros(M, dtype=torch.bool)
    dead[[3, 17, 30]] = True
    before = copy.deepcopy(sae.state_dict())
    rows = tokens(64, 8)
    rows[5] *= 1e4  # nearly all of the squared loss is here
    sae.tokens_since_fired.fill_(7)
    assert resample_(sae, rows.split(10), step, dead=dead) == 3
    direction = (rows - before["b_dec"])[5]
    direction = direction / direction.norm()
    cosines = sae.W_dec.detach()[dead] @ direction / sae.W_dec.detach()[dead].norm(dim=1)
    assert float(cosines.max()) == pytest.approx(1.0)
    live = before["W_dec"][~dead].norm(dim=1).mean() if sae.decoder_norm == "free" else 1.0
    torch.testing.assert_close(sae.W_dec.detach()[dead].norm(dim=1), torch.full((3,), float(live)).double())
    if sae.W_enc is not None:
        expected = 0.2 * before["W_enc"][~dead].norm(dim=1).mean()
        torch.testing.assert_close(sae.W_enc.detach()[dead].norm(dim=1), expected.expand(3))
    assert not sae.b_enc.detach()[dead].any()
    torch.testing.assert_close(sae.log_threshold.detach()[dead].exp(), torch.full((3,), 0.3).double())
    assert sae.tokens_since_fired.tolist() == torch.where(dead, 0, 7).tolist()
    for name, value in before.items():
        if value.shape[:1] == (M,):
            assert torch.equal(sae.state_dict()[name][~dead], value[~dead]) or name == "tokens_since_fired", name
    if make is FusedTrainStep:
        for name, t in moments_of(step).items():
            if t.shape[:1] == (M,):
                assert not t[dead].any(), name
                assert t[~dead].any(), name
    step(tokens())


def test_resampling_refuses_what_it_cannot_use() -> None:
    sae = family_sae(RULES["topk"])
    with pytest.raises(ValueError, match="got no rows"):
        resample_(sae, [])
    with pytest.raises(ValueError, match="none of 3 rows has a finite error above 0"):
        resample_(sae, torch.full((3, D), float("nan"), dtype=torch.float64))
    with pytest.raises(ValueError, match="resampling needs d_out == d_in"):
        resample_(family_sae(RULES["topk"], d_out=5, pre_bias=False), tokens())
    assert resample_(family_sae(RULES["topk"], dead=False), tokens()) == 0


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "message"), [
    ({"optimizer": "sgd"}, "optimizer is 'sgd', expected one of .'adam'"),
    ({"weight_decay": 0.1}, "weight_decay"),
    ({"moments": "4bit"}, "moments is '4bit', expected one of fp32, bf16, 8bit"),
    ({"moments": "8bit", "optimizer": "lion"}, "moments='8bit' needs adam or adamw, got 'lion'"),
    ({"clip_norm": 0.0}, "clip_norm is 0.0, expected a number above 0"),
    ({"clip_rows": -1.0}, "clip_rows is -1.0"),
    ({"dense_above": 2.0}, r"dense_above is 2.0, expected a share in \[0, 1\]"),
    ({"k_schedule": AnnealK(4, 2, 3)}, "JumpReLU has no k to anneal"),
])  # fmt: skip
def test_bad_settings_of_a_step_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedTrainStep(family_sae(RULES["jumprelu"]), **settings)


def test_invalid_outer_losses_are_refused() -> None:
    step = FusedTrainStep(family_sae(RULES["topk"]))
    with pytest.raises(ValueError, match=r"outer returned a tensor of shape \(37, 12\), expected one number"):
        step(tokens(), outer=lambda recon: recon)
    with pytest.raises(ValueError, match="does not depend on the reconstruction"):
        step(tokens(), outer=lambda recon: torch.ones((), requires_grad=True) * 2)
    with pytest.raises(ValueError, match=r"k = 50, expected at most d_sae = 40"):
        FusedTrainStep(family_sae(RULES["topk"]), k_schedule=AnnealK(50, 5, 10))
    assert N
