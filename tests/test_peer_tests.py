"""bench.peer_tests: what a run of another library's tests counts, and that docs/interop.md shows the stored result."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bench.peer_tests import page, plugin, run
from bench.peer_tests.__main__ import main, sources
from bench.peer_tests.libraries import EXPLAINED, LIBRARIES, Library, named

ROOT = Path(__file__).resolve().parent.parent


def line(outcome: str, ops: int = 0, why: str | None = None) -> dict[str, Any]:
    return {"outcome": outcome, "why": why, "objects": {"SAE": 1} if ops else {}, "refused": {}, "ops": ops}


def test_only_what_passes_with_theirs_counts() -> None:
    theirs = {"a": line("passed"), "b": line("passed"), "c": line("failed", why="no GPU"), "d": line("passed")}
    ours = {"a": line("passed", ops=2), "b": line("failed", ops=1, why="wrong"), "c": line("passed", ops=1)}
    found = run.compare(theirs, ours)
    assert (found["theirs"], found["ours"], found["met"]) == (3, 1, 2)
    assert found["differs"] == {"b": "wrong", "d": "it was not reached"}
    assert found["not_run"] == {"c": "no GPU"}
    assert found["objects"] == {"SAE": 3}


def entry(**files: dict[str, Any]) -> dict[str, Any]:
    return {"SPARSIFY": {"distribution": "a", "version": "2", "tests_of": "1", "machine": {}, "files": files}}


def test_the_table_says_what_differs_and_which_file_proves_nothing() -> None:
    ours = {"a": line("passed", 1), "b": line("failed", 1, "no")}
    met = run.compare({"a": line("passed"), "b": line("passed")}, ours)
    unmet = run.compare({"a": line("passed")}, {"a": line("passed")})
    for its in (met, unmet):
        its["cut"] = {}
    found = entry(one=met, two=unmet, three={**unmet, "objects": {"SAE": 1}}, four={**met, "cut": {"theirs": "6 s"}})
    text = page.shown(found)
    assert "| a 2, tests of 1 | `one` | 2 | 1 | 2 | 2 | 1: not explained: no |" in text
    assert "| a 2, tests of 1 | `two` | 1 | 1 | 0 | 0 | no object of an accelerated class |" in text
    assert "| a 2, tests of 1 | `three` | 1 | 1 | 0 | 1 | no op of fastsae runs |" in text
    assert "1: not explained: no; theirs was cut off (6 s) |" in text
    assert page.unexplained(found) == ["SPARSIFY one::b: no", "SPARSIFY four::b: no"]


def test_a_stored_result_keeps_the_other_libraries(tmp_path: Path) -> None:
    path = tmp_path / "tests.json"
    page.store({"A": {"files": {}}}, path)
    page.store({"B": {"files": {}}}, path)
    assert set(page.read(path)) == {"A", "B"}


def test_the_page_is_what_the_stored_result_gives(tmp_path: Path) -> None:
    copy = tmp_path / "page.md"
    copy.write_text(page.PAGE.read_text())
    page.renew(page=copy)
    assert copy.read_text() == page.PAGE.read_text(), "run python -m bench.peer_tests --draw"


def test_every_stored_difference_has_a_reason_and_every_reason_a_difference() -> None:
    stored = page.read()
    assert page.unexplained(stored) == []
    differing = {
        f"{variable} {file}::{test}"
        for variable, its in stored.items()
        for file, tests in its["files"].items()
        for test in tests["differs"]
    }
    assert differing == set(EXPLAINED)
    assert set(stored) == {library.variable for library in LIBRARIES}


def test_the_makefile_knows_every_library() -> None:
    (listed,) = re.findall(r"^CLONES := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert listed.split() == [library.variable for library in LIBRARIES]


def test_a_library_without_a_folder_is_skipped_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.peer_tests.__main__.unavailable", lambda library: None)
    assert sources(named("SAELENS"), {}) == (
        "git clone https://github.com/jbloomAus/SAELens, and give the folder: SAELENS=..."
    )
    assert main(["--only", "SAELENS"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["--tests", "NOTHING=/here"])
    assert "NOTHING is not known" in capsys.readouterr().err


TESTS = """
import pytest
import torch
from sparsify import SparseCoder, SparseCoderConfig

