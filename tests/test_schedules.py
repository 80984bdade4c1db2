"""Schedules by hand-computed multipliers, as ints, as tensors, and in torch's own LambdaLR."""

from __future__ import annotations

import math

import pytest
import torch

from fastsae.runs.schedules import Schedule


def test_warm_up_rises_in_equal_steps_and_ends_at_one():
    schedule = Schedule(total=10, warmup=4)
    assert [schedule(t) for t in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert Schedule(total=10)(0) == 1.0


def test_linear_decay_over_the_last_fraction():
    schedule = Schedule(total=10, decay="linear", decay_fraction=0.4)
    assert schedule.start == 6
    assert [schedule(t) for t in range(5, 12)] == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0])


def test_cosine_decay_to_a_floor():
    schedule = Schedule(total=8, decay="cosine", decay_fraction=1.0, floor=0.1)
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * t / 8)) / 2 for t in range(8)]
    assert [schedule(t) for t in range(8)] == pytest.approx(expected)
    assert schedule(100) == pytest.approx(0.1)


def test_warm_up_and_decay_overlap_as_a_product():
    schedule = Schedule(total=4, warmup=4, decay="linear", decay_fraction=1.0)
    assert [schedule(t) for t in range(4)] == pytest.approx([0.25, 0.5 * 0.75, 0.75 * 0.5, 0.25])


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_a_tensor_step_gives_the_same_number_as_a_tensor(decay):
    schedule = Schedule(total=20, warmup=3, decay=decay, decay_fraction=0.5, floor=0.05)
    for t in (0, 1, 2, 5, 10, 15, 19, 25):
        got = schedule(torch.tensor(t))
        assert got.dtype == torch.float64
        assert got.shape == ()
        assert float(got) == schedule(t)
    # On the meta device a host read would raise.
    assert schedule(torch.zeros((), dtype=torch.int64, device="meta")).device.type == "meta"


def test_lambda_lr_accepts_a_schedule():
    schedule = Schedule(total=6, warmup=2, decay="linear", decay_fraction=0.5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.1 * schedule(t) for t in range(6)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total": 0}, "total is 0"),
        ({"total": 5, "warmup": 6}, "warmup is 6"),
        ({"total": 5, "warmup": -1}, "warmup is -1"),
        ({"total": 5, "decay": "step"}, "decay is 'step', expected one of constant, linear, cosine"),
        ({"total": 5, "decay_fraction": 1.5}, "decay_fraction is 1.5"),
        ({"total": 5, "floor": float("nan")}, "floor is nan"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**settings)
