"""What may go wrong with the rules: files, casts, autocast, torch.compile, overflow, steps that fail halfway."""

from __future__ import annotations

import copy

import pytest
import torch

import fastsae
from fastsae.model.files import load, save
from fastsae.training.step import FusedTrainStep, PlainTrainStep
from tests.family_case import RULES, SHAPED, D, M, family_sae, tokens

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", RULES)
def test_a_loaded_module_trains_moves_and_counts(tmp_path, name: str) -> None:
    sae = load(save(family_sae(RULES[name], dtype=torch.float32), tmp_path / "sae"))
    x = tokens().float()
    assert torch.isfinite(sae(x).loss.detach())
    metrics = FusedTrainStep(sae.to("cpu"), lr=1e-3)(x)
    assert float(sae.density.sum()) > 0
    assert float(metrics["loss"]) > 0


@pytest.mark.parametrize("name", RULES)
def test_a_cast_module_can_be_saved_and_loaded(tmp_path, name: str) -> None:
    sae = family_sae(RULES[name], dtype=torch.float32).double()
    FusedTrainStep(sae, lr=1e-3)(tokens())
    assert all(p.dtype == torch.float64 for p in sae.parameters())
    save(sae, tmp_path / "wide")
    assert load(tmp_path / "wide").config == sae.config
    save(sae.float(), tmp_path / "back")
    again = load(tmp_path / "back")
    assert all(p.dtype == torch.float32 for p in again.parameters())


@pytest.mark.long
@pytest.mark.parametrize("name", SHAPED)
def test_a_compiled_threshold_rule_drops_nothing(name: str) -> None:
    """More latents fire than the initial capacity holds."""
    sae = fastsae.SparseAutoencoder(D, 1024, RULES[name], seed=0)
    x = tokens(8).float()
    expected = sae(x)
    assert float(expected.codes.l0.double().mean()) > 256
    got = torch.compile(sae, backend="aot_eager")(x)
    torch.testing.assert_close(got.loss, expected.loss)
    assert int(got.codes.nnz) == int(expected.codes.nnz)


def test_a_compiled_batch_topk_selects_as_it_should_before_any_training() -> None:
    sae = family_sae(RULES["batch_topk"], dtype=torch.float32).eval()
    codes = torch.compile(sae, backend="aot_eager")(tokens().float()).codes
    assert float(codes.l0.double().mean()) == 5


@pytest.mark.parametrize("name", RULES)
def test_nan_is_refused_before_anything_changes(name: str) -> None:
    sae = family_sae(RULES[name], ghost="residual")
    before = copy.deepcopy(sae.state_dict())
    step = FusedTrainStep(sae, check=True, penalty_schedule=fastsae.Schedule(9, warmup=9))
    x = tokens()
    x[3, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        step(x)
    for key, value in sae.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert float(sae.penalty_scale) == 1


@pytest.mark.parametrize("name", ["topk", "jumprelu", "gated"])
@pytest.mark.parametrize("dense_above", [0.0, 1.0])
def test_a_step_that_fails_leaves_module_and_counters(name: str, dense_above: float, monkeypatch) -> None:
    sae = family_sae(RULES[name], aux_k=3)
    step = FusedTrainStep(sae, dense_above=dense_above, penalty_schedule=fastsae.Schedule(9, warmup=9))
    step(tokens())
    before = copy.deepcopy({**sae.state_dict(), "fired": sae.fired, "over": sae.fired_over})

    def fail(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr("fastsae.ops.update_latents_", fail)
    x = tokens(seed=1).requires_grad_()
    with pytest.raises(MemoryError):
        step(x)
    assert x.grad is None
    with pytest.raises(ValueError, match="outer returned"):
        step(tokens(seed=1), outer=lambda recon: recon)
    for key, value in {**sae.state_dict(), "fired": sae.fired, "over": sae.fired_over}.items():
        assert torch.equal(value, before[key]), key
    assert float(sae.penalty_scale) == 1
    assert int(step.count) == 1


@pytest.mark.parametrize("fused", [True, False])
def test_ghosts_of_large_inputs_do_not_overflow(fused: bool) -> None:
    sae = family_sae(RULES["topk"], dtype=torch.float32, ghost="residual")
    step = (FusedTrainStep if fused else PlainTrainStep)(sae, lr=1e-3)
    step(1e3 * tokens().float())
    assert all(torch.isfinite(p).all() for p in sae.parameters())


@pytest.mark.parametrize("dense_above", [0.0, 1.0])
@pytest.mark.parametrize("name", ["relu", "jumprelu", "gated", "topk"])
def test_autocast_changes_no_bit_of_a_fused_step(name: str, dense_above: float) -> None:
    ours, theirs = (family_sae(RULES[name], dtype=torch.float32, skip=True) for _ in range(2))
    FusedTrainStep(ours, dense_above=dense_above)(tokens().float())
    with torch.autocast("cpu", torch.bfloat16):
        FusedTrainStep(theirs, dense_above=dense_above)(tokens().float())
    for key, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key]), key


def test_a_wide_band_does_not_encode_twice(monkeypatch) -> None:
    """Many latents clear the lower end of the band and few are active: the first number decides the path."""
    rule = fastsae.JumpReLU(0.1, threshold=1.5, bandwidth=2.5)
    step = FusedTrainStep(family_sae(rule, dead=False), dense_above=0.3)
    calls = []
    real = fastsae.ops.encode_above
    monkeypatch.setattr("fastsae.ops.encode_above", lambda *a, **k: calls.append(1) or real(*a, **k))
    for i in range(3):
        assert float(step(tokens(seed=i))["l0"]) < 0.3 * M
    assert not calls


@pytest.mark.parametrize("name", ["jumprelu", "gated", "topk", "relu"])
def test_both_steps_report_the_same_and_train_whatever_the_mode(name: str) -> None:
    ours, theirs = (family_sae(RULES[name], skip=True).eval() for _ in range(2))
    metrics = [make(sae, lr=1e-3)(tokens()) for make, sae in ((FusedTrainStep, ours), (PlainTrainStep, theirs))]
    assert metrics[0].keys() - {"redone"} == metrics[1].keys() - {"redone"}
    for key in metrics[1].keys() - {"redone"}:
        assert float(metrics[0][key]) == pytest.approx(float(metrics[1][key]), rel=1e-9), key
    assert not ours.training
    assert not theirs.training


def test_weight_decay_leaves_thresholds_alone() -> None:
    for make in (FusedTrainStep, PlainTrainStep):
        sae = family_sae(fastsae.JumpReLU(0.0, threshold=0.01, bandwidth=1e-9), dead=False)
        undecayed = copy.deepcopy(sae)
        before = sae.log_threshold.detach().clone()
        make(sae, lr=0.1, optimizer="adamw", weight_decay=0.5)(tokens())
        make(undecayed, lr=0.1, optimizer="adamw", weight_decay=0.0)(tokens())
        torch.testing.assert_close(sae.log_threshold.detach(), before)
        assert not torch.allclose(sae.W_dec.detach(), undecayed.W_dec.detach())


def test_what_does_not_fit_is_refused() -> None:
    step = FusedTrainStep(family_sae(RULES["topk"]))
    state = copy.deepcopy(step.state_dict())
    state["optimizer"]["param_groups"][0]["betas"] = [0.9]
    with pytest.raises(ValueError, match="betas"):
        step.load_state_dict(state)
    assert int(step.count) == 0
    with pytest.raises(ValueError, match=r"clip_norm is -1.0, expected a number above 0"):
        PlainTrainStep(family_sae(RULES["topk"]), lr=1e-3, clip_norm=-1.0)
