"""A step recorded once and replayed (tests/recorded.py) against steps without a graph: every rule, on fresh inputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsae
from fastsae.runs.schedules import Schedule
from fastsae.training import step as steps
from fastsae.training.step import GRAPH_WARMUP, FusedTrainStep
from tests.family_case import RULES, SHAPED, family_sae, tokens
from tests.recorded import Replayed
from tests.truth import BACKENDS

pytestmark = pytest.mark.usefixtures("one_thread")
REPLAYS = 4
OPTIMIZERS: list[dict[str, Any]] = [
    {"optimizer": "adamw", "weight_decay": 0.1, "clip_norm": 0.5},
    {"optimizer": "lion", "moments": "bf16"},
    {"optimizer": "signsgd", "clip_rows": 0.01},
    {"moments": "8bit", "seed": 3},
]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ways of a GPU, where shapes do not depend on values, and the stand-in for a graph."""
    for module in ("codes", "model.sae", "model.losses"):
        monkeypatch.setattr(f"fastsae.{module}.reads_are_free", lambda t: False)
    monkeypatch.setattr(steps, "StepGraph", Replayed)
    Replayed.captured = Replayed.replayed = 0


def steps_of(sae: fastsae.SparseAutoencoder, **settings: Any) -> tuple[FusedTrainStep, FusedTrainStep]:
    """A step with a graph, and one without of a copy."""
    if settings.get("optimizer", "adam") in ("adam", "adamw"):
        settings["eps"] = 1e-4
    settings.setdefault("dense_above", 1.0)  # so small an SAE is too dense for a sparse step
    step, plain = (FusedTrainStep(one, lr=1e-2, **settings) for one in (sae, copy.deepcopy(sae)))
    step.cuda_graph = True  # the constructor refuses it on a CPU
    return step, plain


def state_of(step: FusedTrainStep) -> dict[str, Tensor]:
    held = {**dict(step.sae.named_parameters()), **dict(step.sae.named_buffers()), "skipped": step.skipped}
    for name, p in step.sae.named_parameters():
        held |= {f"{key} of {name}": t for key, t in step.optimizer.state[p].items()}
    return held


def assert_same(got: FusedTrainStep, wanted: FusedTrainStep, exact: bool) -> None:
    theirs = state_of(wanted)
    for name, t in state_of(got).items():
        if exact or not t.is_floating_point():
            bits, wanted_bits = (one.detach().reshape(-1).view(torch.uint8) for one in (t, theirs[name]))
            assert torch.equal(bits, wanted_bits), name
        else:
            torch.testing.assert_close(t, theirs[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def compare(sae: fastsae.SparseAutoencoder, exact: bool = True, **settings: Any) -> None:
    """Two steps, and REPLAYS more through the recording, against as many without. exact: bit for bit."""
    step, plain = steps_of(sae, **settings)
    places = {name: t.data_ptr() for name, t in state_of(step).items()}
    for i in range(GRAPH_WARMUP + REPLAYS):
        if i == GRAPH_WARMUP + 2:  # a graph reads the rate where it is
            step.lr = plain.lr = 3e-3
        x = tokens(seed=i).to(sae.W_dec.dtype)
        mine, theirs = step(x), plain(x)
        assert set(mine) == set(theirs)
        for name, value in theirs.items():
            rtol = 0 if exact else 1e-6
            torch.testing.assert_close(mine[name].double(), value.double(), rtol=rtol, atol=rtol, equal_nan=True)
    assert (Replayed.captured, Replayed.replayed) == (1, REPLAYS)
    assert_same(step, plain, exact)
    assert {name: t.data_ptr() for name, t in state_of(step).items()} == places


AUX = {"aux_k": 3, "loss": "fvu"}
WAYS = [("cpu", {}), ("reference", AUX), pytest.param("cpu", AUX, marks=pytest.mark.long)]


@pytest.mark.parametrize(("backend", "more"), WAYS)
@pytest.mark.parametrize("name", RULES)
def test_replays_are_steps(name: str, backend: str, more: dict[str, Any]) -> None:
    """Threshold rules have other numbers of empty slots without a graph, and the sum over them rounds differently."""
    if backend not in BACKENDS:
        pytest.skip("the C++ extension is not built")
    dtype = torch.float32 if backend == "cpu" else torch.float64
    compare(family_sae(RULES[name], dtype=dtype, **more), exact=name not in SHAPED, backend=backend)


@pytest.mark.parametrize(
    ("name", "settings"),
    [(name, s) for name in ("topk", "jumprelu") for s in OPTIMIZERS[: 4 - (name != "topk")]],
    ids=str,
)
def test_replays_of_every_optimizer(name: str, settings: dict[str, Any]) -> None:
    sae = family_sae(RULES[name], dtype=torch.float32, decoder_norm="unit")
    compare(sae, exact=name not in SHAPED, schedule=Schedule(total=20, warmup=3), **settings)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("cuda", "triton")])
