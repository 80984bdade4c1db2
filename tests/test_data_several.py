"""Several hooks, stored and live: rows that line up after any interruption, targets, and one filter for all hooks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsae.data import (
    ActivationStream,
    LiveSource,
    Manifest,
    ShardError,
    ShardSource,
    StreamConfig,
    TensorSource,
    TokenCorpus,
    harvest,
    load_model,
)
from fastsae.data import writer as writing
from fastsae.data.hooks import HookedModel
from fastsae.data.source import TargetSource, held_out_targets, next_pair
from tests.cli_case import write_text, write_tiny_model
from tests.data_case import D_IN, HUGE_TOKEN, sealed, toy_config, toy_corpus, toy_model


def config(*hooks: int | str, **changes: Any) -> StreamConfig:
    return toy_config(hook=hooks, **changes)


def store(folder: Path, *hooks: int | str, rows: int = 900, **changes: Any) -> Manifest:
    settings = {"rows": rows, "rows_per_shard": 300, "dtype": torch.float32, "progress": False}
    return harvest(toy_model(), toy_corpus(), folder, config(*hooks, **changes), **settings)  # type: ignore[arg-type]


def passes(rows: Tensor, source: ShardSource, hook: int | str) -> Tensor:
    """The activations at a hook by a pass over each row's own window."""
    model, found = toy_model().model, []
    for context in source.contexts(range(len(rows)), width=64):
        found.append(HookedModel(model, hook)(torch.tensor([context.token_ids]))[0, context.center])
    return torch.stack(found)


def test_each_hook_has_the_rows_of_its_own_pass_in_one_order(tmp_path: Path) -> None:
    manifest = store(tmp_path, 2, "mlp.0:input", "mlp.0")
    assert [one.name for one in manifest.hooks()] == ["layers.1", "layers.0.mlp:input", "layers.0.mlp"]
    assert [one.hook for one in manifest.hooks()] == [2, "mlp.0:input", "mlp.0"]
    n = manifest.rows + 60
    for one in manifest.hooks():
        source = ShardSource(tmp_path, hook=one.hook, dtype=None)
        rows = source.rows(range(n))
        assert torch.equal(rows, ShardSource(tmp_path, hook=one.name, dtype=None).rows(range(n)))
        # A pass over one window sums in another order than one over four.
        torch.testing.assert_close(rows[:200], passes(rows[:200], source, one.hook or 0), rtol=1e-5, atol=1e-5)
        source.verify(progress=False)
    both = ShardSource(tmp_path, hook=("mlp.0", 2), target="mlp.0:input", seed=4, buffer_rows=300)
    assert (both.d_in, both.d_target) == (2 * D_IN, D_IN)
    alone = [ShardSource(tmp_path, hook=hook, seed=4, buffer_rows=300) for hook in ("mlp.0", 2, "mlp.0:input")]
    for size in (7, 300, 1000):
        x, y = both.next_pair(size)
        a, b, c = (one.next_batch(size) for one in alone)
        assert torch.equal(x, torch.cat([a, b], dim=1))
        assert torch.equal(y, c)
        assert x.is_contiguous()
        assert y.is_contiguous()
    assert torch.equal(both.held_out(), torch.cat([alone[0].held_out(), alone[1].held_out()], dim=1))
    assert torch.equal(both.held_out_targets(), alone[2].held_out())
    # The rows may be read without their targets: the position is the same.
    state = both.state_dict()
    x, _ = both.next_pair(50)
    both.load_state_dict(json.loads(json.dumps(state)))
    assert torch.equal(both.next_batch(50), x)


def test_a_token_is_dropped_at_every_hook_where_its_norm_is_too_large_at_one(tmp_path: Path) -> None:
    """So strict a limit that the two hooks disagree about many tokens."""
    manifest = store(tmp_path, "mlp.0", "mlp.0:input", norm_factor=1.3)
    sources = [ShardSource(tmp_path, hook=hook) for hook in ("mlp.0", "mlp.0:input")]
    limits = [1.3 * one.norm_median for one in manifest.hooks() if one.norm_median]
    assert len(limits) == 2
    for source, limit in zip(sources, limits, strict=True):
        assert float(source.rows(range(manifest.rows)).norm(dim=1).max()) <= limit * (1 + 1e-6)
    assert not bool((sources[0].token_ids(range(manifest.rows)) == HUGE_TOKEN).any())
    alone = store(tmp_path / "alone", "mlp.0", norm_factor=1.3)
    stats = manifest.stats
    dropped = stats["rows_dropped_first"] + stats["rows_dropped_norm"] + stats["rows_dropped_elsewhere"]
    assert stats["rows_dropped_elsewhere"] > 0
    assert stats["tokens"] == stats["rows"] + dropped
    assert stats["rows"] == manifest.rows
    assert "rows_dropped_elsewhere" not in alone.stats


