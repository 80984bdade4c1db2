"""A GPU backend has every stage of backends.gpu.stages, with the name and the arguments declared there."""

from __future__ import annotations

import importlib
import inspect

import pytest

from fastsae.backends.gpu.stages import Stages

WANTED = [name for name, _ in inspect.getmembers(Stages, inspect.isfunction) if not name.startswith("_")]


@pytest.fixture(params=["fastsae.kernels.stages", "fastsae.backends.cuda.stages"], ids=["triton", "cuda"])
def stages(request: pytest.FixtureRequest) -> object:
    try:
        return importlib.import_module(request.param)
    except ImportError as error:
        pytest.skip(f"the backend is not here: {error}")


@pytest.mark.parametrize("name", WANTED)
def test_a_stage_has_the_signature_of_the_protocol(name: str, stages: object) -> None:
    wanted, given = inspect.signature(getattr(Stages, name)), inspect.signature(getattr(stages, name))
    without_self = wanted.replace(parameters=list(wanted.parameters.values())[1:])
    assert str(given) == str(without_self)


def test_a_backend_has_no_stage_outside_the_protocol(stages: object) -> None:
    assert sorted(stages.__all__) == sorted({*WANTED, "ROW_LIMIT"})
