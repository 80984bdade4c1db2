"""Two processes under DistributedDataParallel train and count like one process; steps that sum nothing are refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import ddp_worker
from tests.counts_case import ByHand, assert_same

ROOT = Path(__file__).parent.parent


def processes(out: Path, *only: str) -> list[dict]:
    """What each process found."""
    command = [sys.executable, "-m", "tests.ddp_worker"]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(out / "store"), str(out), *only], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for rank in range(ddp_worker.RANKS)
    ]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(ddp_worker.RANKS)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return processes(tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("rule", ddp_worker.BY_TOKEN)
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


@pytest.mark.parametrize("how", [how for how in ddp_worker.WRAPPED if how not in ddp_worker.LONG])
def test_microbatches_and_checkpoints_train_and_count_as_one_process(how: str, ranks: list[dict]) -> None:
    check_wrapped(ranks, how)


@pytest.mark.long
@pytest.mark.parametrize("how", ddp_worker.LONG)
def test_graphs_train_and_count_as_one_process(how: str, tmp_path: Path) -> None:
    check_wrapped(processes(tmp_path, how), how)


def check_wrapped(ranks: list[dict], how: str) -> None:
    expected = ddp_worker.train_wrapped(how, None)
    assert int(expected["fired_over"]) == 2 * ddp_worker.STEPS * ddp_worker.N
    check(ranks, how, expected)


@pytest.mark.parametrize("rule", [*ddp_worker.BY_BATCH, "jumprelu-target"])
def test_batches_of_all_processes_count_in_each(rule: str, ranks: list[dict]) -> None:
    """Where each process chooses among its own tokens: the union of what they chose, and the mean of the least acts."""
    sae = ddp_worker.sae_of(rule)
    truth, found = ByHand(sae), [rank["found"][f"codes.{rule}"] for rank in ranks]
    for codes in zip(*(one["codes"] for one in found), strict=True):
        truth.count(*codes)
    for one in found:
        for name, counter in sae.named_buffers():
            counter.copy_(one[name])
        truth.check(sae)
        assert_same({n: t for n, t in one.items() if n != "codes"}, {n: t for n, t in found[0].items() if n != "codes"})
    if rule != "jumprelu-target":
        assert not torch.equal(found[0]["codes"].ne(0).sum((1, 2)), torch.zeros(ddp_worker.STEPS))


def test_a_batch_of_saes_counts_over_processes(ranks: list[dict]) -> None:
    saes = ddp_worker.many()
    truths, found = [ByHand(saes.to_sae(i)) for i in range(2)], [rank["found"]["many"] for rank in ranks]
    for codes in zip(*(one["codes"] for one in found), strict=True):
        for i, truth in enumerate(truths):
            truth.count(*(A[i] for A in codes))
    for one in found:
        for name, counter in saes.named_buffers():
            counter.copy_(one[name])
        for i, truth in enumerate(truths):
            truth.check(saes.to_sae(i), density=False)


def test_a_batch_that_is_not_finite_in_one_process_counts_in_none(ranks: list[dict]) -> None:
    expected = ddp_worker.not_finite(None)
    assert int(expected["fired_over"]) == ddp_worker.N
    check(ranks, "not_finite", expected)


@pytest.mark.parametrize("how", ddp_worker.STARTED)
def test_processes_that_were_started_train_as_one(how: str, ranks: list[dict]) -> None:
    expected = ddp_worker.train_started(how, None)
    assert int(expected["start_done"]) == 1
    check(ranks, how, expected)


def test_processes_that_were_not_started_say_what_to_call(ranks: list[dict]) -> None:
    for rank in ranks:
        message, unchanged = rank["refused"]["without_start"]
        assert message.startswith(
            "the rule's thresholds are not set yet, and each process sees different rows; call sae"
        )
        assert message.endswith(
            "call sae.start_(x) on a batch before DistributedDataParallel or fully_shard gets the module"
        )
        assert "\n" not in message
        assert unchanged


REFUSED = {
    "by_wrapped_optimizer": "that belongs to an optimizer of fastsae.optim",
    "by_join": "give every process the same number of batches",
}


@pytest.mark.parametrize("attempt", [attempt.__name__ for attempt in ddp_worker.ATTEMPTS])
def test_what_sums_nothing_over_processes_is_refused(attempt: str, ranks: list[dict]) -> None:
    for rank in ranks:
        message, unchanged = rank["refused"][attempt]
        assert REFUSED.get(attempt, "this is one of 2 processes") in message
        assert unchanged


def test_independent_processes_train_saes_of_their_own(ranks: list[dict]) -> None:
    for rank, got in enumerate(ranks):
        for name, value in ddp_worker.train_alone(rank).items():
            torch.testing.assert_close(
                got["alone"][name], value, rtol=1e-12, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert not torch.equal(*(got["alone"]["loop.W_dec"] for got in ranks))


@pytest.mark.parametrize("rule", ddp_worker.FULLY_SHARDED)
def test_fsdp2_trains_and_counts_as_one_process(rule: str, ranks: list[dict]) -> None:
    check(ranks, f"fully sharded {rule}", ddp_worker.train_fully_sharded(rule, None))


def test_what_fsdp2_cannot_have_is_named(ranks: list[dict]) -> None:
    words = {
        "optimizer": "use a torch optimizer on them", "parallelize": "fastsae.parallel.parallelize",
        "start": "call sae.start_(x)", "two axes": "a mesh of one axis",
    }  # fmt: skip
    for rank in ranks:
        said = rank["refused"]["fully sharded"]
        assert said.keys() == words.keys()
        assert all(part in said[name] for name, part in words.items())
