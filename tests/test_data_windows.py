"""What is in a window and which rows leave it: documents packed or apart, padding, special tokens, exact resume."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastsae.data import (
    ActivationStream,
    LanguageModel,
    LiveSource,
    Manifest,
    Ordinary,
    ShardSource,
    StreamConfig,
    TokenCorpus,
    harvest,
    load_text,
)
from fastsae.data import models as data_models
from fastsae.data.filters import RowFilter
from fastsae.data.padding import PAD, masked, trimmed
from fastsae.data.specials import named_ids, special_ids, special_tokens
from fastsae.data.splice import splice
from fastsae.data.stream import SplitText, held_out_windows
from fastsae.model.rules import TopK
from fastsae.model.sae import SparseAutoencoder
from fastsae.runs.spliced import activations_at, spliced_loss
from tests import text_case

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(tokenizer: Any, head: bool = False) -> LanguageModel:
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM if head else transformers.LlamaModel
    config = transformers.LlamaConfig(vocab_size=34, max_position_embeddings=64, **SHAPE)
    return LanguageModel(made(config).double().eval(), tokenizer, "tiny")


def bert(tokenizer: Any) -> LanguageModel:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=34, max_position_embeddings=64, **SHAPE))
    return LanguageModel(model.double().eval(), tokenizer, "tiny")


def config(**changes: Any) -> StreamConfig:
    return StreamConfig(
        **{"hook": 1, "window": 12, "windows_per_batch": 8, "holdout": 100, "norm_factor": None, **changes}
    )


def corpus(tmp_path: Path) -> Any:
    (tmp_path / "a.jsonl").write_bytes(text_case.as_lines("text", text_case.texts(900)))
    return load_text(str(tmp_path / "a.jsonl"))


def test_the_frame_is_what_the_tokenizer_says_it_adds() -> None:
    """Also where it cannot read "a", of which there is then nothing between the special tokens."""
    dna = text_case.letters()
    assert dna("a")["input_ids"] == [1, 2]
    assert special_tokens(dna) == ([1], [2])
    assert special_tokens(text_case.letters(frame=False)) == ([], [])
    assert special_tokens(text_case.words()) == ([], [])
    assert special_tokens(None) == ([], [])
    with pytest.raises(ValueError, match="cannot tell the special tokens of Mute: its mask marks none"):
        special_tokens(Mute())


class Mute:
    """A tokenizer that reads nothing."""

    unk_token_id = None
    all_special_ids: tuple[int, ...] = ()
    all_special_tokens: tuple[str, ...] = ()

    def __len__(self) -> int:
        return 3

    def __call__(self, text: str, **more: bool) -> dict[str, list[int]]:
        return {"input_ids": [], "special_tokens_mask": []}

    def decode(self, ids: list[int]) -> str:
        return "x"


def test_special_tokens_have_names() -> None:
    tokenizer = text_case.words()
    # The unknown word stands for words; the marks of a chat are special.
    assert special_ids(tokenizer) == {1: "<end>", 2: "<|user|>", 3: "<|assistant|>"}
    assert special_ids(text_case.letters()) == {0: "<pad>", 1: "<s>", 2: "</s>", 7: "<|user|>"}
    assert special_ids(None) == {}
    tokenizer.unk_token = "<end>"  # as in GPT-2
    assert 1 in special_ids(tokenizer)
    dna = text_case.letters()
    dna.add_special_tokens({"unk_token": "<|end|>"})  # as in SmolLM2: no text gives it
    assert special_ids(dna)[8] == "<|end|>"
    assert named_ids(["w3", "#5", "<unk>"], text_case.words()) == {7: "w3", 5: "#5", 0: "<unk>"}
    assert named_ids(["#5"], None) == {5: "#5"}
    for name, known in (("nothing", "<end>, <|user|>, <|assistant|>"), ("#99", "<end>")):
        with pytest.raises(ValueError, match=f"no token '{name}'; its special tokens: {known}"):
            named_ids([name], text_case.words())
    with pytest.raises(ValueError, match="no token 'w1'; its special tokens: none; or give an id like #7"):
        named_ids(["w1"], None)


def all_rows(stream: ActivationStream) -> list[Any]:
    found = []
    while (rows := stream.next()) is not None:
        found.append(rows)
    return found


@pytest.mark.parametrize("pack", ["windows", "documents"])
def test_special_tokens_give_rows_only_if_they_are_kept(tmp_path: Path, pack: Any) -> None:
    model, text = llama(text_case.words()), corpus(tmp_path)

    def ids_of(**changes: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        stream = ActivationStream(model, text, config(pack=pack, **changes), repeat=False)
        rows = all_rows(stream)
        return torch.cat([one.token_ids[one.window, one.position] for one in rows]), stream.stats

    ids, stats = ids_of()
    kept, before = ids_of(special_tokens="keep")
    assert not bool((ids == 1).any())
    assert PAD not in ids
    assert stats["tokens"] == stats["rows"] + stats["rows_dropped_first"] + stats["rows_dropped_special"]
    if pack == "windows":
        # On short documents every twentieth token ends a text.
        assert int((kept == 1).sum()) == stats["rows_dropped_special"] > 0.04 * stats["rows"]
        assert stats["dropped_tokens"] == {"<end>": stats["rows_dropped_special"]}
        assert (before["dropped_tokens"], before["padding"]) == ({}, 0)
        named, found = ids_of(keep_tokens=("<end>",), drop_tokens=("w3", "#4"))
        assert bool((named == 1).any())
        assert set(found["dropped_tokens"]) == {"w3", "#4"}
        assert not bool(torch.isin(named, torch.tensor([4, 7])).any())
        assert found["dropped_tokens"]["w3"] == int((kept == 7).sum())
    else:
        assert stats["rows_dropped_special"] == 0
        assert stats["padding"] > 0


def test_positions_are_dropped_from_both_ends_of_the_text(tmp_path: Path) -> None:
    model, text = llama(text_case.words()), corpus(tmp_path)
    stream = ActivationStream(model, text, config(pack="documents", drop_positions=(3, -1, -2)), repeat=False)
    for rows in all_rows(stream):
        lengths = (rows.token_ids != PAD).sum(1)
        assert not bool((torch.isin(rows.position, torch.tensor([0, 3]))).any())
        assert bool((lengths[rows.window] - rows.position > 2).all())
    assert stream.rows_per_window == 8
    with pytest.raises(ValueError, match="drop_positions has 12, expected positions from 0 to 11"):
        config(drop_positions=(12,))
    with pytest.raises(ValueError, match="pack must be 'windows' or 'documents', got 'page'"):
        config(pack="page")
    with pytest.raises(ValueError, match="all of its positions are dropped"):
        SplitText(text, text_case.words(), config(drop_positions=tuple(range(12))))


def test_documents_apart_have_windows_of_their_own(tmp_path: Path) -> None:
    """Every token once, in order, in windows that begin and end with the special tokens."""
    documents = [[3, 4, 5], [6] * 25, [], [1, 3, 2], [5] * 10]  # the fourth has brought its frame along
    split = SplitText(
        TokenCorpus(documents), text_case.letters(), config(pack="documents", holdout=0, shuffle_text=False)
    )
    windows = split.train(repeat=False).next(99)
    expected = [[3, 4, 5], [6] * 10, [6] * 10, [6] * 5, [3], [5] * 10]
    assert windows.tolist() == [[1, *part, 2] + [PAD] * (10 - len(part)) for part in expected]
    stream, again = split.train(repeat=True), split.train(repeat=True)
    for n in (1, 2, 4, 9):
        expected_next = stream.next(n)
        assert torch.equal(again.next(n), expected_next)
        again = split.train(repeat=True)
        again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    # An end of text divides a row of ids.
    row = TokenCorpus(np.array([3, 4, 2, 5, 2, 2, 6]))
    assert [part.tolist() for part in row.token_documents(0, text_case.letters())] == [[3, 4], [5], [6]]

    class Joined:
        def __len__(self) -> int:
            return 1

        def tokens(self, piece: int, tokenizer: Any) -> np.ndarray:
            return np.arange(3, 7)

        def describe(self) -> dict[str, Any]:
            return {}

    with pytest.raises(
        ValueError, match=r"needs a corpus with token_documents\(piece, tokenizer\), but Joined has none"
    ):
        SplitText(Joined(), text_case.letters(), config(pack="documents", holdout=0))


@pytest.mark.parametrize("make", [llama, bert])
def test_a_padded_window_has_the_activations_of_its_document_alone(make: Any, tmp_path: Path) -> None:
    """In a bidirectional model nothing but the mask keeps padding out."""
    model = make(text_case.letters())
    texts = ["".join("ACGT"[(i * i + j) % 4] for j in range(1 + i % 20)) for i in range(200)]
    (tmp_path / "a.jsonl").write_bytes(text_case.as_lines("text", texts))
    stream = ActivationStream(
        model, load_text(str(tmp_path / "a.jsonl")), config(pack="documents", holdout=20), repeat=False
    )
    assert stream.filter.ordinary == Ordinary(1, 1, None, (), (0, 1, 2, 7))
    count = 0
    for rows in all_rows(stream):
        for number, ids in enumerate(rows.token_ids):
            mine = rows.window == number
            text = ids[ids != PAD]
            assert rows.position[mine].tolist() == list(range(1, len(text) - 1))
            with torch.no_grad():
                states = model.model(input_ids=text[None], output_hidden_states=True).hidden_states[1][0]
            torch.testing.assert_close(rows.activations[mine], states[1:-1], rtol=1e-9, atol=1e-12)
            count += int(mine.sum())
    assert count == stream.stats["rows"] > 500
    assert stream.stats["rows_dropped_first"] == 2 * (stream.stats["tokens"] - count) / 2
    assert not model.model._forward_pre_hooks


def test_two_threads_hook_and_mask_one_model_in_turn() -> None:
    """Each with a mask of its own: one pass has it, with the hook of its own stream, or the rows are another's."""
    tokenizer = text_case.letters()
    model = bert(tokenizer)
    draw = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, 7, (1 + i % 9,), generator=draw).tolist() for i in range(200)]

    def stream(first: int) -> ActivationStream:
        text = TokenCorpus(documents[first:] + documents[:first])
        return ActivationStream(
            model, text, config(pack="documents", holdout=0, shuffle_text=False, windows_per_batch=1 + first),
            repeat=False,
        )  # fmt: skip

    expected = [torch.cat([rows.activations for rows in all_rows(stream(first))]) for first in range(3)]
    with ThreadPoolExecutor(3) as threads:
        found = [threads.submit(all_rows, one) for one in [stream(first) for first in range(3)]]
        for rows, wanted in zip(found, expected, strict=True):
            assert torch.equal(torch.cat([one.activations for one in rows.result()]), wanted)
    assert not model.model._forward_pre_hooks


