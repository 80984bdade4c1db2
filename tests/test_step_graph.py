"""FusedTrainStep(cuda_graph=True): when it captures, when it replays, and how it reacts to a change.

Without a GPU a stand-in replaces the graph: it runs the step at every call, as a replay would. test_graph_replay.py has
one that replays, test_graph_reads.py shows that no step reads the host. `python -m bench.gpu` checks that a real graph
gives the same numbers, and so does the last test here on a GPU.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import fastsae
from fastsae.runs.schedules import Schedule
from fastsae.training import step as optim
from fastsae.training.graph import check_graph
from fastsae.training.step import GRAPH_WARMUP, FusedTrainStep
from tests.dense_sae import sae_for_test, tokens
from tests.family_case import RULES, SHAPED, family_sae
from tests.family_case import tokens as family_tokens

WIDTH, LATENTS = 10, 60


class StandIn:
    """Counts captures and replays of a step. A capture runs nothing."""

    captured: int
    replayed: int

    def __init__(self, run, x: Tensor, target: Tensor | None):
        StandIn.captured += 1
        self.run, self.shape = run, x.shape

    def __call__(self, x: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        StandIn.replayed += 1
        assert x.shape == self.shape
        return self.run(x, target)


@pytest.fixture
def graphed(monkeypatch: pytest.MonkeyPatch) -> FusedTrainStep:
    monkeypatch.setattr(optim, "StepGraph", StandIn)
    StandIn.captured = StandIn.replayed = 0
    step = FusedTrainStep(sae_for_test(d_sae=LATENTS, dtype=torch.float32), lr=1e-3)
    step.cuda_graph = True  # the constructor refuses it on a CPU
    return step


def batch(seed: int, n: int = 16) -> Tensor:
    return tokens(n, WIDTH, seed, torch.float32)


def test_it_captures_after_the_warm_up_and_gives_the_same_numbers(graphed: FusedTrainStep) -> None:
    plain = FusedTrainStep(copy.deepcopy(graphed.sae), lr=1e-3)
    for seed in range(GRAPH_WARMUP + 3):
        got, expected = graphed(batch(seed)), plain(batch(seed))
        assert {name: float(value) for name, value in got.items()} == {n: float(v) for n, v in expected.items()}
        assert StandIn.captured == (seed >= GRAPH_WARMUP)
    assert StandIn.replayed == 3
    assert int(graphed.count) == GRAPH_WARMUP + 3
    for p, q in zip(graphed.sae.parameters(), plain.sae.parameters(), strict=True):
        assert torch.equal(p, q)


def test_another_shape_runs_without_the_graph_and_keeps_it(graphed: FusedTrainStep) -> None:
    for seed in range(GRAPH_WARMUP + 1):
        graphed(batch(seed))
    graphed(batch(7, n=5))
    graphed(batch(8))
    assert (StandIn.captured, StandIn.replayed) == (1, 2)


@pytest.mark.parametrize("change", ["betas", "loss", "parameter", "schedule"])
def test_a_change_in_what_a_graph_captured_leads_to_a_new_capture(change: str, graphed: FusedTrainStep) -> None:
    for seed in range(GRAPH_WARMUP + 1):
        graphed(batch(seed))
    if change == "betas":
        graphed.betas = (0.8, 0.99)
    elif change == "loss":
        graphed.sae.loss = "fvu"
    elif change == "schedule":
        graphed.schedule = Schedule(total=10, warmup=4)
    else:
        graphed.sae.W_enc.data = graphed.sae.W_enc.detach().clone()
    for seed in range(GRAPH_WARMUP):
        graphed(batch(seed))
        assert StandIn.captured == 1
    graphed(batch(9))
    assert StandIn.captured == 2


def test_edited_weights_refill_the_screen_in_its_place(graphed: FusedTrainStep) -> None:
    for seed in range(GRAPH_WARMUP + 1):
        graphed(batch(seed))
    screen = graphed.optimizer.screen_of(graphed.sae).screen
    assert screen is not None, "the case needs a backend that screens"
    places = [t.data_ptr() for t in screen.tensors]
    with torch.no_grad():
        graphed.sae.W_enc.mul_(-1)
    plain = FusedTrainStep(copy.deepcopy(graphed.sae), lr=1e-3)
    plain.load_state_dict(copy.deepcopy(graphed.state_dict()))
    assert float(graphed(batch(5))["loss"]) == float(plain(batch(5))["loss"])
    assert [t.data_ptr() for t in graphed.optimizer.screen_of(graphed.sae).screen.tensors] == places
    assert StandIn.captured == 1


def test_a_replay_tells_autograd_that_the_weights_changed(graphed: FusedTrainStep) -> None:
    for seed in range(GRAPH_WARMUP + 1):
        graphed(batch(seed))
    out = graphed.sae(batch(1))
    graphed(batch(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_it_is_refused_where_it_cannot_work() -> None:
    sae = sae_for_test(dtype=torch.float32)
    if sae.W_dec.device.type == "cpu":
        with pytest.raises(ValueError, match="cuda_graph=True needs the SAE on a CUDA device, it is on cpu"):
            FusedTrainStep(sae, cuda_graph=True)
    on_a_gpu = SimpleNamespace(
        W_dec=SimpleNamespace(device=torch.device("cuda")), activation=fastsae.TopK(3), ghost="pull"
    )
    with pytest.raises(ValueError, match="ghost='pull' reads the number of dead latents at every step"):
        check_graph(on_a_gpu, check=False, anneals=False)  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU: a real CUDA graph cannot be captured")
@pytest.mark.parametrize("name", RULES)
def test_a_real_graph_gives_the_same_numbers(name: str) -> None:
    """Of threshold rules nearly: a sum over empty slots too rounds differently."""
    runs = []
    for cuda_graph in (False, True):
        sae = family_sae(RULES[name], dtype=torch.float32, aux_k=4).cuda()
        step = FusedTrainStep(sae, lr=1e-3, cuda_graph=cuda_graph, dense_above=1.0)
        losses = [step(family_tokens(seed=seed).float().cuda())["loss"].double() for seed in range(8)]
        runs.append([*losses, *(p.detach() for p in sae.parameters())])
        assert (step._graph is not None) == cuda_graph
    bound = 1e-5 if name in SHAPED else 0
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)
