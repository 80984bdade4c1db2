"""Two processes under DistributedDataParallel train and count like one process; a fused update there is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import ddp_worker

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    out = tmp_path_factory.mktemp("ddp")
    command = [sys.executable, "-m", "tests.ddp_worker"]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(out / "store"), str(out)], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for rank in range(ddp_worker.RANKS)
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(ddp_worker.RANKS)]


@pytest.mark.parametrize("rule", ["topk", "jumprelu"])
def test_two_processes_train_and_count_as_one(rule: str, ranks: list[dict]) -> None:
    expected = ddp_worker.train(rule, None)
    few = expected["dead"].sum(1)
    assert bool((few > 0).all()), "AuxK should have dead latents in every step"
    if rule == "topk":  # a threshold lets the same latents fire in each of these batches
        assert not torch.equal(expected["dead"][0], expected["dead"][-1]), "some latents should die or come back"
    check(ranks, rule, expected)


def check(ranks: list[dict], name: str, expected: dict[str, torch.Tensor]) -> None:
    for rank in ranks:
        assert rank["found"][name].keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(
                rank["found"][name][key], value, rtol=1e-9, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}"
            )


@pytest.mark.parametrize("how", ddp_worker.STARTED)
def test_processes_that_were_started_train_as_one(how: str, ranks: list[dict]) -> None:
    expected = ddp_worker.train_started(how, None)
    assert int(expected["start_done"]) == 1
    check(ranks, how, expected)


def test_processes_that_were_not_started_say_what_to_call(ranks: list[dict]) -> None:
    for rank in ranks:
        message, unchanged = rank["refused"]["without_start"]
        assert message.startswith(
            "the rule's thresholds are not set yet, and each process sees rows of its own; call sae"
        )
        assert message.endswith("call sae.start_(x) on a batch before wrapping the module in DistributedDataParallel")
        assert "\n" not in message
        assert unchanged


@pytest.mark.parametrize("attempt", ["by_optimizer", "by_step"])
def test_a_fused_update_in_several_processes_is_refused(attempt: str, ranks: list[dict]) -> None:
    for rank in ranks:
        message, unchanged = rank["refused"][attempt]
        assert "this is one of 2 processes" in message
        assert unchanged


def test_independent_processes_train_saes_of_their_own(ranks: list[dict]) -> None:
    for rank, got in enumerate(ranks):
        for name, value in ddp_worker.train_alone(rank).items():
            torch.testing.assert_close(
                got["alone"][name], value, rtol=1e-12, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert not torch.equal(*(got["alone"]["loop.W_dec"] for got in ranks))
