"""Numbers that are not finite: a run skips such a batch, names the rows of the data, and saves no bad number."""

from __future__ import annotations

import math
import re
import signal
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsae.report import ReportOptions, write_report
from fastsae.runs.checkpoint import read_state
from fastsae.runs.stopping import SKIPS_IN_A_ROW, NonFiniteError, SkipGuard, TrainingInterrupted
from fastsae.runs.trainer import Trainer
from fastsae.training.skipped import say_rows, worst_rows
from tests.test_faults import Hook, at, saved_steps
from tests.train_case import config, curve, lines, module, saved_bytes, source, trainer

NAN = float("nan")


def spoil(batches: int | Sequence[int], rows: list[int], value: float) -> Hook:
    spoilt = [batches] if isinstance(batches, int) else batches

    def hook(calls: int, batch: Tensor) -> Tensor | None:
        if calls not in spoilt:
            return None
        batch = batch.clone()
        batch[rows, 3] = value
        return batch

    return hook


def without(left_out: Sequence[int], **settings: Any) -> Any:
    """A source that leaves out the batches with these numbers (from 1)."""
    data = source()
    draw, calls = data.next_batch, 0

    def next_batch(n: int) -> Tensor:
        nonlocal calls
        while (calls := calls + 1) in left_out:
            draw(n)
        return draw(n)

    data.next_batch = next_batch
    return data


def told(seen: list[warnings.WarningMessage]) -> list[str]:
    """What is said of skipped steps, by the run or by its optimizer."""
    return [str(w.message) for w in seen if "changed nothing" in str(w.message)]


# -- a step skips -----------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("how", [{"moments": "fp32"}, {"moments": "bf16"}, {"fused": False}], ids=str)
@pytest.mark.parametrize(
    ("bad", "value"),
    # The last case: nine in a row, a good batch, and two more. That is not ten in a row.
    [([10], NAN), ([10], float("inf")), ([10], 3e38), ([1], NAN), ([1], -float("inf")), ([*range(8, 17), 18, 19], NAN)],
)
def test_a_bad_batch_acts_like_a_batch_left_out(
    tmp_path: Path, bad: list[int], value: float, how: dict[str, Any]
) -> None:
    settings = {"decay": "constant", **how}
    run = trainer(tmp_path / "run", spoil(bad, [5, 6, 40], value), **settings)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = run.run()
    assert result.step == 30
    assert all(bool(torch.isfinite(p).all()) for p in run.sae.parameters())
    other = Trainer(module(), without(bad), config(steps=30 - len(bad), **settings), tmp_path / "other").run()
    assert saved_bytes(result.checkpoint) == saved_bytes(other.checkpoint)

    rows = "the loss or a gradient is not finite although the rows are"
    if value != 3e38:
        rows = "3 of 48 rows of activations hold NaN or infinity, the first is row 5 of the batch"
    assert [text[: text.index(". The")] for text in told(seen)] == [f"step {bad[0]}: {rows}"]
    written = lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["skipped"] for line in written] == [sum(b <= step for b in bad) for step in range(1, 31)]
    assert [line["step"] for line in written if line["loss"] is None or line["loss"] > 1e30] == bad
    assert {line["redone_share"] for line in written} == {0}
    assert saved_steps(tmp_path / "run") == [21, 28, 30]


