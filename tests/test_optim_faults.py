"""What an optimizer of fastsae.optim refuses, and which faults it survives."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastsae
from fastsae.ops.ledger import LedgerGradient
from tests.family_case import RULES, SHAPED, family_sae, tokens

pytestmark = pytest.mark.usefixtures("one_thread")


def adam(sae: Any, **settings: Any) -> fastsae.optim.Adam:
    return fastsae.optim.Adam(sae, lr=1e-2, eps=1e-4, **settings)


def torch_adam(sae: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(sae.parameters(), lr=1e-2, eps=1e-4)


# -- a step never destroys a run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("rule", RULES)
def test_a_gradient_that_is_not_finite_changes_nothing(rule: str, moments: str) -> None:
    sae = family_sae(RULES[rule], dtype=torch.float32, aux_k=3, skip=True)
    optimizer = fastsae.optim.Adam(sae, lr=1e-2, moments=moments)
    sae(tokens().float()).loss.backward()
    optimizer.step()
    before = copy.deepcopy((sae.state_dict(), optimizer.state_dict(), sae.fired_over))
    for number, bad in enumerate((torch.nan, torch.inf, 1e38, 1e20), 1):
        x = tokens(seed=1).float()
        x[3, 2] = bad
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(2):
                sae(x).loss.backward()
                optimizer.step()
        assert int(optimizer.skipped) == 2 * number, bad
        said = [str(w.message)[:28] for w in seen if "not finite" in str(w.message)]
        assert said == (["a gradient, the loss or the "] if number == 1 else []), "it should be said once"
        for name, value in sae.state_dict().items():
            assert torch.equal(value, before[0][name]), (name, bad)
        for group, state in optimizer.state_dict()["state"].items():
            for key, t in state.items():
                same = t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t
                old = before[1]["state"][group][key]
                assert torch.equal(same, old.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else old), (key, bad)
    assert int(sae.fired_over) == int(before[2])
    sae(tokens().float()).loss.backward()
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in sae.parameters())


@pytest.mark.parametrize("rule", [*SHAPED, "topk"])
def test_a_bad_batch_changes_nothing_in_a_fused_step_dense_or_sparse(rule: str) -> None:
    for dense_above in (0.0, 1.0):
        sae = family_sae(RULES[rule], dtype=torch.float32)
        step = fastsae.FusedTrainStep(sae, dense_above=dense_above)
        step(tokens().float())
        before = copy.deepcopy(sae.state_dict())
        x = tokens(seed=1).float()
        x[0] = torch.nan
        with pytest.warns(RuntimeWarning, match="this step changed nothing"):
            metrics = step(x)
        assert int(metrics["skipped"]) == 1
        assert int(step.count) == 1
        for name, value in sae.state_dict().items():
            assert torch.equal(value, before[name]), name


def test_large_gradients_that_are_finite_are_stepped() -> None:
    sae = family_sae(RULES["topk"], dtype=torch.float32)
    optimizer = adam(sae)
    before = sae.W_dec.detach().clone()
    (sae(1e5 * tokens().float()).loss * 1e6).backward()
    optimizer.step()
    assert int(optimizer.skipped) == 0
    assert not torch.equal(sae.W_dec, before)


# -- misuse -----------------------------------------------------------------------------------------------------------


def test_a_torch_optimizer_beside_it_is_refused_before_it_writes() -> None:
    sae = family_sae(RULES["topk"])
    mine = adam(sae)
    for other in (
        torch.optim.SGD(sae.parameters(), lr=0.1),
        torch_adam(sae),
        torch.optim.AdamW(sae.parameters(), fused=True),
    ):
        before = {name: p.detach().clone() for name, p in sae.named_parameters()}
        sae(tokens()).loss.backward()
        with pytest.raises(RuntimeError, match=r"is kept as terms for an optimizer of fastsae\.optim"):
            other.step()
        for name, value in sae.named_parameters():
            assert torch.equal(value, before[name]), name
        mine.zero_grad()


def test_the_newest_of_two_optimizers_owns_the_parameters() -> None:
    sae = family_sae(RULES["topk"])
    old, new = adam(sae), adam(sae)
    sae(tokens()).loss.backward()
    with pytest.raises(RuntimeError, match=r"another optimizer of fastsae\.optim was made"):
        old.step()
    new.step()
    del new
    gc.collect()
    sae(tokens()).loss.backward()
    assert not isinstance(sae.W_dec.grad, LedgerGradient), "the parameters still belong to an optimizer"


def test_a_copied_module_has_no_optimizer_and_an_optimizer_cannot_be_copied() -> None:
    sae = family_sae(RULES["topk"])
    optimizer = adam(sae)
    twin = copy.deepcopy(sae)
    twin(tokens()).loss.backward()
    assert not isinstance(twin.W_dec.grad, LedgerGradient)
    with pytest.raises(TypeError, match="cannot be copied or pickled; save its state_dict"):
        copy.deepcopy(optimizer)


def test_a_step_refuses_a_module_changed_after_construction() -> None:
    def changed(change: Callable[[fastsae.SparseAutoencoder], Any]) -> fastsae.optim.Adam:
        sae = family_sae(RULES["topk"], dtype=torch.float32)
        optimizer = adam(sae)
        change(sae)
        sae(tokens().float()).loss.backward()
        return optimizer

    cases: dict[str, Callable[[fastsae.SparseAutoencoder], Any]] = {
        "make a new optimizer after moving or casting": lambda sae: sae.double(),
        "W_enc of the module was replaced": lambda sae: setattr(sae, "W_enc", nn.Parameter(sae.W_enc.detach().clone())),
        "b_dec no longer requires a gradient": lambda sae: sae.b_dec.requires_grad_(False),
    }
    for message, change in cases.items():
        with pytest.raises(RuntimeError, match=message):
            changed(change).step()


def test_weights_written_between_backward_and_step_are_refused() -> None:
    sae = family_sae(RULES["topk"])
    optimizer = adam(sae)
    sae(tokens()).loss.backward()
    with torch.no_grad():
        sae.W_dec.mul_(2)
    before = copy.deepcopy(sae.state_dict())
    with pytest.raises(RuntimeError, match="was written between backward"):
        optimizer.step()
    for name, value in sae.state_dict().items():
        assert torch.equal(value, before[name]), name
    optimizer.zero_grad()
    sae(tokens()).loss.backward()
    optimizer.step()
    assert not torch.equal(sae.W_dec, before["W_dec"])


def test_gradients_of_one_sae_are_changed_together_or_refused() -> None:
    sae = family_sae(RULES["topk"])
    optimizer = adam(sae)
    sae(tokens()).loss.backward()
    sae.W_dec.grad = None
    with pytest.raises(RuntimeError, match="gradients of W_dec were replaced or dropped"):
        optimizer.step()
    optimizer.zero_grad()
    sae(tokens()).loss.backward()
    sae.W_dec.grad.mul_(2)
    with pytest.raises(RuntimeError, match="scale or clip all of its parameters together"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="kept as terms"):
        sae.W_dec.grad.exp()
    assert "LedgerGradient(W_dec" in repr(sae.W_dec.grad)


def test_settings_that_do_not_fit_are_refused() -> None:
    sae = family_sae(RULES["topk"])
    for message, make in {
        "moments is '4bit'": lambda: adam(sae, moments="4bit"),
        "moments='8bit' needs adam or adamw": lambda: fastsae.optim.Lion(sae, moments="8bit"),
        "clip_norm is 0": lambda: adam(sae, clip_norm=0),
        "lr is -1": lambda: fastsae.optim.Adam(sae, lr=-1),
        "lr is nan": lambda: fastsae.optim.Adam(sae, lr=float("nan")),
        "optimizer 'adam' has none": lambda: adam(sae, weight_decay=0.1),
        "do not require a gradient": lambda: adam(sae.requires_grad_(False)),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="pass the module itself, not its parameters"):
        fastsae.optim.Adam(sae.parameters())


def test_several_processes_are_refused_unless_independent(monkeypatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    sae = family_sae(RULES["topk"])
    with pytest.raises(RuntimeError, match="this is one of 2 processes"):
        fastsae.FusedTrainStep(sae)(tokens())
    before = sae.W_dec.detach().clone()
    refused = adam(sae)
    sae(tokens()).loss.backward()
    with pytest.raises(RuntimeError, match="this is one of 2 processes"):
        refused.step()
    assert torch.equal(sae.W_dec, before)
    sae.zero_grad()
    optimizer = adam(sae, independent=True)
    sae(tokens()).loss.backward()
    optimizer.step()
    assert not torch.equal(sae.W_dec, before)
