"""What goes wrong easily where processes share an SAE: exchanges off the usual way, and what has to be refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests import parallel_faults_worker as worker
from tests.test_parallel import launch

SHAPES = ("2x1", "1x2")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def of(shape: str) -> list[dict[str, Any]]:
        out = tmp_path_factory.mktemp(shape)
        launch(2, str(out / "store"), str(out), shape, module="tests.parallel_faults_worker")
        return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2)]

    return of


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", worker.NUMBERS)
def test_one_processs_numbers(case: str, shape: str, ranks: Any) -> None:
    close = {"rtol": 1e-4, "atol": 1e-6} if case == "scaled rate" else {"rtol": 1e-9, "atol": 1e-11}
    for rank in ranks(shape):
        found = rank["found"][case]
        assert found["said"] is None, found["said"]
        for name, t in rank["expected"][case].items():
            if name in found["found"]:
                torch.testing.assert_close(found["found"][name], t, **close, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("shape", "case"), [(shape, case) for shape in SHAPES for case in worker.REFUSED[shape]])
def test_refused_in_every_process(shape: str, case: str, ranks: Any) -> None:
    for rank in ranks(shape):
        found = rank["found"][case]
        assert found["said"] is not None, f"it did instead: {found['found']}"
        assert "gloo" not in found["said"]
        if case.startswith("a run's"):
            assert "the processes of a run need the same settings and data" in found["said"]