@pytest.mark.parametrize("target", [None, "mlp.0"])
def test_live_rows_are_the_stored_ones_bit_for_bit(tmp_path: Path, target: str | None) -> None:
    names = (2, "mlp.0:input")
    corpus = TokenCorpus(np.arange(3000).reshape(60, 50))  # every row is unique
    settings = config(*names, *(() if target is None else (target,)))
    arguments = {"rows": 10**6, "rows_per_shard": 300, "dtype": torch.float32, "progress": False}
    manifest = harvest(toy_model(3000), corpus, tmp_path, settings, **arguments)  # the whole text, once
    source = LiveSource(toy_model(3000), corpus, config(*names), target=target, buffer_rows=400)
    assert isinstance(source, TargetSource)
    stored = ShardSource(tmp_path, hook=names, target=target)
    assert (source.d_in, source.d_target) == (stored.d_in, stored.d_target)
    assert torch.equal(source.held_out(), stored.held_out())
    if target is not None:
        assert torch.equal(held_out_targets(source), held_out_targets(stored))
    every = [stored.rows(range(manifest.rows)), *([] if target is None else [stored.targets(range(manifest.rows))])]
    there = {tuple(row) for row in torch.cat(every, 1).tolist()}
    rows = torch.cat([part for part in next_pair(source, 1200) if part is not None], 1).tolist()
    found = {tuple(row) for row in rows}
    assert len(found) == 1200
    assert found <= there


def test_a_live_source_of_several_hooks_resumes_bit_exactly() -> None:
    def live() -> LiveSource:
        return LiveSource(toy_model(), toy_corpus(), config(1, "mlp.0:input"), target=("mlp.0", 3), buffer_rows=400)

    source = live()
    for n in (1, 150, 333, 2500):
        source.next_pair(n)
        state = json.loads(json.dumps(source.state_dict()))
        resumed = live()
        resumed.next_batch(17)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == source.state_dict()
        assert resumed.stats == source.stats
        for a, b in zip(resumed.next_pair(200), source.next_pair(200), strict=True):
            assert torch.equal(a, b)
    other = LiveSource(toy_model(), toy_corpus(), config(1, "mlp.0:input"), target="mlp.0", buffer_rows=400)
    with pytest.raises(ValueError, match=r"target is \['mlp\.0', 3\] in it and \['mlp\.0'\] here"):
        other.load_state_dict(state)


