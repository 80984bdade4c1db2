"""Two processes under DistributedDataParallel train and count as one does; a fused update there is refused."""

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
    for rank in ranks:
        for name, value in expected.items():
            torch.testing.assert_close(
                rank["found"][rule][name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: n + m
            )


def test_a_fused_update_in_several_processes_is_refused(ranks: list[dict]) -> None:
    for rank in ranks:
        assert "this is one of 2 processes" in rank["refused"]
