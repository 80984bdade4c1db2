"""`fastsae train` under torchrun: the run of one process, on any number of them, killed and resumed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsae.cli.main import UsageError
from fastsae.cli.main import run as cli_run
from fastsae.cli.processes import joined
from tests.cli_case import write_text, write_tiny_model

ROOT = Path(__file__).parent.parent
STEPS = 24
LIMIT = 120
KILLS = int(os.environ.get("FASTSAE_TEST_KILLS", "5"))
"""20 were tried before this was committed."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sparse sums of 64 directions; 1,501 rows, so that batches and epochs do not end together."""
    path = tmp_path_factory.mktemp("rows") / "rows.safetensors"
    generator = torch.Generator().manual_seed(0)
    strengths = torch.rand(1501, 64, generator=generator) * (torch.rand(1501, 64, generator=generator) < 0.06)
    save_file({"activations": strengths @ torch.randn(64, 32, generator=generator)}, path)
    return path


def command(processes: int, rows: Path, run_dir: Path, *more: str, steps: int = STEPS) -> list[str]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [
        sys.executable, *(start if processes > 1 else []), "-m", "fastsae", "train", str(rows),
        "--run-dir", str(run_dir), "--d-sae", "65", "--activation", "batch_topk", "--k", "4", "--lr", "2e-3",
        "--aux-k", "8", "--dead-after", "400", "--steps", str(steps), "--batch-size", "101", "--checkpoint-every", "4",
        "--eval-every", "12", "--log-every", "4", "--no-progress", *more,
    ]  # fmt: skip


