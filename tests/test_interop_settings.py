"""Settings of other libraries' checkpoints set to what nobody wrote there: an SAE, or one line that names the place."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastsae
from fastsae.model.files import SavedModuleError
from tests.interop_case import CASES, drawer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
ODD = (None, True, 0, -1, 0.5, 1e308, float("nan"), 10**30, "", "x", "topk", [], [1], [[]], ["a"], {}, {"a": 1})


def places(settings: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside, and to the whole."""
    yield at
    entries = (
        settings.items() if isinstance(settings, dict) else enumerate(settings) if isinstance(settings, list) else ()
    )
    for key, value in entries:
        yield from places(value, (*at, key))


def changed(settings: Any, at: tuple[Any, ...], value: Any) -> Any:
    if not at:
        return value
    found = copy.deepcopy(settings)
    inside = found
    for key in at[:-1]:
        inside = inside[key]
    inside[at[-1]] = value
    return found


def complaint(folder: Path) -> str | None:
    """What load says; None where it gives an SAE."""
    try:
        fastsae.load(folder)
    except SavedModuleError as error:
        return str(error)
    return None


@pytest.mark.parametrize("part", ["third", pytest.param("rest", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", CASES)
def test_odd_settings(name: str, part: str, tmp_path: Path) -> None:
    """Every place with a third of the values, another third at the next place and in the next case; or the rest."""
    folder = tmp_path / "sae_L0_4"
    folder.mkdir()
    CASES[name](folder, drawer())
    for path in folder.rglob("*.json"):
        text = path.read_text()
        settings = json.loads(text)
        for number, at in enumerate(places(settings), list(CASES).index(name)):
            for value in (value for i, value in enumerate(ODD) if ((i - number) % 3 == 0) == (part == "third")):
                path.write_text(json.dumps(changed(settings, at, value)))
                said = complaint(folder)
                assert said is None or ("sae_L0_4" in said and "\n" not in said), said
        path.write_text(text)
