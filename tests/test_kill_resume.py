"""A run killed with SIGKILL, again and again and in the worst places, ends with the bits of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from fastsae.runs.checkpoint import list_checkpoints, step_of, verify_checkpoint
from tests.train_case import curve, lines, saved_bytes

ROOT = Path(__file__).resolve().parent.parent
STEPS = 40

# Where a child kills itself: [place, at which pass through it]. See kill_worker.PLACES.
IN_PLACES: list[list[str | int]] = [
    ["config", 1],  # before config.json is written: the folder is still empty
    ["update", 3],  # weights changed, nothing saved
    ["tensors", 1],  # optimizer.safetensors of the very first checkpoint is half written
    ["tensors", 4],  # the same for the second; each has a file of moments and one of generators
    ["manifest", 1],  # every file is there but the manifest
    ["line", 4],  # half a line in metrics.jsonl
    ["cut", 1],  # that line is being cut off, into a file that is not yet renamed
    ["sealed", 1],  # complete, not yet renamed
    ["renamed", 1],  # renamed, older ones not yet deleted
    ["deleting", 1],  # an old checkpoint is half deleted
    ["line", 2],
    ["update", 2],
]


CASES: dict[str, tuple[dict[str, object], list[list[str | int]]]] = {
    "fused": ({}, IN_PLACES),
    "bf16-moments": ({"moments": "bf16"}, [["update", 9], ["manifest", 1]]),
    "plain": ({"fused": False, "init_b_dec": "geometric_median"}, [["update", 9], ["sealed", 1]]),
    "live": ({"kind": "live"}, [["update", 9], ["tensors", 2]]),
}
RANDOM_KILLS = 4


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """(directory, how each child of each case ended); all cases in one process, because importing takes seconds."""
    directory, draw = tmp_path_factory.mktemp("kills"), random.Random(11)
    cases = {
        name: {
            "settings": {"steps": STEPS, "keep": 2, **settings},
            "kills": places + [["after", draw.uniform(0.05, 0.9)] for _ in range(RANDOM_KILLS)],
        }
        for name, (settings, places) in CASES.items()
    }
    command = [sys.executable, "-m", "tests.kill_worker", str(directory), json.dumps(cases)]
    # One thread from the start: the parent forks, and a fork must not leave an OpenMP team behind.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return directory, json.loads((directory / "outcome.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_killed_runs_end_with_the_same_bits(killed_runs: tuple[Path, dict[str, list[str]]], case: str) -> None:
    directory, outcome = killed_runs[0] / case, killed_runs[1]
    ends, n_places = outcome[case], len(CASES[case][1])

    # Every child that should kill itself did. A child with a random kill may have finished first.
    assert ends[0] == "done"
    assert ends[1 : 1 + n_places] == ["SIGKILL"] * n_places
    assert set(ends[1 + n_places : -1]) <= {"SIGKILL", "done"}
    assert ends[-1] == "done"

    whole, killed = directory / "whole", directory / "killed"
    kept = list_checkpoints(killed / "checkpoints")
    assert [step_of(path) for path in kept] == [step_of(path) for path in list_checkpoints(whole / "checkpoints")]
    assert step_of(kept[-1]) == STEPS
    for path in kept:
        verify_checkpoint(path)
        assert saved_bytes(path) == saved_bytes(whole / "checkpoints" / path.name)

    # Each step and each evaluation is there once, with the same numbers, and no half-written file is left.
    assert [line["step"] for line in lines(killed / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert curve(killed) == curve(whole)
    assert lines(killed / "eval.jsonl") == lines(whole / "eval.jsonl")
    assert sorted(p.name for p in killed.iterdir()) == sorted(p.name for p in whole.iterdir())
    assert sorted(p.name for p in (killed / "checkpoints").iterdir()) == sorted(p.name for p in kept)