def test_a_live_buffer_of_short_documents_is_as_large_as_asked_for() -> None:
    """Counted in full windows it held a fourth of that, and the rows of a document came in one batch."""
    model = llama(text_case.letters())
    text = TokenCorpus([[3, 4, 5]] * 400)

    def source(buffer_rows: int = 400) -> LiveSource:
        return LiveSource(
            model, text, config(pack="documents", holdout=0, windows_per_batch=2), buffer_rows=buffer_rows
        )

    one = source()
    one.next_batch(1)
    assert one.state_dict()["generation"] == 0
    one.next_batch(99)  # the first generation is half of the first block
    assert one.state_dict()["generation"] == 0
    one.next_batch(150)
    assert one.state_dict() == {**one.state_dict(), "generation": 1, "rows_per_block": 200}
    other = source()
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.next_batch(300), one.next_batch(300))
    with pytest.raises(ValueError, match=r"belongs to another source: .* is 10 in it and 15 here"):
        source(600).load_state_dict(one.state_dict())


def test_windows_without_padding_get_no_mask() -> None:
    seen = []

    class Model(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> None:
            seen.append((input_ids.tolist(), None if attention_mask is None else attention_mask.tolist()))

    model, ids = Model(), torch.tensor([[3, 4, PAD, PAD], [5, 6, 7, PAD]])
    with masked(model, trimmed(ids)) as given:
        model(given)
    with masked(model, ids[:, :2]) as given:
        model(given)
    assert seen == [([[3, 4, 0], [5, 6, 7]], [[1, 1, 0], [1, 1, 1]]), ([[3, 4], [5, 6]], None)]


def test_ordinary_tokens_are_those_of_the_filter() -> None:
    row_filter = RowFilter(
        "here", n_prefix=1, n_suffix=1, drop_first=True, norm_factor=None, nonfinite="drop", positions=(-3,),
        without={9: "nine"},
    )  # fmt: skip
    ids = torch.tensor([[1, 5, 9, 6, 7, 8, 2], [1, 5, 6, 2, PAD, PAD, PAD]])
    x = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))
    rows = row_filter(x, ids)
    mask = row_filter.ordinary.of(ids)(x)
    assert mask.tolist() == [[False, True, False, True, False, True, False], [False, False, True] + [False] * 4]
    assert torch.equal(rows.activations, x[mask])
    expected = {"tokens": 11, "padding": 3, "rows": 4, "rows_dropped_first": 6, "rows_dropped_special": 1}
    assert {name: row_filter.stats[name] for name in expected} == expected
    assert row_filter.stats["dropped_tokens"] == {"nine": 1}
    with pytest.raises(ValueError, match=r"1 token ids are left out, .* pass of\(token_ids\)"):
        row_filter.ordinary(x)


