"""`fastsae sweep`: every cell an ordinary run, measured, resumed bit for bit, in one table, plot and page."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastsae.cli import language
from fastsae.cli.main import main
from fastsae.data.tensor import TensorSource
from fastsae.model.rules import AbsTopK, BatchTopK, GroupMax, HierarchicalTopK, JumpReLU, Matryoshka, ReLU, TopK
from fastsae.report.sweep import write_sweep
from fastsae.runs import sweep
from fastsae.runs.checkpoint import list_checkpoints
from fastsae.runs.config import TrainConfig
from fastsae.runs.evaluate import evaluate
from fastsae.runs.opening import open_rows, open_run
from fastsae.runs.rundir import RunDirError
from fastsae.runs.stopping import NonFiniteError, TrainingInterrupted
from fastsae.runs.sweep import grid, pareto, read_sweep, rule_with_l0, run_sweep
from tests.cli_case import write_text, write_tiny_model
from tests.test_report import Page
from tests.train_case import hooked, rows, saved_bytes

ROOT = Path(__file__).resolve().parent.parent
QUIET = ["--no-progress", "--no-tensorboard"]
STEPS = 6
SETTINGS = ["--steps", str(STEPS), "--batch-size", "100", "--lr", "1e-3", "--log-every", "1", *QUIET]
GRID = ["--rules", "topk", "relu", "--l0s", "3", "6", "--d-sae", "48", "64"]
CONFIG = TrainConfig(steps=8, batch_size=50, lr=1e-3, checkpoint_every=3, eval_every=0, tensorboard=False, threads=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows and the sweep of GRID over them."""
    folder = tmp_path_factory.mktemp("sweep")
    np.save(folder / "rows.npy", rows().numpy())
    assert main(["sweep", str(folder / "rows.npy"), "--out", str(folder / "sweep"), *GRID, *SETTINGS]) == 0
    return folder


def again(place: Path, *more: str, out: str = "sweep") -> int:
    return main(["sweep", str(place / "rows.npy"), "--out", str(place / out), *GRID, *SETTINGS, *more])


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """A command that must fail with one line on stderr, which is returned."""
    capsys.readouterr()
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("fastsae sweep: error: ")
    return captured.err


def without_times(records: dict[str, Any]) -> dict[str, Any]:
    return {name: {k: v for k, v in record.items() if k != "seconds"} for name, record in records.items()}


def cells_of_table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_each_cell_is_the_run_that_train_makes(place: Path) -> None:
    records = read_sweep(place / "sweep")["cells"]
    assert list(records) == [
        f"{rule}-l0_{l0}-d{d}-seed0" for rule in ("topk", "relu") for d in (48, 64) for l0 in (3, 6)
    ]  # fmt: skip
    held_out = open_rows(place / "rows.npy").held_out()
    for name, record in records.items():
        run = open_run(place / "sweep" / record["run"])
        assert run.step == record["step"] == STEPS
        found = evaluate(run.sae, held_out, batch_size=100)
        for key in ("fvu", "l0", "dead_share", "explained_variance", "cosine", "mse"):
            assert record[key] == pytest.approx(getattr(found, key), rel=1e-9), (name, key)
        assert record["n_tokens"] == len(held_out) == 70
    for rule, own in (("topk", ["--k", "3"]), ("relu", ["--target-l0", "3"])):
        alone = place / rule
        command = ["train", str(place / "rows.npy"), "--run-dir", str(alone), "--activation", rule, "--d-sae", "48"]
        assert main([*command, *own, *SETTINGS]) == 0
        last = f"checkpoints/step_{STEPS:08d}"
        assert saved_bytes(alone / last) == saved_bytes(place / "sweep" / "runs" / f"{rule}-l0_3-d48-seed0" / last)