def test_a_harvest_of_several_hooks_goes_on_after_a_stop_at_any_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held out and three shards of three files each, and the manifest after each of them."""
    whole = store(tmp_path / "whole", 2, "mlp.0:input", "mlp.0")
    assert len(whole.shards) == 3
    write, calls = writing.write_atomically, []

    def stopping(path: Path, data: bytes) -> str:
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(path.name)
        return write(path, data)

    monkeypatch.setattr(writing, "write_atomically", stopping)
    monkeypatch.setattr("fastsae.data.manifest.write_atomically", stopping)
    for stop in range(17):
        calls.clear()
        folder = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            store(folder, 2, "mlp.0:input", "mlp.0")
        if stop > 14:
            kept = ShardSource(folder, hook=2, target="mlp.0", verify="eager", progress=False)
            assert len(kept.rows(range(kept.n_tokens or 0))) == len(kept.targets(range(kept.n_tokens or 0)))
        calls.clear()
        calls.extend("x" * 100)  # no more stops
        assert store(folder, 2, "mlp.0:input", "mlp.0") == whole
        for entry in whole.entries():
            assert (folder / entry.file).read_bytes() == (tmp_path / "whole" / entry.file).read_bytes()
    assert len(calls) > 100


def test_a_folder_of_one_hook_is_as_before_and_of_several_names_them(tmp_path: Path) -> None:
    store(tmp_path / "one", 2)
    content = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert "others" not in content
    assert content["settings"]["stream"]["hook"] == 2
    assert ShardSource(tmp_path / "one").state_dict().keys() == {
        "source", "seed", "buffer_rows", "rows", "first_shard", "last_shard", "epoch", "cursor"
    }  # fmt: skip
    store(tmp_path / "two", 2, "mlp.0")
    for arguments, message in [
        ({}, r"holds rows of 2 hooks: 2, mlp\.0; choose one or more with hook"),
        ({"hook": 3}, r"holds no rows of the hook 3, only of 2, mlp\.0"),
        ({"hook": 2, "target": "mlp.1"}, r"holds no rows of the hook 'mlp\.1', only of 2, mlp\.0"),
        ({"hook": ()}, "got no hook"),
    ]:
        with pytest.raises(ValueError, match=message):
            ShardSource(tmp_path / "two", **arguments)
    with pytest.raises(ValueError, match="has no targets"):
        ShardSource(tmp_path / "two", hook=2).next_pair(3)
    with pytest.raises(ValueError, match=r"stream\.hook is \[2, 'mlp\.0'\], asked for 2"):
        store(tmp_path / "two", 2)
    state = ShardSource(tmp_path / "two", hook=2, target="mlp.0").state_dict()
    with pytest.raises(ValueError, match="belongs to another source"):
        ShardSource(tmp_path / "two", hook="mlp.0", target=2).load_state_dict(state)
    content = json.loads((tmp_path / "two" / "manifest.json").read_text())
    content["others"][0]["shards"].pop()
    (tmp_path / "two" / "manifest.json").write_text(json.dumps(sealed(content)))
    with pytest.raises(ShardError, match=r"the hook mlp\.0 has different rows than the first one"):
        ShardSource(tmp_path / "two", hook=2)


def test_targets_of_a_tensor() -> None:
    x = torch.arange(200.0).view(50, 4)
    source = TensorSource(x, holdout=10, seed=1, target=-x[:, :3])
    a, b = source.next_pair(60)
    assert torch.equal(b, -a[:, :3])
    assert torch.equal(source.held_out_targets(), -x[40:, :3])
    assert torch.equal(TensorSource(x, holdout=10, seed=1).next_batch(60), a)
    for bad, message in [
        (x[:49], r"expected targets \(50, d_target\)"),
        (x.double(), "torch.float32 on cpu like the rows"),
        (x * float("nan"), "50 of 50 targets hold NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            TensorSource(x, holdout=10, target=bad)
    with pytest.raises(ValueError, match="has no targets"):
        TensorSource(x, holdout=10).held_out_targets()


def test_settings_with_one_hook_or_several() -> None:
    assert StreamConfig(hook=(3,)) == StreamConfig(hook=3)
    assert StreamConfig(hook=[3, "mlp.1"]).hook == (3, "mlp.1")  # type: ignore[arg-type]
    assert StreamConfig.from_record(json.loads(json.dumps(config(1, 2).to_record()))) == config(1, 2)
    with pytest.raises(ValueError, match="got no hook"):
        StreamConfig(hook=())
    with pytest.raises(ValueError, match="expected one hook, got 1, 2"):
        _ = config(1, 2).one_hook


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    pytest.importorskip("transformers", reason="transformers is not installed")
    write_text(tmp_path / "text.txt")
    return write_tiny_model(tmp_path / "model", head=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hook": 9}, "the model has 2 layers: hook must be 0 to 2, got 9"),
        ({"hook": (1, "mpl.1")}, "no module 'mpl.1'"),
        ({"hook": (1, "layers.0")}, "are the same place"),
        ({"hook": 1, "window": 65}, "window is 65 tokens, but the model takes at most 64"),
        ({"hook": 1, "holdout": 10**6}, "the text is too short"),
    ],
)
def test_what_is_wrong_is_said_before_the_weights_are_read(
    model_folder: Path, tmp_path: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda *a, **k: pytest.fail("weights were read"))
    settings = StreamConfig(**{"window": 32, "holdout": 100, **changes})
    text = str(tmp_path / "text.txt")
    with pytest.raises(ValueError, match=message):
        harvest(str(model_folder), text, tmp_path / "out", settings, rows=100, progress=False)
    with pytest.raises(ValueError, match=message):
        LiveSource(str(model_folder), text, settings)
    assert not (tmp_path / "out").exists()


def test_a_check_sees_the_structure_of_the_model_that_is_loaded(model_folder: Path) -> None:
    seen: list[Any] = []
    for head in (False, True):
        loaded = load_model(str(model_folder), dtype=torch.float32, head=head, check=seen.append)
        skeleton = seen[-1].model
        assert type(skeleton) is type(loaded.model)
        assert {p.device.type for p in skeleton.parameters()} == {"meta"}
        names = [[name for name, _ in one.named_modules()] for one in (skeleton, loaded.model)]
        assert names[0] == names[1]
    torch.manual_seed(1)
    before = torch.rand(1)
    torch.manual_seed(1)
    load_model(str(model_folder), dtype=torch.float32, check=seen.append)
    assert torch.equal(torch.rand(1), before), "the check must not draw random numbers"


def test_a_stream_of_several_hooks_says_which_stack_it_counts(caplog: pytest.LogCaptureFixture) -> None:
    from tests.test_data_hooks import model

    language = dataclasses.replace(toy_model(), model=model("llava"))
    corpus = toy_corpus()
    with caplog.at_level("INFO", logger="fastsae"):
        ActivationStream(language, corpus, StreamConfig(hook=(1, "mlp.1"), window=16, holdout=0))
    assert "has 2 stacks of layers; 1, mlp.1 counts those of the text, model.language_model.layers" in caplog.text