def test_skipped_steps_are_saved_and_reported(tmp_path: Path) -> None:
    """A run that was stopped and resumed gives the bits and lines of an uninterrupted one, skipped steps included."""
    bad = spoil([4, 9, 20], [7], NAN)
    settings = {"tensorboard": True, "k_start": 12, "k_anneal": 25}
    with pytest.warns(RuntimeWarning, match="step 4: 1 of 48 rows"):
        whole = trainer(tmp_path / "whole", bad, **settings).run()

    def stop_at_12(calls: int, batch: Tensor) -> Tensor | None:
        at(12, lambda: signal.raise_signal(signal.SIGTERM))(calls, batch)
        return bad(calls, batch)

    with pytest.warns(RuntimeWarning, match="step 4: 1 of 48 rows"), pytest.raises(TrainingInterrupted):
        trainer(tmp_path / "run", stop_at_12, **settings).run()
    assert read_state(tmp_path / "run/checkpoints/step_00000012")["optimizer"]["skipped"] == 2
    with pytest.warns(RuntimeWarning, match="step 20: 1 of 48 rows"):
        resumed = trainer(tmp_path / "run", lambda calls, x: bad(calls + 12, x), **settings).run()
    assert saved_bytes(resumed.checkpoint) == saved_bytes(whole.checkpoint)
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    for run in ("run", "whole"):
        assert [line["skipped"] for line in lines(tmp_path / run / "metrics.jsonl")][3:20:4] == [1, 1, 2, 2, 3]
    page = write_report(tmp_path / "run", options=ReportOptions(sample=0, time_step=False)).read_text()
    assert "steps that changed nothing" in page


@pytest.mark.parametrize("log_every", [1, 7])
def test_ten_in_a_row_end_a_run_and_nothing_is_lost(tmp_path: Path, log_every: int) -> None:
    n = SKIPS_IN_A_ROW
    assert n == 10
    run = trainer(tmp_path / "run", spoil(range(10, 30), [5, 40], NAN), log_every=log_every)
    with pytest.warns(RuntimeWarning), pytest.raises(NonFiniteError) as caught:
        run.run()
    assert caught.value.step == 10
    assert str(caught.value).startswith(
        "step 10: 2 of 48 rows of activations hold NaN or infinity, the first is row 5 of the batch. "
        "From there to step 19, 10 steps in a row changed nothing"
    )
    assert saved_steps(tmp_path / "run") == [7, 14, 19]
    kept = tmp_path / "run/checkpoints"
    assert saved_bytes(kept / "step_00000014") == saved_bytes(kept / "step_00000019")
    assert all(bool(torch.isfinite(p).all()) for p in run.sae.parameters())
    assert [line["step"] for line in lines(tmp_path / "run/metrics.jsonl")] == list(range(log_every, 20, log_every))
    with pytest.warns(RuntimeWarning, match="step 20: the loss or a gradient"):
        again = trainer(tmp_path / "run", spoil(range(1, n), [0], 3e38), log_every=log_every).run()  # nine are not ten
    assert again.step == 30
    assert again.metrics["skipped"] == 19


def test_a_run_that_begins_with_bad_batches_only_ends_before_its_first_step(tmp_path: Path) -> None:
    run = trainer(tmp_path, spoil(range(1, 30), [5], NAN))
    with pytest.raises(NonFiniteError, match=r"step 1: 1 of 48 rows .*, the first is row 5 of the batch, and each of"):
        run.run()
    assert saved_steps(tmp_path) == []
    assert not run.sae.b_dec.any()
    with pytest.raises(RuntimeError, match="stopped at step 0 before a checkpoint; make a new Trainer"):
        run.run()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("value", [NAN, 3e38])
def test_the_end_names_the_rows_of_the_data(tmp_path: Path, value: float, fused: bool) -> None:
    """The source's own rows are spoilt: the row that the message names is one of them."""
    data = source()
    data.x = data.x.clone()
    data.x[::3, 2] = value
    settings = {"init_b_dec": "zero", "eval_every": 0, "fused": fused}
    run = Trainer(module(), data, config(**settings), tmp_path)
    with pytest.warns(RuntimeWarning), pytest.raises(NonFiniteError) as caught:
        run.run()
    named = [int(number) for number in re.findall(r"is row (\d+) of the tensor", str(caught.value))]
    bad = math.isnan(value)
    assert len(named) == (5 if bad else 1)
    assert all(number % 3 == 0 for number in named)
    assert ("; and " in str(caught.value)) == bad