def test_the_table_has_the_records_numbers_and_marks_the_front(place: Path) -> None:
    records = list(read_sweep(place / "sweep")["cells"].values())
    header, _, *lines = cells_of_table((place / "sweep" / "table.md").read_text())
    assert header == ["rule", "latents", "asked L0", "seed", "L0", "FVU", "explained", "cosine", "dead", "seconds",
                      "front"]  # fmt: skip
    assert len(lines) == len(records) == 8
    for line, r in zip(lines, records, strict=True):
        assert line[:4] == [r["rule"], str(r["d_sae"]), f"{r['asked_l0']:g}", "0"]
        numbers = [f"{r['l0']:.2f}", f"{r['fvu']:.4f}", f"{1 - r['fvu']:.4f}", f"{r['cosine']:.4f}"]
        assert line[4:9] == [*numbers, f"{r['dead_share']:.1%}"]
        beaten = any(
            o["l0"] <= r["l0"] and o["fvu"] <= r["fvu"] and (o["l0"], o["fvu"]) != (r["l0"], r["fvu"]) for o in records
        )
        assert line[10] == ("" if beaten else "●")
    assert 0 < sum(line[10] == "●" for line in lines) < 8


def test_the_page_stands_alone_and_links_to_the_runs(place: Path) -> None:
    text = (place / "sweep" / "sweep.html").read_text()
    page = Page(text)
    assert not page.wrong
    assert not page.open
    links = [a["href"] or "" for tag, a in page.tags if tag == "a"]
    assert len(links) == 8
    assert all((place / "sweep" / link).is_dir() for link in links)
    assert {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe"} == set()
    assert page.count("svg") == 1  # nothing was measured in a language model
    assert page.count("tr", "best") == text.count("<td>●</td>") > 0
    everything = "".join(page.text)
    assert "relu" in everything
    assert str(place / "rows.npy") in everything
    svg = (place / "sweep" / "pareto.svg").read_text()
    assert "var(" not in svg
    assert not Page(svg).wrong
    # A report takes the place of the folder as the link's goal.
    name = "topk-l0_3-d48-seed0"
    assert main(["report", str(place / "sweep" / "runs" / name), "--sample", "0", "--no-time-step"]) == 0
    write_sweep(place / "sweep")
    assert f'href="runs/{name}/report.html"' in (place / "sweep" / "sweep.html").read_text()


def test_the_same_command_trains_nothing_and_a_longer_one_what_is_new(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = place / "sweep" / "runs"
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()}
    records = read_sweep(place / "sweep")["cells"]
    capsys.readouterr()
    assert again(place) == 0
    captured = capsys.readouterr()
    assert "8 of 8 cells are already in" in captured.err
    assert len(cells_of_table(captured.out)) == 10
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()} == before
    assert again(place, "--l0s", "3", "--d-sae", "48", "--seeds", "0", "1", "--progress") == 0
    captured = capsys.readouterr()
    assert "2 of 4 cells are already in" in captured.err
    assert "2 cells to train, about " in captured.err
    assert f"{4 * STEPS}/{4 * STEPS}" in captured.err  # one bar over all cells
    longer = read_sweep(place / "sweep")["cells"]
    assert set(longer) - set(records) == {"topk-l0_3-d48-seed1", "relu-l0_3-d48-seed1"}
    assert {name: longer[name] for name in records} == records
    assert longer["topk-l0_3-d48-seed1"]["fvu"] != records["topk-l0_3-d48-seed0"]["fvu"]
    for name in set(longer) - set(records):  # for the other tests
        content = read_sweep(place / "sweep")
        del content["cells"][name]
        (place / "sweep" / sweep.FILE).write_text(json.dumps(content))
    write_sweep(place / "sweep")


