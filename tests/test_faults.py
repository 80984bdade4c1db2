"""What goes wrong around a run: signals, a second process, a full disk, damaged files.

The run either ends with an error that names the cause, or goes on. What was saved stays.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import Tensor

from fastsae.runs import logs
from fastsae.runs.boards import LogWriteError
from fastsae.runs.checkpoint import CheckpointError, list_checkpoints, step_of, verify_checkpoint
from fastsae.runs.logs import JsonlLog
from fastsae.runs.rundir import RunDirError, RunLock
from fastsae.runs.stopping import TrainingInterrupted
from tests.train_case import config, curve, lines, module, saved_bytes, trainer

Hook = Callable[[int, Tensor], Tensor | None]


def at(n: int, act: Callable[[], object]) -> Hook:
    """A source hook that acts ahead of the n-th batch."""

    def hook(calls: int, batch: Tensor) -> None:
        if calls == n:
            act()

    return hook


def saved_steps(run_dir: Path) -> list[int]:
    """The checkpoints of a run, each verified."""
    paths = list_checkpoints(run_dir / "checkpoints")
    for path in paths:
        verify_checkpoint(path)
    return [step_of(path) for path in paths]


def assert_same_end(run_dir: Path, whole_dir: Path) -> None:
    """Runs both to the end: the interrupted run must end with the bits of the other."""
    resumed, whole = trainer(run_dir).run(), trainer(whole_dir).run()
    assert saved_bytes(resumed.checkpoint) == saved_bytes(whole.checkpoint)
    assert curve(run_dir) == curve(whole_dir)
    assert [line["step"] for line in lines(run_dir / "eval.jsonl")] == [10, 20, 30]


# -- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_so(
    tmp_path: Path, signum: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signum)
    with pytest.raises(TrainingInterrupted) as caught:
        trainer(tmp_path / "run", at(12, lambda: signal.raise_signal(signum))).run()
    assert caught.value.signal == signum
    assert isinstance(caught.value, KeyboardInterrupt)
    assert f"stopped by {signum.name} after step 12 of 30" in str(caught.value)
    assert str(tmp_path / "run" / "checkpoints" / "step_00000012") in str(caught.value)
    assert f"{signum.name}: finishing this step and writing a checkpoint" in capfd.readouterr().err
    assert saved_steps(tmp_path / "run") == [7, 12]
    assert signal.getsignal(signum) == before
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="second SIGINT: stopped at once") as caught:
        trainer(tmp_path / "run", at(12, twice)).run()
    assert not isinstance(caught.value, TrainingInterrupted)
    assert saved_steps(tmp_path / "run") == [7]
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_a_signal_before_or_after_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingInterrupted, match=r"after step 30 of 30; the checkpoint is .* The run is complete"):
        trainer(tmp_path / "late", at(30, lambda: signal.raise_signal(signal.SIGINT))).run()
    early = trainer(tmp_path / "early")
    make_step = early._make_step
    monkeypatch.setattr(early, "_make_step", lambda: (signal.raise_signal(signal.SIGINT), make_step())[1])
    nothing = "after step 0 of 30; no step was done yet, so nothing is saved. Start the same run again$"
    with pytest.raises(TrainingInterrupted, match=nothing) as caught:
        early.run()
    assert not caught.value.goes_on
    assert saved_steps(tmp_path / "early") == []


def test_a_run_in_another_thread_leaves_signals_alone(tmp_path: Path) -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(trainer(tmp_path, steps=2).run()))
    thread.start()
    thread.join(60)
    assert [r.step for r in results] == [2]


# -- two processes --------------------------------------------------------------------------------------------------

HOLD = """
import fcntl, os, sys, time
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(fd, fcntl.LOCK_EX)
os.write(fd, f"pid {os.getpid()} on somewhere\\n".encode())
print("held", flush=True)
time.sleep(60)
"""


def test_a_directory_in_use_is_refused_and_a_dead_holder_does_not_block_it(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "LOCK")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunDirError, match=f"{tmp_path} is in use by pid {holder.pid} on somewhere"):
            trainer(tmp_path, steps=1).run()
        assert [p.name for p in tmp_path.iterdir()] == ["LOCK"]
    finally:
        holder.kill()
        holder.wait()
    assert (tmp_path / "LOCK").read_text() == f"pid {holder.pid} on somewhere\n"
    assert trainer(tmp_path, steps=1).run().step == 1


def test_the_lock_is_free_again_after_a_run_and_after_an_error(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(RunDirError, match=f"in use by pid {os.getpid()} on"), RunLock(tmp_path):
        pytest.fail("locked twice")
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, at(2, lambda: 1 / 0)).run()
    with RunLock(tmp_path):
        pass


def test_a_start_that_saved_nothing_does_not_bind_the_next(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, at(1, lambda: 1 / 0), lr=0.5).run()
    assert trainer(tmp_path, steps=2, lr=1e-3).run().step == 2
    with pytest.raises(RunDirError, match=r"holds a run with other settings: .*lr is 0\.001 there and 0.5 here"):
        trainer(tmp_path, steps=2, lr=0.5).run()


# -- a full disk ----------------------------------------------------------------------------------------------------


def test_a_file_size_limit_at_a_checkpoint(tmp_path: Path) -> None:
    """Past the limit a write fails with EFBIG: a real error from the system, in the middle of a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        run = trainer(tmp_path / "run", at(9, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))))
        with pytest.raises(CheckpointError) as caught:
            run.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = str(caught.value)
    assert f"cannot write the checkpoint of step 14 to {tmp_path / 'run' / 'checkpoints'}" in message
    assert "File too large" in message
    assert "step_00000007, is intact" in message
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000007"]
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def fill(path: Path) -> None:
    """Writes until nothing more fits."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while os.write(fd, b"\0" * 512):
            pass
    os.close(fd)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB: room for a few of this run's checkpoints."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_at_a_checkpoint_and_at_a_log_line(tmp_path: Path, small_disk: Path) -> None:
    run_dir = small_disk / "run"
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint of step .*No space left on device"):
        trainer(run_dir, keep=99).run()
    kept = saved_steps(run_dir)
    assert kept
    assert kept == [7, 14, 21][: len(kept)]

    fill(small_disk / "filler")
    with pytest.raises((LogWriteError, RunDirError), match="No space left on device"):
        trainer(run_dir, keep=99, checkpoint_every=30).run()
    assert saved_steps(run_dir) == kept
    assert [line["step"] for line in lines(run_dir / "metrics.jsonl")][: kept[-1]] == list(range(1, kept[-1] + 1))

    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    assert_same_end(run_dir, tmp_path / "whole")


def test_a_disk_that_fills_in_the_middle_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    left = 2000

    def write(fd: int, data: bytes) -> int:
        nonlocal left
        if not os.readlink(f"/proc/self/fd/{fd}").endswith(".jsonl"):
            return real(fd, data)
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = data[:left]
        left -= len(part)
        return real(fd, part)

    with monkeypatch.context() as patch:
        patch.setattr(logs.os, "write", write)
        with pytest.raises(LogWriteError, match=r"cannot write to .*metrics.jsonl: No space left on device"):
            trainer(tmp_path / "run").run()
    # The half-written line is removed: every line in the file is whole.
    steps = [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes().endswith(b"}\n")
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_a_log_is_cut_at_a_step(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path / "metrics.jsonl")
    log.open()
    for step in (1, 2, 3):
        log.append({"step": step, "loss": float("nan"), "more": {"x": [float("inf"), 1]}})
    log.close()
    (tmp_path / "metrics.jsonl").write_bytes((tmp_path / "metrics.jsonl").read_bytes() + b'{"step": 4, "lo')
    log.open()
    assert log.cut_after(2) == 2
    assert log.cut_after(2) == 0
    log.append({"step": 3})
    log.close()
    none = {"loss": None, "more": {"x": [None, 1]}}
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, **none}, {"step": 2, **none}, {"step": 3}]
    with pytest.raises(LogWriteError, match=r"cannot open .*nowhere.*No such file"):
        JsonlLog(tmp_path / "nowhere" / "metrics.jsonl").open()


# -- damaged checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sae.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(tmp_path: Path, name: str) -> None:
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path / "run", at(17, lambda: 1 / 0)).run()
    assert saved_steps(tmp_path / "run") == [7, 14]
    broken = tmp_path / "run" / "checkpoints" / "step_00000014" / name
    os.truncate(broken, broken.stat().st_size // 2)
    with pytest.warns(RuntimeWarning, match=rf"(?s){name} is (truncated|damaged).*Continuing from .*step_00000007"):
        resumed = trainer(tmp_path / "run").run()
    assert (tmp_path / "run" / "checkpoints" / "corrupt_step_00000014").is_dir()
    whole = trainer(tmp_path / "whole").run()
    assert saved_bytes(resumed.checkpoint) == saved_bytes(whole.checkpoint)
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_no_usable_checkpoint_is_an_error_and_not_a_new_start(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, at(10, lambda: 1 / 0)).run()
    (tmp_path / "checkpoints" / "step_00000007" / "sae.safetensors").unlink()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(
        CheckpointError, match=r"none of the checkpoints in .* can be used: .*sae.safetensors is missing"
    ):
        trainer(tmp_path).run()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_the_settings_of_these_tests_exercise_every_part_of_the_state() -> None:
    """Latents die and AuxK trains them, the data wraps, and the rate changes. Otherwise equal bits would prove less."""
    sae, settings = module(), config()
    assert sae.aux_k is not None
    assert settings.steps is not None
    assert sae.dead_after < settings.steps * settings.batch_size / 2
    assert settings.steps * settings.batch_size > 2 * 600
    assert settings.decay != "constant"