def test_the_loss_of_padded_windows_is_that_of_their_documents() -> None:
    model = llama(text_case.words(), head=True)
    draw = torch.Generator().manual_seed(0)
    documents = [torch.randint(34, (n,), generator=draw) for n in (12, 5, 9, 2, 12, 7)]
    ids = torch.full((6, 14), PAD)
    for row, document in zip(ids, documents, strict=True):
        row[: len(document)] = document
    sae = SparseAutoencoder(16, 48, TopK(4), seed=0).double().eval()
    where = Ordinary(first=1, without=(1, 2))
    found = spliced_loss(model, {1: sae}, ids, where=where)
    rows, _ = activations_at(model, 1, ids, where=where)
    assert found.n_predictions == sum(len(document) - 1 for document in documents)
    untouched, changed, replaced, apart = 0.0, 0.0, 0, []
    for document in documents:
        keep = ~torch.isin(document, torch.tensor([1, 2]))[None]
        keep[:, 0] = False
        with torch.no_grad():
            plain = model.model(input_ids=document[None], output_hidden_states=True)
            with splice(model, 1, sae, where=lambda x, keep=keep: keep):
                logits = model.model(input_ids=document[None]).logits
        apart.append(plain.hidden_states[1][keep])
        for name, one in (("plain", plain.logits), ("changed", logits)):
            loss = torch.nn.functional.cross_entropy(one[0, :-1], document[1:], reduction="sum").item()
            untouched, changed = untouched + loss * (name == "plain"), changed + loss * (name == "changed")
        replaced += int(keep.sum())
    torch.testing.assert_close(rows, torch.cat(apart), rtol=1e-9, atol=1e-12)
    assert found.ce_untouched == pytest.approx(untouched / found.n_predictions, rel=1e-9)
    assert found.ce_spliced == pytest.approx(changed / found.n_predictions, rel=1e-9)
    assert found.replaced_share == pytest.approx(replaced / sum(map(len, documents)))
    everything = spliced_loss(model, {1: sae}, ids)
    assert everything.replaced_share == 1
    with pytest.raises(ValueError, match="no window holds two tokens"):
        spliced_loss(model, {1: sae}, torch.tensor([[3, PAD], [4, PAD]]))


