"""Feeders: processes that only run the language model. Rows and position are those of one process, whatever happens."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsae.cli.main import run as cli_run
from fastsae.runs import feeders as feeding
from tests import feeders_worker as worker
from tests.cli_case import write_text, write_tiny_model
from tests.test_parallel import launch
from tests.test_parallel_runs import (
    LIMIT,
    ROOT,
    _wait_for_a_line,
    _workers,
    assert_close,
    assert_same_curves,
    command,
    cut_back,
    run,
)

ARGUMENTS = ("train", "live", "--run-dir", "runs/a", "--d-sae", "64", "--k", "4",
             "--live.model", "m", "--live.text", "t", "--live.hook", "1")  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the three processes saw; the last to be asked for ends as if it were killed."""
    out = tmp_path_factory.mktemp("feeders")
    launch(worker.WORLD, str(out / "store"), str(out), module="tests.feeders_worker")
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2)]


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name != "rows":
            assert found[name] == value, name
            continue
        for mine, theirs in zip(found[name], value, strict=True):
            assert torch.equal(mine, theirs)


class _Garbled(feeding.Line):
    """A line on which what arrives cannot be read."""

    def __init__(self) -> None:
        pass

    def numbers(self, rank: int, count: int = feeding.HEAD) -> list[int]:
        return [feeding.END, 1, 0, 0, 0]

    def words(self, rank: int, length: int) -> str:
        return b"\xff".decode()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_feeder_ends_whatever_ends_its_listener() -> None:
    """And does not wait for ever."""
    inbox, ended = SimpleQueue[Any](), list[Any]()
    listener = threading.Thread(target=feeding._listen, args=(_Garbled(), inbox, ended))
    listener.start()
    assert inbox.get(timeout=10) is None
    listener.join()
    assert [end.lost for end in ended] == [True]


@pytest.mark.parametrize("feeders", [1, 2])
@pytest.mark.parametrize("name", worker.CONFIGS)
def test_rows_counts_and_positions_of_one_process(name: str, feeders: int, ranks: Any) -> None:
    assert_same(ranks[0][f"rows, {feeders}, {name}"], worker.read(worker.alone(name)))


@pytest.mark.parametrize("feeders", [1, 2])
def test_a_position_goes_on_with_another_number_of_feeders(feeders: int, ranks: Any) -> None:
    """From a position of one process, and back into one process."""
    first = worker.alone("one hook")
    first.next_batch(633)
    expected = worker.read(first)
    assert_same(ranks[0][f"resumed, {feeders}"], expected)
    again = worker.alone("one hook")
    again.load_state_dict(ranks[0][f"resumed, {feeders}"]["position 4"])
    assert torch.equal(again.next_batch(450), expected["rows"][6])


