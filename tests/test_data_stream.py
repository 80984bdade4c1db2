"""Text through a model: windows, hooks with early exit, filters and their counts, the live source's exact resume."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsae.data import ActivationSource, ActivationStream, LiveSource, TokenCorpus
from fastsae.data.filters import RowFilter
from fastsae.data.hooks import HookedModel
from fastsae.data.shared import SharedSource
from fastsae.data.source import NamesRows
from fastsae.data.windows import WindowStream
from tests.data_case import D_IN, HUGE_TOKEN, VOCABULARY, ToyLayer, ToyModel, toy_config, toy_corpus, toy_model


def residual(model: ToyModel, ids: Tensor, layers: int) -> Tensor:
    """The toy model's residual stream, written out."""
    with torch.no_grad():
        hidden = model.embed(ids)
        hidden[:, 0] *= 1000
        for layer in model.layers[:layers]:
            hidden = hidden + torch.tanh(layer.mlp(hidden))
    return hidden


def test_windows_hold_every_token_in_order() -> None:
    corpus = TokenCorpus(np.arange(1000), piece_tokens=70)
    assert len(corpus) == 15
    stream = WindowStream(corpus, None, range(15), window=12, seed=0, shuffle=False, repeat=False)
    windows = torch.cat([stream.next(n) for n in (1, 20, 70)])
    assert torch.equal(windows.flatten(), torch.arange(83 * 12))  # the last 4 tokens fill no window
    assert len(stream.next(5)) == 0

    shuffled = WindowStream(corpus, None, range(15), window=10, seed=0)
    epoch = shuffled.next(100)
    assert torch.equal(epoch.flatten().sort().values, torch.arange(1000))
    assert not torch.equal(epoch.flatten(), torch.arange(1000))
    again = shuffled.next(100)
    assert shuffled.epoch >= 1
    assert not torch.equal(epoch, again)


@pytest.mark.parametrize("served", [0, 1, 13, 99, 100, 250])
def test_windows_resume_at_any_place(served: int) -> None:
    def stream() -> WindowStream:
        return WindowStream(TokenCorpus(np.arange(1000), piece_tokens=70), None, range(15), window=10, seed=4)

    first, second = stream(), stream()
    first.next(served)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert torch.equal(second.next(150), first.next(150))
    with pytest.raises(ValueError, match="piece 16, but the text has 15 pieces"):
        second.load_state_dict({"epoch": 0, "piece": 16, "offset": 0})