def test_other_settings_and_other_rows_are_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sweep", str(place / "rows.npy"), "--out", str(place / "sweep"), *GRID, *SETTINGS]
    message = refused(capsys, [*command, "--lr", "0.5"])
    assert "runs/topk-l0_3-d48-seed0 holds a run with other settings: train.lr is 0.001 there and 0.5 here" in message
    assert "sae.aux_k is null there and 8 here" in refused(capsys, [*command, "--aux-k", "8"])
    np.save(tmp_path / "others.npy", rows().numpy() + 1)
    command[1] = str(tmp_path / "others.npy")
    assert "holds a sweep over other activations: digest is " in refused(capsys, command)
    for content in ("{", "[]", '{"format": 0, "cells": {}}'):
        (tmp_path / "sweep.json").write_text(content)
        command[3] = str(tmp_path)
        assert "sweep.json is no" in refused(capsys, command)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rules", "topk", "topkk"], "no rule 'topkk'; the rules are abs_topk, batch_topk, gated, group_max"),
        (["--l0s", "49"], "TopK has k = 49, expected at most d_sae = 48"),
        (["--l0s", "2.5"], "TopK has k = 2.5, expected a whole number"),
        (["--l0s", "0"], "TopK has k = 0, expected a whole number"),
        (["--rules", "relu", "--l0s", "49"], "ReLU has target_l0 = 49.0, expected at most d_sae = 48"),
        (["--rules", "group_max", "--l0s", "5"], "GroupMax has k = 5 groups, expected a divisor of d_sae = 48"),
        (["--d-sae", "0"], "d_sae is 0, expected at least 1"),
        (["--seeds", "-1"], "seed is -1, expected at least 0"),
        (["--holdout", "0"], "the activations have no held-out rows to measure the runs on"),
        (["--spliced"], "rows.npy does not record where its activations were taken; name the place with --hook"),
    ],
)
def test_bad_input_is_one_line(
    more: list[str], message: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sweep", str(place / "rows.npy"), "--out", str(tmp_path / "new"), *GRID, *SETTINGS, *more]
    assert message in refused(capsys, command)
    assert not (tmp_path / "new" / "runs").exists()


@pytest.mark.parametrize("which", ["rules", "L0s", "sizes d_sae", "seeds"])
def test_an_empty_list_is_refused(which: str) -> None:
    lists: dict[str, Any] = {"rules": ["topk"], "L0s": [3], "sizes d_sae": [48], "seeds": [0]} | {which: []}
    with pytest.raises(ValueError, match=f"the list of {which} is empty"):
        grid(*lists.values(), CONFIG)


def test_every_rule_is_asked_for_its_l0() -> None:
    for name, rule in {
        "topk": TopK(8), "batch_topk": BatchTopK(8), "group_max": GroupMax(8), "abs_topk": AbsTopK(8),
        "relu": ReLU(target_l0=8.0), "jumprelu": JumpReLU(target_l0=8.0),
        "matryoshka": Matryoshka(TopK(8), groups=(2, 4, 8, 16, 34)),
        "matryoshka_batch": Matryoshka(BatchTopK(8), groups=(2, 4, 8, 16, 34)),
        "hierarchical_topk": HierarchicalTopK((2, 4, 8)),
    }.items():  # fmt: skip
        assert rule_with_l0(name, 8.0, 64) == rule
    assert rule_with_l0("hierarchical_topk", 1, 64) == HierarchicalTopK((1,))
    assert rule_with_l0("relu", 2.5, 64) == ReLU(target_l0=2.5)


def test_pareto_against_a_brute_force_version() -> None:
    draw = random.Random(0)
    for n in (0, 1, 2, 5, 30):
        for _ in range(20):  # few values, so that there are ties
            points = [(draw.randint(0, 6) / 2, draw.randint(0, 6) / 4) for _ in range(n)]
            for (x, y), best in zip(points, pareto(points), strict=True):
                lowest_there = min(b for a, b in points if a <= x)
                sparsest_there = min(a for a, b in points if b <= y)
                assert best == (y == lowest_there and x == sparsest_there)
    assert pareto([(1.0, float("nan")), (2.0, 0.5)]) == [False, True]


def small_sweep(folder: Path, source: Any, **more: Any) -> dict[str, Any]:
    cells = grid(["topk", "jumprelu"], [4], [32], [0, 1], CONFIG)
    return run_sweep(cells, source, folder, progress=False, **more)


def source() -> TensorSource:
    return TensorSource(rows(), holdout=100, seed=3)


def interrupted(folder: Path, at: int, signum: signal.Signals) -> None:
    """Stops itself by a signal at the given batch of all that are read."""

    def before(n: int, batch: torch.Tensor) -> None:
        if n == at:
            os.kill(os.getpid(), signum)

    small_sweep(folder, hooked(source(), before))


@pytest.mark.filterwarnings("ignore:.*the run ended at L0")
def test_a_sweep_that_was_stopped_ends_with_the_same_numbers(tmp_path: Path) -> None:
    whole = small_sweep(tmp_path / "whole", source())
    assert len(whole) == 4
    # Four batches of each rule are read to estimate the time, then eight by the first cell.
    with pytest.raises(TrainingInterrupted, match=r"after step 5 of 8.*1 of 4 cells are finished in .*; the same comm"):
        interrupted(tmp_path / "stopped", 8 + 8 + 5, signal.SIGINT)
    assert list(read_sweep(tmp_path / "stopped")["cells"]) == ["topk-l0_4-d32-seed0"]
    # Four batches of jumprelu for the estimate, three that the second cell lacks; the third is killed at its fifth.
    call = f"test_sweep.interrupted(Path({str(tmp_path / 'stopped')!r}), {4 + 3 + 5}, signal.SIGKILL)"
    code = f"import signal; from pathlib import Path; from tests import test_sweep; {call}"
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(read_sweep(tmp_path / "stopped")["cells"]) == 2
    third = tmp_path / "stopped" / "runs" / "jumprelu-l0_4-d32-seed0"
    assert [path.name for path in list_checkpoints(third / "checkpoints")] == ["step_00000003"]
    found = small_sweep(tmp_path / "stopped", source())
    assert without_times(found) == without_times(whole)
    for record in whole.values():
        last = f"{record['run']}/checkpoints/step_{8:08d}"
        assert saved_bytes(tmp_path / "stopped" / last) == saved_bytes(tmp_path / "whole" / last)


def test_a_ctrl_c_while_measuring_loses_only_the_measurement(tmp_path: Path) -> None:
    def stop(sae: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    cells = grid(["topk"], [4], [32], [0], CONFIG)
    further = sweep.Further("more", {"size": 1}, lambda: stop)
    with pytest.raises(KeyboardInterrupt, match="interrupted: 0 of 1 cells are finished"):
        run_sweep(cells, source(), tmp_path, further=further, progress=False)
    checkpoint = list_checkpoints(tmp_path / "runs" / cells[0].name / "checkpoints")[-1]
    before = checkpoint.stat().st_mtime_ns
    for size in (1, 1, 2):  # measured, there already, measured anew
        opened: list[int] = []

        def opening(size: int = size, opened: list[int] = opened) -> sweep.Measure:
            opened.append(size)
            return lambda sae: {"d_sae": sae.d_sae * size}

        further = sweep.Further("more", {"size": size}, opening)
        had = read_sweep(tmp_path)["cells"].get(cells[0].name, {}).get("more", {}).get("asked")
        found = run_sweep(cells, source(), tmp_path, further=further, progress=False)[cells[0].name]
        assert found["more"] == {"asked": {"size": size}, "d_sae": 32 * size}
        assert opened == ([] if had == {"size": size} else [size])
    assert checkpoint.stat().st_mtime_ns == before


def test_a_constant_run_is_extended_and_a_cell_without_its_folder_made_again(tmp_path: Path) -> None:
    def run(steps: int) -> dict[str, Any]:
        config = TrainConfig(steps=steps, batch_size=50, decay="constant", tensorboard=False)
        return run_sweep(grid(["topk"], [4], [32], [0], config), source(), tmp_path, progress=False)

    (name, record), = run(4).items()  # fmt: skip
    assert run(4)[name] == record
    assert run(6)[name]["step"] == 6
    (tmp_path / "runs" / name).rename(tmp_path / "moved")
    assert run(6)[name]["step"] == 6
    assert (tmp_path / "runs" / name).is_dir()


def test_a_cell_that_fails_does_not_stop_the_others(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_cell = sweep.run_cell

    def failing(cell: sweep.Cell, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        if cell.rule_name == "topk":
            raise NonFiniteError("step 3: the loss is not finite", 3)
        return run_cell(cell, *arguments, **keywords)

    monkeypatch.setattr(sweep, "run_cell", failing)
    more = ["--l0s", "6", "--d-sae", "48"]
    assert again(place, *more, out="failing") == 1
    captured = capsys.readouterr()
    assert "topk-l0_6-d48-seed0 failed: step 3: the loss is not finite" in captured.err
    _, _, *lines = cells_of_table(captured.out)
    assert [line[4:6] == ["failed", "–"] for line in lines] == [True, False]
    assert "topk-l0_6-d48-seed0 failed" in (place / "failing" / "sweep.html").read_text()
    monkeypatch.undo()
    assert again(place, *more, out="failing") == 0
    records, once = (read_sweep(place / folder)["cells"] for folder in ("failing", "sweep"))
    assert without_times(records)["topk-l0_6-d48-seed0"] == without_times(once)["topk-l0_6-d48-seed0"]


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    from fastsae.runs.rundir import RunLock

    with RunLock(tmp_path), pytest.raises(RunDirError, match=f"{tmp_path} is in use by pid"):
        small_sweep(tmp_path, source())


def test_in_the_language_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    write_tiny_model(tmp_path / "model", head=True)
    write_text(tmp_path / "text.txt")
    text = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--hook", "1", "--window", "32"]
    sizes = ["--rows", "1000", "--holdout", "200", "--model-dtype", "float32", "--dtype", "float32", "--no-progress"]
    assert main(["harvest", str(tmp_path / "acts"), *text, *sizes]) == 0
    command = [
        "sweep",
        str(tmp_path / "acts"),
        "--out",
        str(tmp_path / "sweep"),
        *GRID,
        "--l0s",
        "3",
        "--d-sae",
        "48",
        *SETTINGS,
    ]
    loads = []
    load_for = language.load_for
    monkeypatch.setattr(language, "load_for", lambda *a, **k: loads.append(a) or load_for(*a, **k))
    assert main(command) == 0
    assert not loads
    steps = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep" / "runs").glob("*/checkpoints/*")}
    assert main([*command, "--spliced"]) == 0  # trained already: only measured
    assert main([*command, "--spliced"]) == 0
    assert len(loads) == 1
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep" / "runs").glob("*/checkpoints/*")} == steps
    records = read_sweep(tmp_path / "sweep")["cells"]
    header, _, *lines = cells_of_table((tmp_path / "sweep" / "table.md").read_text())
    assert header[-4:] == ["CE", "CE rise", "recovered", "front"]
    for record, line in zip(records.values(), lines, strict=True):
        run = tmp_path / "sweep" / record["run"]
        assert main(["eval", str(run), "--spliced", "--no-progress"]) == 0
        loss = json.loads((run / "evaluation_spliced.json").read_text())["spliced"]
        for key in ("ce_untouched", "ce_spliced", "ce_mean", "kl_spliced", "recovered_over_mean"):
            # A share is undefined, and None, where the ablation costs nothing.
            wanted = None if loss[key] is None else pytest.approx(loss[key], rel=1e-6)
            assert record["spliced"][key] == wanted
        for key in ("special", "replaced_share", "n_windows", "model", "text", "hooks"):
            assert record["spliced"][key] == loss[key]
        rise = loss["ce_spliced"] - loss["ce_untouched"]
        assert line[-4:-2] == [f"{loss['ce_spliced']:.4f}", f"{rise:+.4f}"]
    page = (tmp_path / "sweep" / "sweep.html").read_text()
    assert "Cross-entropy against L0" in page
    assert page.count("<svg") == 2
    assert (tmp_path / "sweep" / "pareto.svg").read_text().count("<svg") == 3  # both, in one
    assert main([*command, "--text-tokens", "64"]) == 0
    assert all(r["spliced"]["n_windows"] == 2 for r in read_sweep(tmp_path / "sweep")["cells"].values())
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "transformers", None)
    capsys.readouterr()
    assert main([*command, "--spliced", "--seeds", "1"]) == 1
    assert "pip install 'fastsae-engine[lm]'" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "sweep" / "runs" / "topk-l0_3-d48-seed1").exists()  # before any training