@pytest.mark.parametrize("feeders", [1, 2])
def test_a_feeder_waits_when_a_block_is_ready(feeders: int, ranks: Any) -> None:
    """However slow the reader is, and however often it goes back in the text."""
    each = max(2, worker.BLOCK // feeders)
    found = ranks[0][f"slow reader, {feeders}"]
    assert found["waiting"] == [each] * feeders
    first = worker.alone("one hook")
    first.next_batch(1)
    assert torch.equal(found["rows"][0], first.next_batch(500))
    if feeders == 2:  # then process 1 is one
        fed = ranks[1][f"slow reader, {feeders}"]
        assert fed["most"] == each
        assert fed["passes"] > 2 * worker.BLOCK


def test_a_feeder_ends_before_the_passes_that_it_was_asked_for(ranks: Any) -> None:
    assert ranks[1]["prompt end"]["passes"] in (3, 4)  # of 5


def test_a_feeder_has_the_threads_of_the_first_process(ranks: Any) -> None:
    assert torch.equal(ranks[0]["threads"], worker.alone("one hook").next_batch(9))


def test_a_mesh_of_some_processes_is_made_by_all(ranks: Any) -> None:
    assert ranks[0]["other mesh"].endswith("[0, 2] of 3; make it with mesh(processes=)")


def test_an_exception_in_a_feeder_is_everyones_error_with_its_name(ranks: Any) -> None:
    """The rows before it are those of one process."""
    what = "ValueError: no memory left on the device of the model"
    first, other = (rank["failing"] for rank in ranks)
    assert first["said"] == f"ProcessError: process 2, a feeder: {what}"
    assert other["said"] == f"ProcessError: process 0: {first['said']}"
    assert_starts_as_alone(first["rows"], 50)
    first, other = (rank["not loaded"] for rank in ranks)
    assert first == "ProcessError: process 2, a feeder: ValueError: no model at 'nowhere'"
    assert other == f"ProcessError: process 0: {first}"


def test_a_failure_ahead_of_a_run_that_has_ended_is_none(ranks: Any) -> None:
    assert torch.equal(ranks[0]["not needed"], worker.alone("one hook").next_batch(9))


def test_a_feeder_that_dies_is_everyones_error_with_its_name(ranks: Any) -> None:
    first, other = (rank["killed"] for rank in ranks)
    assert first["said"].startswith("ProcessError: process 2, a feeder, has ended or does not answer")
    assert "--resume" in first["said"]
    assert other["said"] == f"ProcessError: process 0: {first['said']}"
    assert_starts_as_alone([torch.cat(pair) for pair in zip(first["rows"], other["rows"], strict=True)], 51)


def assert_starts_as_alone(batches: list[Tensor], n: int) -> None:
    alone = worker.alone("one hook")
    assert len(batches) > 1
    for batch in batches:
        assert torch.equal(batch, alone.next_batch(n))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--feeders", "2"), "torchrun --nproc-per-node 3 -m fastsae train live"),
        (("--feeders", "-1"), "--feeders is -1, expected a number of processes"),
        (("--feeders", "1", "--live.prefetch"), "feeders always compute ahead"),
        (("--feeders", "1", "--live.hook", "2"), "several processes train one SAE, and there are 2 live hooks"),
        (("--feeders", "1", "--live.text", ""), "training live needs --live.text"),
    ],
)
def test_options_that_leave_feeders_nothing_to_do(more: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cli_run([*ARGUMENTS, *more])


def test_stored_rows_need_no_feeders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--feeders 1 is for DATA live"):
        cli_run(["train", str(tmp_path), "--run-dir", "runs/a", "--d-sae", "64", "--k", "4", "--feeders", "1"])


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("live")
    model, text = write_tiny_model(folder / "model"), write_text(folder / "text.txt")
    return ["--live.model", str(model), "--live.text", str(text), "--live.hook", "1", "--live.window", "16",
            "--live.buffer-rows", "600", "--live.holdout", "128", "--keep", "9"]  # fmt: skip


@pytest.fixture(scope="module")
def alone(live: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process with one thread, as torchrun gives each of its own."""
    run_dir, threads = tmp_path_factory.mktemp("alone") / "run", torch.get_num_threads()
    torch.set_num_threads(1)
    assert cli_run(command(1, Path("live"), run_dir, *live)[3:]) == 0
    torch.set_num_threads(threads)
    return run_dir


def test_a_run_of_one_process_goes_on_with_a_feeder(live: list[str], alone: Path, tmp_path: Path) -> None:
    """To the bits that the one process ends with."""
    shutil.copytree(alone, tmp_path / "run")
    cut_back(tmp_path / "run")
    done = run(2, Path("live"), tmp_path / "run", *live, "--feeders", "1", "--resume")
    assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "run", alone, 0.0)


@pytest.mark.long
def test_two_processes_with_two_feeders_and_on_without(live: list[str], alone: Path, tmp_path: Path) -> None:
    done = run(4, Path("live"), tmp_path / "run", *live, "--feeders", "2")
    assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "run", alone, 0.0)
    cut_back(tmp_path / "run")
    done = run(1, Path("live"), tmp_path / "run", *live, "--resume")
    assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "run", alone, 0.0)


@pytest.mark.long
@pytest.mark.parametrize("more", [("--feeders", "2"), ("--feeders", "1", "--latent-shards", "2")])
def test_feeders_that_leave_too_few_processes(live: list[str], more: tuple[str, ...], tmp_path: Path) -> None:
    done = run(2, Path("live"), tmp_path / "run", *live, *more)
    assert done.returncode == 1
    assert "--feeders 2 leaves none of 2 processes" in done.stderr or "does not fit 1 processes" in done.stderr
    assert "Loading weights" not in done.stderr


@pytest.mark.long
def test_a_killed_feeder_and_ctrl_c(live: list[str], tmp_path: Path) -> None:
    """kill -9 of the feeder, then Ctrl-C, then on with another number of them: the curve of an undisturbed run."""
    steps, run_dir = 400, tmp_path / "run"
    assert run(1, Path("live"), tmp_path / "alone", *live, steps=steps).returncode == 0
    for stop, feeders in ((signal.SIGKILL, 1), (signal.SIGINT, 2)):
        started = subprocess.Popen(
            command(3, Path("live"), run_dir, *live, "--feeders", str(feeders), "--resume", steps=steps), cwd=ROOT,
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
        )  # fmt: skip
        _wait_for_a_line(run_dir / "metrics.jsonl", started)
        processes = _workers(started)
        os.kill(processes[-1] if stop is signal.SIGKILL else started.pid, stop)
        _, errors = started.communicate(timeout=LIMIT)
        assert started.returncode != 0
        if stop is signal.SIGKILL:
            assert errors.count("process 2, a feeder, has ended or does not answer") == 2, errors
        else:
            assert errors.count("the run was stopped by SIGINT") == feeders
        assert not any(Path(f"/proc/{pid}").exists() for pid in processes)
    done = run(2, Path("live"), run_dir, *live, "--feeders", "1", "--resume", steps=steps)
    assert done.returncode == 0, done.stderr
    assert_same_curves(run_dir, tmp_path / "alone", 1e-9)