def test_the_worst_rows_are_the_bad_ones_and_then_the_largest() -> None:
    x = torch.ones(9, 3)
    x[2, 1], x[7, 0], x[4, 2] = float("inf"), NAN, -50.0
    bad, worst = worst_rows(x)
    assert int(bad) == 2
    assert worst[:3].tolist() == [2, 7, 4]
    big = torch.full((4, 8), 1e38)  # whose sum overflows
    assert int(worst_rows(big)[0]) == 0
    assert say_rows(x) == "2 of 9 rows of x hold NaN or infinity: 2, 7"
    assert say_rows(x[3:7].reshape(2, 2, 3)) == "the rows of x are finite, and the largest is row 1"
    assert say_rows(torch.ones(9, 2), x) == "2 of 9 rows of x hold NaN or infinity: 2, 7"


def test_off_the_cpu_skips_are_recorded_and_reported_when_numbers_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of other devices, run on CPU tensors."""

    def step(x: Tensor, number: int) -> None:
        nonlocal skipped
        skipped += int(not bool(torch.isfinite(x).all()))
        guard.look_at_input(x)
        guard.look_at_metrics({"skipped": torch.tensor(skipped)}, number)

    good, bad = torch.ones(6, 4), torch.ones(6, 4)
    bad[1, 2], bad[4, 0] = NAN, float("inf")
    guard, skipped = SkipGuard(torch.device("meta"), 3), 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, x in enumerate([good, *[bad] * 9, good, *[bad] * 12, good], start=1):
            step(x, number)
        assert guard.ended is None
    reads, to_list = [], Tensor.tolist
    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "tolist", lambda t: reads.append(t.shape) or to_list(t))
        with pytest.warns(RuntimeWarning, match="step 2: 2 of 6 rows of activations .* row 1 of the batch") as seen:
            guard.read()
    assert len(seen) == 1
    assert len(reads) == 1, "each read waits for the device"
    assert guard.ended is not None
    assert guard.ended.step == 12
    assert "From there to step 21, 10 steps in a row" in str(guard.ended)

    monkeypatch.setattr("fastsae.runs.stopping.READ_AFTER", 4)
    guard = SkipGuard(torch.device("meta"), skipped)
    for number, x in enumerate([good, bad, good], start=1):
        step(x, number)
    with pytest.warns(RuntimeWarning, match="step 2: 2 of 6"):
        step(good, 4)


# -- nothing bad is saved or measured ---------------------------------------------------------------------------------


def test_a_parameter_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    run = trainer(tmp_path)

    def spoil_after_the_update(x: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        metrics = update(x, target)
        if run.step == 13:
            with torch.no_grad():
                run.sae.b_enc[7] = float("inf")
        return metrics

    make_step = run._make_step

    def patched() -> object:
        nonlocal update
        update = make_step()
        spoil_after_the_update.state_dict = update.state_dict  # type: ignore[attr-defined]
        spoil_after_the_update.skipped = update.skipped  # type: ignore[attr-defined]
        return spoil_after_the_update

    update: Callable[[Tensor, Tensor | None], dict[str, Tensor]]
    run._make_step = patched  # type: ignore[method-assign, assignment]
    with pytest.raises(
        NonFiniteError, match="after step 14 the parameter b_enc holds NaN or infinity; it is not saved"
    ):
        run.run()
    assert saved_steps(tmp_path) == [7]


def test_nan_in_the_held_out_rows_is_named(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    held_out = run.source.held_out().clone()
    held_out[4, 1] = float("nan")
    run.source.held_out = lambda: held_out  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="hold 1 rows with NaN or infinity, the first is row 4"):
        run.run()
    assert saved_steps(tmp_path) == [7]


def test_a_finite_target_that_is_wider_than_x_is_named_as_finite() -> None:
    x, target = torch.ones(3, 2, dtype=torch.float16), torch.ones(3, 2)
    target[1] = 1e6
    assert say_rows(x, target) == "the rows of x are finite, and the largest is row 1"
    x[2, 0] = NAN
    assert say_rows(x, target) == "1 of 3 rows of x hold NaN or infinity: 2"
