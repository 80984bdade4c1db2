"""Tensor and shard sources: each row once per epoch, held-out rows apart, positions that resume bit-exactly."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from fastsae.data import ActivationSource, ShardError, ShardSource, TensorSource, save_rows
from fastsae.data.source import NamesRows, permutation


def numbered(rows: int, d_in: int = 4) -> torch.Tensor:
    """Rows that encode their number, one base-200 digit in each column: exact in bf16's 8 bits too."""
    ids = torch.arange(rows)
    return torch.stack([ids // 200**i % 200 for i in range(d_in)], dim=1).float()


def ids_of(rows: torch.Tensor) -> list[int]:
    return sum(rows[:, i].long() * 200**i for i in range(rows.shape[1])).tolist()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_rows(tmp_path / "rows", numbered(2500).bfloat16(), holdout=300, rows_per_shard=700)
    return tmp_path / "rows"


def make(kind: str, folder: Path, seed: int = 0) -> TensorSource | ShardSource:
    if kind == "tensor":
        return TensorSource(numbered(2500), holdout=300, seed=seed)
    return ShardSource(folder, seed=seed, buffer_rows=1000, progress=False)


@pytest.mark.parametrize("kind", ["tensor", "shards"])
def test_every_training_row_once_an_epoch_and_no_held_out_row(kind: str, folder: Path) -> None:
    source = make(kind, folder)
    assert isinstance(source, ActivationSource)
    assert source.n_tokens == 2200
    assert source.d_in == 4
    assert sorted(ids_of(source.held_out())) == list(range(2200, 2500))
    orders = []
    for epoch in range(2):
        assert source.stats["epoch"] == epoch
        order = ids_of(torch.cat([source.next_batch(n) for n in (1, 99, 1000, 1099, 1)]))
        assert sorted(order) == list(range(2200))
        orders.append(order)
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])
    assert ids_of(make(kind, folder, seed=1).next_batch(2200)) != orders[0]
    across = source.next_batch(5000)  # more than two epochs at once
    assert across.shape == (5000, 4)
    assert across.dtype == torch.float32