def test_a_text_without_tokens_ends_with_an_error() -> None:
    class Empty:
        def __len__(self) -> int:
            return 3

        def tokens(self, piece: int, tokenizer: object) -> np.ndarray:
            return np.zeros(0, dtype=np.int64)

    with pytest.raises(ValueError, match="the text holds no token"):
        WindowStream(Empty(), None, range(3), window=8, seed=0).next(1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected integer ids"):
        TokenCorpus(np.zeros(5))
    with pytest.raises(ValueError, match="leaves no room"):
        WindowStream(toy_corpus(), None, range(3), window=0, seed=0)


@pytest.mark.parametrize(
    ("hook", "name", "layers", "begun"),
    [
        (0, "layers.0:input", 0, 0),
        (2, "layers.1", 2, 2),
        ("2", "layers.1", 2, 2),
        (3, "layers.2", 3, 3),
        ("layers.0", "layers.0", 1, 1),
        ("model.layers.1", "layers.1", 2, 2),
        ("layers.1.mlp:input", "layers.1.mlp:input", 1, 2),
    ],
)
def test_a_hook_takes_the_right_tensor_and_runs_nothing_after_it(
    hook: int | str, name: str, layers: int, begun: int
) -> None:
    model = ToyModel().train()
    hooked = HookedModel(model, hook)
    ids = torch.randint(VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
    found = hooked(ids)
    assert hooked.name == name
    assert torch.equal(found, residual(model, ids, layers))  # dropout is off
    assert not found.requires_grad
    assert sum(layer.calls for layer in model.layers if isinstance(layer, ToyLayer)) == begun
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model(ids, use_cache=False), residual(model, ids, 3)), "the hook left the model changed"


def test_a_wrong_hook_is_explained() -> None:
    model = ToyModel()
    ids = torch.zeros(2, 5, dtype=torch.int64)
    for hook, message in [
        (4, "has 3 layers: hook must be 0 to 3, got 4"),
        ("layers.7", "no module 'layers.7'; similar names: layers.2, layers.1, layers.0"),
        ("layers.1:middle", "hook is 'layers.1:middle', expected 'input' or 'output'"),
        ("unused", "never reaches unused"),
    ]:
        with pytest.raises(ValueError, match=message):
            HookedModel(model, hook)(ids)
    model.config.num_hidden_layers = 12
    with pytest.raises(ValueError, match=r"cannot find the stack of layers of ToyModel .* 12\); give the hook as a"):
        HookedModel(model, 2)


def test_the_filter_counts_what_it_drops() -> None:
    row_filter = RowFilter("layer 3", n_prefix=2, n_suffix=1, drop_first=True, norm_factor=5.0, nonfinite="drop")
    x = torch.ones(4, 10, 3)
    x[:, :2] = 1e4  # prefix
    x[:, -1] = float("nan")  # suffix: dropped before the check for NaN
    x[1, 5] = 100.0
    x[2, 3, 1] = float("inf")
    x[3, 4] *= 4.9
    ids = torch.arange(40).view(4, 10)
    row_filter.calibrate(x, ids)
    assert row_filter.stats["tokens"] == 0
    assert row_filter.median == pytest.approx(3**0.5)
    assert row_filter.limit == pytest.approx(5 * 3**0.5)
    for rows in (row_filter(x, ids), row_filter(x, ids)):
        assert len(rows) == 26
        assert torch.equal(rows.activations, x[rows.window, rows.position])
        assert (1, 5) not in set(zip(rows.window.tolist(), rows.position.tolist(), strict=True))
        assert (3, 4) in set(zip(rows.window.tolist(), rows.position.tolist(), strict=True))
    stats = row_filter.stats
    assert stats["tokens"] == 80
    assert stats["rows"] == 52
    assert stats["rows_dropped_first"] == 24
    assert stats["rows_dropped_norm"] == stats["rows_dropped_nonfinite"] == 2
    assert stats["largest_norm"] == pytest.approx(100 * 3**0.5)
    assert row_filter.twin().stats["rows"] == 0


def test_nan_is_reported_with_layer_and_place() -> None:
    row_filter = RowFilter("layer 3", n_prefix=0, n_suffix=0, drop_first=True, norm_factor=None, nonfinite="raise")
    x = torch.ones(4, 10, 3)
    row_filter(x, torch.arange(40).view(4, 10))
    x[2, 7, 1] = float("nan")
    x[3, 1] = float("inf")
    message = r"layer 3 gave 2 rows .* in row 67 .*\(window 2 of its batch, position 7, token id 27\)"
    with pytest.raises(ValueError, match=message):
        row_filter(x, torch.arange(40).view(4, 10))
    zeros = RowFilter("layer 3", n_prefix=0, n_suffix=0, drop_first=False, norm_factor=5.0, nonfinite="raise")
    with pytest.raises(ValueError, match=r"median norm at layer 3 is 0.0.*norm_factor None"):
        zeros.calibrate(torch.zeros(2, 4, 3), torch.zeros(2, 4, dtype=torch.int64))


def test_a_stream_gives_the_models_rows_and_keeps_held_out_text_apart() -> None:
    model = toy_model()
    ids = np.arange(60 * 50).reshape(60, 50) % VOCABULARY
    stream = ActivationStream(model, TokenCorpus(ids), toy_config(), repeat=False)
    assert stream.d_in == D_IN
    count = 0
    while (rows := stream.next()) is not None:
        assert torch.equal(rows.activations, residual(model.model, rows.token_ids, 2)[rows.window, rows.position])
        assert (rows.position > 0).all()
        assert (rows.token_ids[rows.window, rows.position] != HUGE_TOKEN).all()
        count += len(rows)
    stats = stream.stats
    assert stats["rows"] == count
    assert stats["tokens"] == count + stats["rows_dropped_first"] + stats["rows_dropped_norm"]
    assert stats["rows_dropped_first"] == stats["tokens"] // 16
    assert 0.01 < stats["rows_dropped_norm"] / stats["tokens"] < 0.03  # one token in 50
    held = stream.held_out()
    assert len(held) == 60
    assert stream.stats == stats
    assert torch.equal(held.activations, stream.held_out().activations)
    # 60 rows of windows with 15 each, and a quarter more: 5 windows of 16 tokens, hence the last 2 documents of 50.
    assert stats["tokens"] == 58 * 50 // 16 * 16


def test_settings_that_make_no_sense_are_refused() -> None:
    for change, message in [
        ({"window": 1}, "window must be at least 2, got 1"),
        ({"holdout": -1}, "holdout must be at least 0"),
        ({"norm_factor": 1.0}, "must be above 1, got 1.0"),
        ({"nonfinite": "ignore"}, "must be 'raise' or 'drop', got 'ignore'"),
        ({"seed": -3}, "seed must be 0 or more, got -3"),
    ]:
        with pytest.raises(ValueError, match=message):
            toy_config(**change)
    with pytest.raises(ValueError, match="window is 65 tokens, but the model takes at most 64"):
        ActivationStream(toy_model(), toy_corpus(), toy_config(window=65))
    with pytest.raises(ValueError, match="too short: 5,000 held-out rows take"):
        ActivationStream(toy_model(), toy_corpus(), toy_config(holdout=5000))
    with pytest.raises(ValueError, match="does not fill one window of 16 tokens"):
        ActivationStream(toy_model(), toy_corpus(documents=3, length=4), toy_config(holdout=0))


def live(prefetch: bool = False, seed: int = 0) -> LiveSource:
    return LiveSource(toy_model(), toy_corpus(), toy_config(seed=seed), buffer_rows=400, prefetch=prefetch)


def test_a_live_source_serves_every_row_once_and_mixed() -> None:
    corpus = TokenCorpus(np.arange(3000).reshape(60, 50))  # every row is unique
    source = LiveSource(toy_model(3000), corpus, toy_config(), buffer_rows=400)
    assert isinstance(source, ActivationSource)
    assert source.n_tokens is None
    batches = [source.next_batch(30) for _ in range(40)]
    assert all(batch.shape == (30, D_IN) and batch.dtype == torch.float32 for batch in batches)
    assert len({tuple(row) for row in torch.cat(batches).tolist()}) == 1200, "a row comes twice in an epoch"

    stream = ActivationStream(toy_model(3000), corpus, toy_config())
    text_order = [tuple(row) for _ in range(30) for row in stream.next().activations.tolist()]  # type: ignore[union-attr]
    place = {row: i for i, row in enumerate(text_order)}
    places = torch.tensor([place[tuple(row)] for row in batches[20].tolist()])
    per_block = torch.bincount(places // 240)  # 4 batches of 4 windows with 15 rows each
    assert (per_block[per_block > 0] > 5).all(), f"a batch mixes two blocks' text, got {per_block.tolist()}"
    assert (per_block > 0).sum() == 2
    assert int((places.diff() == 1).sum()) <= 2, "neighbours in the text stay together"
    assert source.stats["rows"] >= 1200
    held = {tuple(row) for row in source.held_out().tolist()}
    assert len(held) == 60
    assert not held & set(text_order)


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_live_source_names_the_tokens_of_a_batch(prefetch: bool) -> None:
    """Every token of the text is unique and the model looks at no other: a row says which token it is of."""
    corpus = TokenCorpus(np.arange(3000).reshape(60, 50))
    model = toy_model(3000)
    every = torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(3000)])  # the first is an attention sink
    row_of = HookedModel(model.model, toy_config().hook)(every[None])[0, 1:]
    source = LiveSource(model, corpus, toy_config(), buffer_rows=400, prefetch=prefetch)
    assert isinstance(source, NamesRows)
    kept = []
    for n in (100, 333, 250, 40):  # across generations
        kept.append((source.next_batch(n), source.origin()))
    shared = SharedSource(LiveSource(model, corpus, toy_config(), buffer_rows=400)).readers[0]
    for n in (30, 200):
        kept.append((shared.next_batch(n), shared.origin()))
    for batch, origin in kept:
        rows = range(0, len(batch), 17)
        for row, name in zip(rows, origin(rows), strict=True):
            found = re.fullmatch(
                r"token \d+ of window [0-3] after .*, piece \d+, token \d+, epoch 0: it ends tokens \[(.*)\]", name
            )
            assert found is not None, name
            token = int(found[1].split(",")[-1])
            assert torch.allclose(batch[row], row_of[token].float(), rtol=1e-5), name
    source.close()


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_live_source_resumes_bit_exactly(prefetch: bool) -> None:
    plain = live()
    source = live(prefetch)
    for n in (0, 1, 50, 150, 333, 1000, 2500):  # the last ones reach the second epoch
        if n:
            assert torch.equal(source.next_batch(n), plain.next_batch(n)), "prefetching changed a batch"
        state = json.loads(json.dumps(source.state_dict()))
        resumed = live(prefetch)
        resumed.next_batch(17)  # its own position must not matter
        resumed.load_state_dict(state)
        assert resumed.state_dict() == source.state_dict()
        stats = source.stats
        expected = live()
        expected.load_state_dict(state)
        assert expected.stats == stats
        assert torch.equal(resumed.next_batch(700), expected.next_batch(700))
        assert torch.equal(resumed.held_out(), plain.held_out())
        resumed.close()
        expected.close()
    again = live(prefetch)
    again.load_state_dict(state)
    assert torch.equal(source.next_batch(300), again.next_batch(300))
    assert plain.stats["epoch"] >= 1
    with pytest.raises(ValueError, match=r"config is .*'seed': 0} in it and .*'seed': 1} here"):
        live(seed=1).load_state_dict(state)
    source.close()
    again.close()


def test_a_live_source_that_gets_no_row_says_so() -> None:
    ids = np.full((60, 50), HUGE_TOKEN)
    ids[:20, ::2] = 3
    source = LiveSource(toy_model(), TokenCorpus(ids), toy_config(shuffle_text=False, holdout=0), buffer_rows=8)
    source._stream.filter.median = 1e-6
    with pytest.raises(ValueError, match="the filter drops every row of 1 batches"):
        source.next_batch(5)
    with pytest.raises(ValueError, match="n >= 1"):
        source.next_batch(0)
    with pytest.raises(ValueError, match="buffer_rows must be at least 4"):
        LiveSource(toy_model(), toy_corpus(), toy_config(), buffer_rows=3)