@pytest.mark.parametrize("pack", ["windows", "documents"])
@pytest.mark.parametrize("source", text_case.SOURCES)
def test_every_source_resumes_exactly(source: str, pack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Harvested and live, interrupted and gone on with, over a corpus that is opened anew."""
    write, given = text_case.SOURCES[source]
    spec = str(write(tmp_path))
    model, options = llama(text_case.words()), config(pack=pack, seed=3, holdout=60)
    arguments = {"rows": 600, "rows_per_shard": 150, "dtype": torch.float32, "progress": False}

    def harvested(name: str) -> Manifest:
        return harvest(model, load_text(spec, **given), tmp_path / name, options, **arguments)

    whole = harvested("whole")
    read, calls = ActivationStream.next, []

    def interrupted(stream: ActivationStream) -> Any:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return read(stream)

    with monkeypatch.context() as patch:
        patch.setattr(ActivationStream, "next", interrupted)
        with pytest.raises(KeyboardInterrupt):
            harvested("cut")
    assert 0 < len(Manifest.read(tmp_path / "cut").shards) < len(whole.shards)
    assert harvested("cut") == whole
    stored = ShardSource(tmp_path / "whole", dtype=None, verify="eager", progress=False)
    assert whole.rows >= 600
    assert len(stored.held_out()) == 60
    ids = stored.token_ids(range(whole.rows))
    assert not bool(torch.isin(ids, torch.tensor([1, 2, 3, PAD])).any())
    assert all(PAD not in one.token_ids for one in stored.contexts([0, 60, 200], width=12))

    def live() -> LiveSource:
        return LiveSource(model, load_text(spec, **given), options, buffer_rows=300)

    one = live()
    one.next_batch(777)
    state = json.loads(json.dumps(one.state_dict()))
    other = live()
    other.load_state_dict(state)
    assert torch.equal(other.next_batch(400), one.next_batch(400))
    assert torch.equal(other.held_out(), stored.held_out().to(other.held_out().dtype))


def test_a_folder_from_before_goes_on_as_it_was(tmp_path: Path) -> None:
    """Its manifest knows nothing of these options: they mean what was done then."""
    model, text = llama(text_case.words()), corpus(tmp_path)
    arguments = {"rows_per_shard": 150, "dtype": torch.float32, "progress": False}
    before = config(special_tokens="keep")
    harvest(model, text, tmp_path / "old", before, rows=300, **arguments)
    path = tmp_path / "old" / "manifest.json"
    old = json.loads(path.read_text())
    for name in ("pack", "special_tokens", "drop_tokens", "keep_tokens", "drop_positions"):
        del old["settings"]["stream"][name]
    for name in ("padding", "rows_dropped_special", "dropped_tokens"):
        del old["stats"][name], old["position"]["counts"][name]
    del old["sha256"]
    old["version"] = 1
    path.write_text(json.dumps(old))
    assert ShardSource(tmp_path / "old").n_tokens == Manifest.read(tmp_path / "old").rows >= 300
    with pytest.raises(
        ValueError, match=r"different settings: stream.special_tokens is 'keep', asked for 'drop'\. Use"
    ):
        harvest(model, text, tmp_path / "old", config(), rows=600, **arguments)
    more = harvest(model, text, tmp_path / "old", before, rows=600, **arguments)
    assert more.shards == harvest(model, text, tmp_path / "new", before, rows=600, **arguments).shards
    live = LiveSource(model, text, before, buffer_rows=300)
    live.next_batch(100)
    state = live.state_dict()
    state["config"] = {name: state["config"][name] for name in old["settings"]["stream"]}
    live.load_state_dict(state)
    with pytest.raises(ValueError, match=r"config is .*'special_tokens': 'keep'"):
        LiveSource(model, text, config(), buffer_rows=300).load_state_dict(state)
    assert StreamConfig.from_record(json.loads(json.dumps(config(drop_tokens=("a",)).to_record()))) == config(
        drop_tokens=("a",)
    )


def test_a_text_that_does_not_do_is_found_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = str(text_case.write_model(tmp_path / "model"))

    def loaded(*given: Any, **more: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("fastsae.data.stream.load_model", loaded)
    text = corpus(tmp_path)
    for changes, message in [
        ({"holdout": 10**6}, "the text is too short"),
        ({"keep_tokens": ("<none>",)}, "the tokenizer has no token '<none>'"),
    ]:
        for start in (
            lambda options: harvest(spec, text, tmp_path / "x", options, rows=10),
            lambda options: LiveSource(spec, text, options),
        ):
            with pytest.raises(ValueError, match=message):
                start(config(**changes))
    with pytest.raises(AssertionError, match="the model was loaded"):
        harvest(spec, text, tmp_path / "x", config(), rows=10)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client would try again for most of a minute."""
    asked = []
    monkeypatch.setattr(data_models, "why_unreachable", lambda: asked.append(1) or "no network")
    with pytest.raises(ValueError, match="cannot load the model 'no-such-owner/no-such-model'"):
        data_models.load_model("no-such-owner/no-such-model")
    assert len(asked) == 1


def test_held_out_windows_count_tokens_and_not_padding(tmp_path: Path) -> None:
    split = SplitText(corpus(tmp_path), text_case.words(), config(pack="documents"))
    assert held_out_windows(split, 0).shape == (0, 12)
    for tokens in (1, 50, 90):
        windows = held_out_windows(split, tokens)
        have = int((windows != PAD).sum())
        assert have >= tokens
        assert have - int((windows[-1] != PAD).sum()) <= tokens
    with pytest.raises(ValueError, match=r"its held-out part has [\d,]+ tokens in windows of 12, expected 99,999"):
        held_out_windows(split, 99_999)
