"""Numbers that are not finite: a run stops before they reach a parameter or a checkpoint, naming step and rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastsae.runs.stopping import FiniteGuard, NonFiniteError
from tests.test_faults import Hook, saved_steps
from tests.train_case import lines, trainer


def spoil(n: int, rows: list[int], value: float) -> Hook:
    def hook(calls: int, batch: Tensor) -> Tensor | None:
        if calls != n:
            return None
        batch = batch.clone()
        batch[rows, 3] = value
        return batch

    return hook


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("fused", [True, False])
def test_bad_rows_stop_a_run_before_they_touch_a_parameter(tmp_path: Path, value: float, fused: bool) -> None:
    run = trainer(tmp_path / "run", spoil(10, [5, 6, 40], value), fused=fused)
    with pytest.raises(NonFiniteError) as caught:
        run.run()
    assert caught.value.step == 10
    assert str(caught.value).startswith("step 10: 3 of 48 rows of activations hold NaN or infinity, the first is row 5")
    assert all(bool(torch.isfinite(p).all()) for p in run.sae.parameters())
    assert saved_steps(tmp_path / "run") == [7]
    assert [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 10))


@pytest.mark.parametrize("batch", [1, 4])
def test_a_second_run_after_bad_rows_ahead_of_the_first_checkpoint_is_refused(tmp_path: Path, batch: int) -> None:
    run = trainer(tmp_path, spoil(batch, [5], float("nan")))
    with pytest.raises(NonFiniteError):
        run.run()
    with pytest.raises(RuntimeError, match=f"stopped at step {batch - 1} before a checkpoint; make a new Trainer"):
        run.run()


def test_rows_whose_sum_overflows_are_not_bad_rows() -> None:
    big = torch.full((4, 8), 1e38)
    assert not torch.isfinite(big.sum())
    FiniteGuard(torch.device("cpu")).look_at_input(big, 1)


def test_a_loss_that_overflows_stops_a_run(tmp_path: Path) -> None:
    run = trainer(tmp_path, spoil(10, [0], 3e38))
    with pytest.raises(NonFiniteError, match="step 10: the loss is not finite although the activations are"):
        run.run()
    assert saved_steps(tmp_path) == [7]


def test_a_parameter_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.guard = None  # type: ignore[assignment]

    def spoil_after_the_update(x: Tensor) -> dict[str, Tensor]:
        metrics = update(x)
        if run.step == 13:
            with torch.no_grad():
                run.sae.b_enc[7] = float("inf")
        return metrics

    make_step = run._make_step

    def patched() -> object:
        nonlocal update
        update = make_step()
        spoil_after_the_update.state_dict = update.state_dict  # type: ignore[attr-defined]
        return spoil_after_the_update

    update: Callable[[Tensor], dict[str, Tensor]]
    run._make_step = patched  # type: ignore[method-assign, assignment]
    with pytest.raises(
        NonFiniteError, match="after step 14 the parameter b_enc holds NaN or infinity; it is not saved"
    ):
        run.run()
    assert saved_steps(tmp_path) == [7]


def test_off_the_cpu_bad_numbers_are_noted_and_raised_where_numbers_are_read() -> None:
    """The path of a device without a cheap answer, run on CPU tensors: the first bad step is the one that is named."""
    guard = FiniteGuard(torch.device("cpu"))
    guard._immediate = False
    good, bad = torch.ones(6, 4), torch.ones(6, 4)
    bad[1, 2], bad[4, 0] = float("nan"), float("inf")
    fine, broken = torch.tensor(1.0), torch.tensor(float("nan"))
    guard.look_at_input(good, 1)
    guard.look_at_loss(fine, 1)
    guard.raise_noted()
    guard.look_at_input(bad, 2)
    guard.look_at_loss(broken, 2)
    guard.look_at_input(bad[1:2], 3)
    guard.look_at_loss(broken, 3)
    with pytest.raises(NonFiniteError, match="step 2: 2 rows of activations hold NaN or infinity") as caught:
        guard.raise_noted()
    assert caught.value.step == 2

    guard = FiniteGuard(torch.device("cpu"))
    guard._immediate = False
    guard.look_at_loss(broken, 5)
    guard.look_at_input(bad, 6)
    with pytest.raises(NonFiniteError, match="step 5: the loss is not finite"):
        guard.raise_noted()


def test_nan_in_the_held_out_rows_is_named(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    held_out = run.source.held_out().clone()
    held_out[4, 1] = float("nan")
    run.source.held_out = lambda: held_out  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="hold 1 rows with NaN or infinity, the first is row 4"):
        run.run()
    assert saved_steps(tmp_path) == [7]
