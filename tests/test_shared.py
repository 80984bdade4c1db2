"""SAEs at several hooks of one live stream, trained in step: each is the run that it would have been alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsae.data import LiveSource
from fastsae.data.hooks import HookedModel
from fastsae.data.shared import SharedSource
from fastsae.runs.checkpoint import list_checkpoints
from fastsae.runs.trainer import Trainer, run_together
from tests.data_case import D_IN, toy_config, toy_corpus, toy_model
from tests.train_case import config, curve, module, saved_bytes

HOOKS = (1, "mlp.2")


def live() -> LiveSource:
    return LiveSource(toy_model(), toy_corpus(), toy_config(hook=HOOKS), buffer_rows=400)


def trainers(folder: Path, stop: int | None = None, **settings: Any) -> list[Trainer]:
    """stop: the second one's 10th step raises, as a kill would."""
    found = []
    for number, reader in enumerate(SharedSource(live()).readers):
        sae = module(d_in=D_IN)

        def after(number: int = number) -> None:
            if number == 1 and stop is not None and found[1].step == stop:
                raise RuntimeError("killed")

        found.append(Trainer(sae, reader, config(**settings), folder / str(number), after_step=after))
    return found


def test_readers_see_their_columns_of_one_stream_whatever_their_pace() -> None:
    whole = live()
    rows = whole.next_batch(3000)
    shared = SharedSource(live())
    first, second = shared.readers
    assert (first.d_in, second.d_in) == (D_IN, D_IN)
    assert torch.equal(first.held_out(), whole.held_out()[:, :D_IN])
    at = [0, 0]
    kept: list[Any] = []
    for who, n in [(0, 30), (1, 30), (1, 200), (0, 7), (1, 1), (0, 400), (0, 900), (1, 1000), (0, 100)]:
        reader = shared.readers[who]
        assert torch.equal(reader.next_batch(n), rows[at[who] : at[who] + n, reader.columns])
        at[who] += n
        kept.append((who, at[who], json.loads(json.dumps(reader.state_dict()))))
    for who, place, state in kept:  # back and forth, here and in another process
        for readers in (shared.readers, SharedSource(live()).readers):
            readers[who].load_state_dict(state)
            assert torch.equal(readers[who].next_batch(50), rows[place : place + 50, readers[who].columns])
    with pytest.raises(ValueError, match="belongs to another source: columns is"):
        first.load_state_dict(second.state_dict())
    with pytest.raises(ValueError, match="train transcoders one by one"):
        SharedSource(LiveSource(toy_model(), toy_corpus(), toy_config(hook=1), target=2, buffer_rows=400))


def test_readers_in_step_hold_one_batch_and_share_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes, parts = [], HookedModel.parts
    monkeypatch.setattr(HookedModel, "parts", lambda self, ids: passes.append(1) or parts(self, ids))
    alone, shared = live(), SharedSource(live())
    passes.clear()
    alone.next_batch(2000)
    once = len(passes)
    for _ in range(40):
        for reader in shared.readers:
            reader.next_batch(50)
            assert shared._end - shared._begin <= 100
    assert len(passes) == 2 * once


@pytest.mark.parametrize("settings", [{}, {"resample_at": (9,), "resample_rows": 100}])
def test_each_is_the_run_it_would_have_been_alone(tmp_path: Path, settings: dict[str, Any]) -> None:
    results = run_together(trainers(tmp_path / "together", **settings))
    for number, result in enumerate(results):
        (alone,) = [trainers(tmp_path / "alone", **settings)[number]]
        expected = alone.run()
        assert result.step == expected.step == 30
        assert saved_bytes(result.checkpoint) == saved_bytes(expected.checkpoint)
        assert curve(tmp_path / "together" / str(number)) == curve(tmp_path / "alone" / str(number))


@pytest.mark.parametrize("stop", [3, 14, 29])
def test_they_go_on_to_the_same_bits_after_a_stop_between_two_checkpoints(tmp_path: Path, stop: int) -> None:
    """At step 14 the first has just saved a checkpoint, and the second has not."""
    whole = run_together(trainers(tmp_path / "whole"))
    with pytest.raises(RuntimeError, match="killed"):
        run_together(trainers(tmp_path / "cut", stop=stop))
    saved = [[path.name for path in list_checkpoints(tmp_path / "cut" / str(i) / "checkpoints")] for i in (0, 1)]
    assert (saved[0] != saved[1]) == (stop == 14)
    again = run_together(trainers(tmp_path / "cut"))
    for a, b in zip(again, whole, strict=True):
        assert saved_bytes(a.checkpoint) == saved_bytes(b.checkpoint)
    done = run_together(trainers(tmp_path / "cut"))
    assert [result.checkpoint for result in done] == [result.checkpoint for result in again]
