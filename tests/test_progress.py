"""Progress in a log: lines, rarely, and none where it is off."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fastsae import progress
from fastsae.data import harvest
from tests.data_case import toy_config, toy_corpus, toy_model


@pytest.mark.parametrize("seconds", [0.0, 3600.0])
def test_a_bar_in_a_log_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seconds: float
) -> None:
    assert not sys.stderr.isatty()
    monkeypatch.setattr(progress, "LOG_SECONDS", seconds)
    with progress.bar(40, "tok", True, what="harvest") as shown:
        for _ in range(40):
            shown.update()
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("harvest: ") for line in lines)
    assert lines[-1].startswith("harvest: 100%")
    assert len(lines) > 30 if seconds == 0 else len(lines) <= 3
    with progress.bar(40, "tok", False) as shown:
        shown.update(40)
    assert capsys.readouterr().err == ""


def test_a_harvest_shows_its_progress_in_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harvest(toy_model(), toy_corpus(), tmp_path / "a", toy_config(), rows=300)
    err = capsys.readouterr().err
    assert err.startswith("harvest:   0%|")
    assert err.count("\n") == 2, "more lines than the first and the last, in less than 30 seconds"
    assert "\r" not in err
    harvest(toy_model(), toy_corpus(), tmp_path / "b", toy_config(), rows=300, progress=False)
    assert capsys.readouterr().err == ""