@pytest.mark.parametrize("kind", ["tensor", "shards"])
def test_a_source_names_the_rows_of_a_batch(kind: str, folder: Path) -> None:
    source = make(kind, folder)
    assert isinstance(source, NamesRows)
    kept = []
    for n in (700, 1200, 600, 3):  # the third goes on in the next epoch
        ids = ids_of(source.next_batch(n))
        kept.append((ids, source.origin()))
    for ids, origin in kept:  # long after the batch
        rows = [0, len(ids) // 2, len(ids) - 1]
        for row, name in zip(rows, origin(rows), strict=True):
            number, place = re.fullmatch(r"row ([\d,]+) of (.*)", name).groups()
            shard = re.fullmatch(r".*/shard_(\d+)\.safetensors", place)
            assert (shard is None) == (kind == "tensor")
            assert ids[row] == int(number.replace(",", "")) + (0 if shard is None else 700 * int(shard[1]))


@pytest.mark.parametrize("kind", ["tensor", "shards"])
def test_a_saved_position_gives_bit_identical_batches(kind: str, folder: Path) -> None:
    source = make(kind, folder)
    for turn, served in enumerate((0, 10, 1500, 690, 2200, 37)):
        if served:
            source.next_batch(served)
        state = json.loads(json.dumps(source.state_dict()))
        resumed = make(kind, folder)
        resumed.load_state_dict(state)
        unbroken = make(kind, folder)
        for before in (0, 10, 1500, 690, 2200, 37)[: turn + 1]:
            if before:
                unbroken.next_batch(before)
        expected = [unbroken.next_batch(n) for n in (5, 800, 1700)]
        assert all(torch.equal(resumed.next_batch(len(rows)), rows) for rows in expected)
    other = make(kind, folder, seed=3)
    with pytest.raises(ValueError, match="seed is 0 in it and 3 here"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="cursor below 2,200, got epoch 0, cursor 2200"):
        source.load_state_dict({**state, "epoch": 0, "cursor": 2200})
    with pytest.raises(ValueError, match="no 'source'"):
        source.load_state_dict({})
    with pytest.raises(ValueError, match="n >= 1"):
        source.next_batch(0)


def test_shards_are_shuffled_across_each_other_in_bounded_memory(tmp_path: Path) -> None:
    save_rows(tmp_path, numbered(20_000), holdout=0, rows_per_shard=5000)
    source = ShardSource(tmp_path, buffer_rows=2000)
    first = torch.tensor(ids_of(source.next_batch(2000)))
    assert source._pool is not None
    assert len(source._pool[2]) <= 2000 + 256
    counts = torch.bincount(first // 5000, minlength=4)
    assert (counts > 0).all(), f"the first pool should take rows of every shard, it took {counts.tolist()}"
    # A pool is shuffled: by chance alone about one pair in 2,000 stays in order.
    assert int((first.diff() == 1).sum()) < 20
    assert len(source.held_out()) == 0


def test_a_holdout_of_a_folder_without_one_takes_the_last_rows(tmp_path: Path) -> None:
    save_rows(tmp_path, numbered(1000), holdout=0, rows_per_shard=400)
    source = ShardSource(tmp_path, holdout=300)
    assert source.n_tokens == 700
    assert ids_of(source.held_out()) == list(range(700, 1000))
    assert sorted(ids_of(source.next_batch(700))) == list(range(700))
    with pytest.raises(ValueError, match="got 1000 of 1,000 rows"):
        ShardSource(tmp_path, holdout=1000)


def test_rows_by_id_and_in_order(folder: Path) -> None:
    source = ShardSource(folder, holdout=100)
    wanted = [2199, 0, 2205, 701, 699, 0]
    assert ids_of(source.rows(wanted)) == wanted
    assert list(source.held_out_ids()) == list(range(2200, 2300))
    seen = [(ids, rows) for ids, rows in source.iterate(512)]
    assert [i for ids, _ in seen for i in ids] == list(range(2200))
    assert all(ids_of(rows) == list(ids) for ids, rows in seen)
    with pytest.raises(IndexError, match="from 0 to 2499"):
        source.rows([2500])
    with pytest.raises(ValueError, match="stores 300 held-out rows, holdout asks for 301"):
        ShardSource(folder, holdout=301)
    with pytest.raises(ValueError, match="stored without the text"):
        source.contexts([3])


def test_stored_dtype_is_kept_on_request(folder: Path) -> None:
    source = ShardSource(folder, dtype=None)
    batch = source.next_batch(3)
    assert batch.dtype == source.held_out().dtype == torch.bfloat16
    batch.zero_()  # a batch is the caller's own: writing to it must not reach the pool
    source.load_state_dict({**source.state_dict(), "cursor": 0})
    assert source.next_batch(3).abs().sum() > 0


def test_tensor_source_refuses_what_cannot_be_trained_on() -> None:
    x = numbered(50)
    with pytest.raises(ValueError, match=r"expected a float tensor \(rows, d_in\), got torch.int64 of shape \(50, 4\)"):
        TensorSource(x.long(), holdout=5)
    with pytest.raises(ValueError, match="got 50 of 50 rows"):
        TensorSource(x, holdout=50)
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        TensorSource(x, holdout=5, seed=-1)
    x[17, 2] = float("nan")
    x[30, 0] = float("inf")
    with pytest.raises(ValueError, match="2 of 50 rows hold NaN or inf, first row 17"):
        TensorSource(x, holdout=5)


def test_shard_source_checks_its_arguments(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lazy, eager, size, got 'never'"):
        ShardSource(folder, verify="never")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="buffer_rows must be at least 1"):
        ShardSource(folder, buffer_rows=0)
    with pytest.raises(ShardError, match=r"holds no activations \(no manifest.json\)"):
        ShardSource(tmp_path)


def test_permutations_depend_on_their_key_alone() -> None:
    first = permutation(1000, 3, 1)
    assert torch.equal(first, permutation(1000, 3, 1))
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert not torch.equal(first, permutation(1000, 1, 3))
    assert len(permutation(0, 1)) == 0


def test_the_fixture_holds_filtered_rows_of_a_real_model() -> None:
    from safetensors.torch import load_file

    path = Path(__file__).parent / "fixtures" / "activations.safetensors"
    assert path.stat().st_size <= 2_500_000
    x = load_file(path)["activations"]
    assert x.shape == (2048, 576)
    assert x.dtype == torch.bfloat16
    source = TensorSource(x, holdout=256)
    norms = x.float().norm(dim=1)
    assert 140 < norms.median() < 160
    assert norms.max() < 5 * 149.8
    moment = x.float().pow(2).mean(dim=0)
    assert set(moment.topk(2).indices.tolist()) == {247, 507}
    assert source.next_batch(100).shape == (100, 576)


def test_a_harvest_that_has_not_ended_is_said(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    manifest = ShardSource(folder).manifest
    assert not recwarn
    manifest.complete = False
    manifest.write(folder)
    with pytest.warns(UserWarning, match=r"holds 2,200 rows of a harvest that has not ended, and these are read"):
        ShardSource(folder)