@pytest.fixture
def coder():
    return SparseCoder(8, SparseCoderConfig(num_latents=32, k=4))

def test_an_object_of_a_fixture(coder):
    assert isinstance(coder, SparseCoder)
    assert coder(torch.randn(16, 8)).latent_acts.shape == (16, 4)

def test_without_it():
    assert SparseCoder.__name__ == "SparseCoder"

def test_the_class_itself(coder):
    assert type(coder) is SparseCoder

def test_another_rule():
    SparseCoder(8, SparseCoderConfig(num_latents=32, k=4, activation="groupmax"))

def test_that_fails():
    raise ValueError("as it is")

@pytest.mark.skip
def test_that_is_skipped():
    pass
"""


def test_a_file_of_tests_both_ways(tmp_path: Path) -> None:
    pytest.importorskip("sparsify", exc_type=ImportError)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(TESTS)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "sparsify"\nversion = "0.9"\n')
    # A package beside the tests is not what they import.
    (tmp_path / "sparsify").mkdir()
    (tmp_path / "sparsify" / "__init__.py").write_text("raise ImportError('the sources beside the tests')")
    said: list[str] = []
    found = run.run_library(named("SPARSIFY"), tmp_path, "", said.append)
    its = found["files"]["tests/test_it.py"]
    assert (its["theirs"], its["ours"], its["met"]) == (4, 3, 1)
    assert its["objects"] == {"SparseCoder": 2}
    assert list(its["differs"]) == ["test_the_class_itself"]
    assert its["not_run"] == {"test_that_fails": "ValueError: as it is", "test_that_is_skipped": "skipped"}
    assert len(its["refused"]) == 1
    assert "groupmax" in next(iter(its["refused"]))
    assert found["tests_of"] == "0.9"
    assert said == ["SPARSIFY tests/test_it.py: 4 pass with theirs, 3 with ours"]


def test_a_file_that_kills_its_process_is_said_to_be_cut_off(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("import os\ndef test_a(): pass\ndef test_b(): os._exit(9)\n")
    found, cut = run.run_file(named("SPARSIFY"), tmp_path, "test_it.py", False)
    assert (list(found), cut) == (["test_a"], "exit status 9")


@pytest.mark.long
def test_a_file_that_takes_too_long_counts_as_far_as_it_got(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SECONDS", 20)
    (tmp_path / "test_it.py").write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(600)\n")
    found, cut = run.run_file(named("SPARSIFY"), tmp_path, "test_it.py", False)
    assert cut == "20 s"
    assert {name: its["outcome"] for name, its in found.items()} == {"test_a": "passed"}


def test_a_package_without_its_init_and_a_name_of_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_peer").mkdir()
    (tmp_path / "a_peer" / "__init__.py").write_text("raise ImportError('an image model is not installed')")
    (tmp_path / "a_peer" / "part.py").write_text("def load_both(): return 7")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("a_peer", "a_peer.part"):  # what is not there before the test is gone after it
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.delitem(sys.modules, name)
    library = Library("A", "a_peer", "a-peer", (), bare=True, renamed={"a_peer.part:load": "load_both"}, seeded=True)
    plugin.adapt(library)
    assert importlib.import_module("a_peer.part").load() == 7
    assert library.adapted() == [
        "`load` is `load_both`",
        "`a_peer/__init__.py` is not run",
        "each test begins with `torch.manual_seed(0)`",
    ]


DRAWING = """
import pytest
import torch

SEEN = []

@pytest.fixture
def drawn():
    return torch.rand(())

def test_a(drawn):
    SEEN.append(drawn)

@pytest.mark.parametrize("more", (5, 6))
def test_b(drawn, more):
    assert drawn == SEEN[0]
    torch.rand(more)
"""


def test_each_test_of_a_seeded_library_gets_the_same_random_numbers(tmp_path: Path) -> None:
    library = named("OVERCOMPLETE")
    if importlib.util.find_spec(library.package) is None:
        pytest.skip("overcomplete is not installed")
    (tmp_path / "test_it.py").write_text(DRAWING)
    found, cut = run.run_file(library, tmp_path, "test_it.py", False)
    assert ([its["outcome"] for its in found.values()], cut) == (["passed"] * 3, None)
