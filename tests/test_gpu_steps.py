"""A GPU backend has every step of backends.gpu.steps, under the name and with the arguments that are written there."""

from __future__ import annotations

import importlib
import inspect

import pytest

from fastsae.backends.gpu.steps import Steps

WANTED = [name for name, _ in inspect.getmembers(Steps, inspect.isfunction) if not name.startswith("_")]


@pytest.fixture(params=["fastsae.kernels.steps", "fastsae.backends.cuda.steps"], ids=["triton", "cuda"])
def steps(request: pytest.FixtureRequest) -> object:
    try:
        return importlib.import_module(request.param)
    except ImportError as error:
        pytest.skip(f"the backend is not here: {error}")


@pytest.mark.parametrize("name", WANTED)
def test_a_step_has_the_signature_of_the_protocol(name: str, steps: object) -> None:
    wanted, given = inspect.signature(getattr(Steps, name)), inspect.signature(getattr(steps, name))
    without_self = wanted.replace(parameters=list(wanted.parameters.values())[1:])
    assert str(given) == str(without_self)


def test_a_backend_has_no_step_that_nobody_asks_for(steps: object) -> None:
    assert sorted(steps.__all__) == sorted(set(WANTED))