@pytest.mark.parametrize("name", ["topk", "jumprelu"])
def test_replays_of_a_gpus_ops(name: str, backend: str) -> None:
    compare(family_sae(RULES[name], dtype=torch.float32), exact=name not in SHAPED, backend=backend)


# -- the room of a threshold rule's graph -----------------------------------------------------------------------------


def both(rule: fastsae.ReLU | fastsae.JumpReLU, **more: Any) -> tuple[FusedTrainStep, FusedTrainStep]:
    sae = family_sae(rule, dtype=torch.float64, dead=False, **more)
    return steps_of(sae, dense_above=0.9)


@pytest.mark.parametrize("name", ["relu", "jumprelu", "gated"])
def test_a_step_that_overflows_is_made_without_the_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsae.model.sae.SLACK", 0)
    step, plain = both(RULES[name])
    with torch.no_grad():
        for one in (step, plain):
            one.sae.b_enc.sub_(1.0)  # a few latents are active, until inputs grow
    for i, size in enumerate((1, 1, 1, 9, 9, 9)):
        x = size * tokens(seed=i)
        mine, theirs = step(x), plain(x)
        assert set(mine) == set(theirs)
        torch.testing.assert_close(mine["loss"], theirs["loss"], rtol=1e-9, atol=1e-9)
        assert float(mine["l0"]) == float(theirs["l0"])
        assert (Replayed.captured, Replayed.replayed) == ((0, 0), (0, 0), (1, 1), (1, 2), (2, 3), (2, 4))[i]
    assert int(step.skipped) == 0
    assert_same(step, plain, exact=False)


def test_a_step_that_is_not_finite_is_skipped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    step, plain = both(RULES["jumprelu"])
    for i in range(GRAPH_WARMUP + 3):
        x = tokens(seed=i)
        if i == GRAPH_WARMUP + 1:
            x[3, 2] = torch.nan
        step(x), plain(x)
    assert int(step.skipped) == int(plain.skipped) == 1
    assert_same(step, plain, exact=False)


def test_a_graph_with_much_too_much_room_is_captured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsae.model.sae.SLACK", 0)
    step, _ = both(RULES["relu"])
    for i in range(GRAPH_WARMUP + 1):
        step(tokens(seed=i))
    room = step._room
    with torch.no_grad():
        step.sae.b_enc.sub_(2.0)
    for i in range(2):
        step(tokens(seed=i))
    assert Replayed.captured == 2
    assert step._room is not None
    assert room is not None
    assert 4 * step._room < room


def test_a_dense_step_needs_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = family_sae(RULES["relu"], dead=False)
    step, plain = steps_of(sae, dense_above=0.0)
    for i in range(GRAPH_WARMUP + 2):
        step(tokens(seed=i)), plain(tokens(seed=i))
    assert Replayed.captured == 0
    assert_same(step, plain, exact=True)