def run(processes: int, rows: Path, run_dir: Path, *more: str, steps: int = STEPS) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(processes, rows, run_dir, *more, steps=steps),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint."""
    return load_file(max((run_dir / "checkpoints").iterdir()) / "sae.safetensors")


def lines(run_dir: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def assert_close(run_dir: Path, alone: Path, tolerance: float) -> None:
    """Weights, and the curves of training and evaluation."""
    for name, t in weights(alone).items():
        torch.testing.assert_close(
            weights(run_dir)[name], t, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m
        )
    assert_same_curves(run_dir, alone, tolerance)


def assert_same_curves(run_dir: Path, alone: Path, tolerance: float) -> None:
    """Every line once, of the same step and FVU."""
    for file in ("metrics.jsonl", "eval.jsonl"):
        for mine, theirs in zip(lines(run_dir, file), lines(alone, file), strict=True):
            assert mine["step"] == theirs["step"]
            assert mine["fvu"] == pytest.approx(theirs["fvu"], rel=max(tolerance, 1e-9))


def cut_back(run_dir: Path) -> None:
    """To the middle of its steps, as if it had been stopped there."""
    for path in (run_dir / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > STEPS // 2:
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def alone(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    done = run(1, rows, run_dir)
    assert done.returncode == 0, done.stderr
    return run_dir


def test_a_run_of_one_process_goes_on_with_a_shared_batch(rows: Path, alone: Path, tmp_path: Path) -> None:
    """To the bits that the one process ends with."""
    shutil.copytree(alone, tmp_path / "run")
    cut_back(tmp_path / "run")
    done = run(2, rows, tmp_path / "run", "--resume", "--keep", "9")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("checkpoint ") == 1, "one process writes and prints"
    assert_close(tmp_path / "run", alone, 0.0)
    assert len(lines(tmp_path / "run", "metrics.jsonl")[-1]["ms_step_by_rank"]) == 2


@pytest.mark.long
def test_a_shared_batch_goes_on_with_a_shared_dictionary_and_in_one_process(
    rows: Path, alone: Path, tmp_path: Path
) -> None:
    done = run(2, rows, tmp_path / "run", "--keep", "9")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["machine"]["processes"] == {"data": 2, "latents": 1}
    cut_back(tmp_path / "run")
    done = run(2, rows, tmp_path / "run", "--resume", "--latent-shards", "2", "--keep", "9")
    assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "run", alone, 1e-4)
    cut_back(tmp_path / "run")
    done = run(1, rows, tmp_path / "run", "--resume", "--keep", "9")
    assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "run", alone, 0.0)


@pytest.mark.long
@pytest.mark.parametrize(
    "more", [["--aux-k", "None", "--ghost", "residual"], ["--resample-at", "7", "--resample-rows", "300"]]
)
def test_dead_latents_are_revived_as_in_one_process(more: list[str], rows: Path, tmp_path: Path) -> None:
    """By ghost gradients and by resampling, where batch and dictionary are both shared."""
    dead = ["--dead-after", "300", "--activation", "topk", *more]
    for name, processes, shards in (("alone", 1, []), ("four", 4, ["--latent-shards", "2"])):
        done = run(processes, rows, tmp_path / name, *dead, *shards, "--keep", "9")
        assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "four", tmp_path / "alone", 1e-3)
    assert sum(line["dead"] for line in lines(tmp_path / "alone", "metrics.jsonl")), "none was dead"


def test_shards_without_torchrun() -> None:
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2 -m fastsae train"), joined("cpu", 2):
        pass


def test_other_commands_are_refused_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # what torch looks at
    with pytest.raises(UsageError, match="run fastsae eval alone"):
        cli_run(["eval", "runs/a"])


@pytest.mark.long
def test_errors_are_one_line_from_every_process(rows: Path, alone: Path) -> None:
    done = run(2, rows, alone)  # a run is there, and --resume was not given
    assert done.returncode == 1
    assert "holds a run with checkpoints" in done.stderr
    assert "process 0: RunDirError" in done.stderr
    assert done.stderr.count("fastsae train: error") == 2


@pytest.mark.long
def test_a_live_model_runs_in_the_first_process_alone(tmp_path: Path) -> None:
    """Its run is that of one process, and goes on in one."""
    model, text = write_tiny_model(tmp_path / "model"), write_text(tmp_path / "text.txt")
    live = ["--live.model", str(model), "--live.text", str(text), "--live.hook", "1", "--live.window", "16",
            "--live.buffer-rows", "600", "--live.holdout", "128"]  # fmt: skip
    for name, processes in (("alone", 1), ("two", 2)):
        done = run(processes, Path("live"), tmp_path / name, *live, "--keep", "9")
        assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "two", tmp_path / "alone", 0.0)
    cut_back(tmp_path / "two")
    done = run(1, Path("live"), tmp_path / "two", *live, "--resume")
    assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "two", tmp_path / "alone", 0.0)
    (tmp_path / "text.txt").unlink()
    done = run(2, Path("live"), tmp_path / "gone", *live)
    assert done.returncode == 1
    assert "process 0: ValueError: no text" in done.stderr


@pytest.mark.long
def test_kills_at_random_moments_on_changing_numbers_of_processes(rows: Path, tmp_path: Path) -> None:
    """kill -9 of one process, then on with another mesh: the curve is that of the run that nobody disturbed."""
    draw, steps, run_dir, alone = random.Random(0), 600, tmp_path / "run", tmp_path / "alone"
    assert run(1, rows, alone, steps=steps).returncode == 0
    meshes = [(2, 1), (3, 1), (2, 2), (3, 3), (4, 2)]
    for kill in range(KILLS):
        processes, shards = meshes[kill % len(meshes)]
        more = ["--latent-shards", str(shards), *(["--resume"] if kill else [])]
        started = subprocess.Popen(
            command(processes, rows, run_dir, *more, steps=steps), cwd=ROOT, stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL, text=True, start_new_session=True,
        )  # fmt: skip
        _wait_for_a_line(run_dir / "metrics.jsonl", started)
        time.sleep(draw.uniform(0, 0.05))
        os.kill(draw.choice(_workers(started)), signal.SIGKILL)
        _, errors = started.communicate(timeout=LIMIT)
        assert started.returncode != 0
        assert "another process of this run ended" in errors or "SIGKILL" in errors
    done = run(2, rows, run_dir, "--resume", steps=steps)
    assert done.returncode == 0, done.stderr
    assert_same_curves(run_dir, alone, 1e-2)


@pytest.mark.long
@pytest.mark.parametrize("stopped", [0, 2])
def test_a_process_that_does_not_answer_is_named(stopped: int, rows: Path, tmp_path: Path) -> None:
    """Four processes on both axes, one of them stopped: the others wait as long as asked, and say who it is."""
    more = ["--latent-shards", "2", "--wait", "4"]
    started = subprocess.Popen(
        command(4, rows, tmp_path / "run", *more, steps=100_000), cwd=ROOT, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    _wait_for_a_line(tmp_path / "run" / "metrics.jsonl", started)
    pid = next(pid for pid in _workers(started) if f"\0RANK={stopped}\0" in Path(f"/proc/{pid}/environ").read_text())
    os.kill(pid, signal.SIGSTOP)
    assert started.stderr is not None
    said = next((line for line in started.stderr if "fastsae train: error" in line), "")
    os.kill(pid, signal.SIGKILL)
    started.communicate(timeout=LIMIT)
    assert f"process {stopped} of this run ended or does not answer" in said
    assert started.returncode != 0


def _wait_for_a_line(path: Path, started: subprocess.Popen[str]) -> None:
    """Until the run has written one line more than there were."""
    before, since = path.stat().st_size if path.exists() else 0, time.monotonic()
    while not (path.exists() and path.stat().st_size > before):
        assert started.poll() is None, "it ended by itself"
        assert time.monotonic() - since < LIMIT
        time.sleep(0.02)


def _workers(started: subprocess.Popen[str]) -> list[int]:
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(started.pid)], capture_output=True, text=True, check=True
    ).stdout
    return [int(pid) for pid in listed.split()]
