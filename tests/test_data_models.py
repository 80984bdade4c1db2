"""Transformers models and tokenizers: specs, hooks, special tokens, a harvest with readable contexts."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastsae.data import ActivationStream, LanguageModel, ShardSource, StreamConfig, TextCorpus, harvest, load_model
from fastsae.data import models as data_models
from fastsae.data.contexts import token_strings
from fastsae.data.filters import Ordinary
from fastsae.data.hooks import HookedModel
from fastsae.data.specials import special_tokens
from fastsae.data.splice import splice, steer
from fastsae.model.rules import TopK
from fastsae.model.sae import SparseAutoencoder
from fastsae.runs.spliced import spliced_loss
from tests.cli_case import write_text, write_tiny_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
import tokenizers  # noqa: E402

SENTENCE = "the quick brown fox jumps over a lazy dog while seven wizards box in rainy spring . , ;"
WORDS = SENTENCE.split()


def word_tokenizer(bert: bool) -> Any:
    specials = ["[UNK]", "[CLS]", "[SEP]"] if bert else ["[UNK]", "<end>"]
    vocabulary = {word: i for i, word in enumerate([*specials, *WORDS, "##s"])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if bert:
        raw.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=raw, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", eos_token="<end>")


def tiny(bert: bool, head: bool = False) -> LanguageModel:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    if bert:
        model = transformers.BertModel(transformers.BertConfig(vocab_size=30, max_position_embeddings=32, **shape))
    else:
        config = transformers.LlamaConfig(vocab_size=30, num_key_value_heads=1, max_position_embeddings=32, **shape)
        model = (transformers.LlamaForCausalLM if head else transformers.LlamaModel)(config)
    return LanguageModel(model.eval(), word_tokenizer(bert), "tiny")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TextCorpus:
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("text") / "book.txt"
    words = [WORDS[i] for i in torch.randint(len(WORDS), (12_000,), generator=generator)]
    path.write_text("\n".join(" ".join(words[i : i + 12]) for i in range(0, len(words), 12)))
    return TextCorpus([path], spec="book")


def config(**changes: Any) -> StreamConfig:
    return StreamConfig(**{"hook": 2, "window": 20, "windows_per_batch": 8, "holdout": 100, **changes})


@pytest.mark.parametrize("bert", [False, True])
def test_hooks_give_the_hidden_states_that_transformers_gives(bert: bool) -> None:
    model = tiny(bert).model
    ids = torch.randint(3, 20, (4, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    for layers in range(3):  # the last one has been through the final norm
        assert torch.equal(HookedModel(model, layers)(ids), states[layers])
    name = "encoder.layer.1" if bert else "layers.1"
    assert torch.equal(HookedModel(model, name)(ids), states[2])
    assert torch.equal(HookedModel(model, f"{model.base_model_prefix}.{name}")(ids), states[2])


def test_hook_names_are_those_of_the_model_with_or_without_its_head() -> None:
    ids = torch.arange(3, 13).view(2, 5)
    with_head, without = tiny(False, head=True).model, tiny(False).model
    without.load_state_dict(with_head.model.state_dict())
    expected = HookedModel(without, 2)(ids)
    for model in (with_head, without):
        for hook in (2, "model.layers.1", "layers.1"):
            assert torch.equal(HookedModel(model, hook)(ids), expected)
    assert HookedModel(with_head, "model.layers.0.mlp.down_proj:input")(ids).shape == (2, 5, 24)
    for short, name in [("mlp.1", "layers.1.mlp"), ("attn.2", "layers.2.self_attn"), ("attn.0:input", None)]:
        found = HookedModel(with_head, short)(ids)
        if name is not None:
            assert torch.equal(found, HookedModel(without, name)(ids))
    norm = with_head.model.layers[0].input_layernorm
    assert torch.equal(HookedModel(with_head, "attn.0:input")(ids), norm(HookedModel(with_head, 0)(ids)))
    with pytest.raises(ValueError, match=r"is its mlp; encoder.layer.1 has: attention, intermediate, output; give the"):
        HookedModel(tiny(bert=True).model, "mlp.1")


def test_a_model_with_its_head_has_the_digest_of_the_one_without() -> None:
    with_head, without = tiny(False, head=True), tiny(False)
    without.model.load_state_dict(with_head.model.model.state_dict())
    assert with_head.base.describe() == without.describe() == without.base.describe()
    assert with_head.describe()["digest"] != without.describe()["digest"]


def test_a_transformers_model_is_spliced_and_whole_afterwards() -> None:
    model = tiny(False, head=True).model
    ids = torch.randint(3, 20, (4, 11), generator=torch.Generator().manual_seed(1))
    sae = SparseAutoencoder(16, 48, TopK(4), seed=0).eval()
    with torch.no_grad():
        untouched = model(input_ids=ids).logits
        for hook in (0, 2, "mlp.1", "attn.1", "attn.1:input", "lm_head:input"):
            with splice(model, hook, sae, error_term=True), steer(model, hook, sae, {}):
                assert torch.equal(model(input_ids=ids).logits, untouched)
            with splice(model, hook, sae):
                assert not torch.allclose(model(input_ids=ids).logits, untouched, atol=1e-4)
            assert torch.equal(model(input_ids=ids).logits, untouched)
        # Token by token with a cache of keys and values: every token is replaced once, as in one pass.
        with splice(model, 2, sae):
            whole, cache, logits = model(input_ids=ids).logits, None, []
            for i in range(ids.shape[1]):
                step = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
                cache = step.past_key_values
                logits.append(step.logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=1e-3, atol=1e-4)
    result = spliced_loss(model, {2: sae, "mlp.1": sae}, ids, where=Ordinary())
    assert result.hooks == ("model.layers.1", "model.layers.1.mlp")
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert result.ce_untouched == pytest.approx(float(loss), rel=1e-5)
    with pytest.raises(ValueError, match="from LlamaModel, got BaseModelOutputWithPast; load the model with its head"):
        spliced_loss(tiny(False).model, {2: sae}, ids)


def test_special_tokens_frame_every_window_and_give_no_rows(corpus: TextCorpus) -> None:
    model = tiny(bert=True)
    assert special_tokens(model.tokenizer) == ([1], [2])
    assert special_tokens(word_tokenizer(False)) == ([], [])
    stream = ActivationStream(model, corpus, config())
    rows = stream.next()
    assert rows is not None
    assert (rows.token_ids[:, 0] == 1).all()
    assert (rows.token_ids[:, -1] == 2).all()
    assert (rows.token_ids[:, 1:-1] > 2).all()
    assert rows.position.min() == 1
    assert rows.position.max() == 18
    assert stream.stats["rows_dropped_first"] == 2 * 8


def test_a_harvest_shows_the_text_around_its_rows(corpus: TextCorpus, tmp_path: Path) -> None:
    model = tiny(bert=False)
    manifest = harvest(model, corpus, tmp_path, config(), rows=900, rows_per_shard=300, progress=False)
    assert manifest.rows >= 900
    assert manifest.dtype == "bfloat16"
    assert manifest.held_out is not None
    assert manifest.held_out.rows == 100
    assert manifest.provenance["layer"] == "layers.1"
    source = ShardSource(tmp_path, dtype=None, verify="eager", progress=False)
    words = token_strings(model.tokenizer)
    for row in (0, 5, 318, 640, 899, source.held_out_ids()[70]):
        context = source.contexts([row], width=4)[0]
        assert context.row == row
        assert context.rows[context.center] == row
        assert context.tokens == [words[i] for i in context.token_ids]
        assert 5 <= len(context.tokens) <= 9
        # A forward pass of the window's tokens gives the stored row and the rows of its neighbours.
        window = source.contexts([row], width=20)[0]
        assert len(window.token_ids) == 20
        assert window.rows[0] == -1, "the first position is not stored"
        again = HookedModel(model.model, 2)(torch.tensor([window.token_ids]))[0]
        for place, neighbour in enumerate(window.rows):
            if neighbour >= 0:
                stored = source.rows([neighbour])[0]
                torch.testing.assert_close(stored, again[place].bfloat16(), rtol=0.01, atol=0.01)
    # A word begins with its space; a piece of a word does not.
    assert words[0:3] == [" [UNK]", " <end>", " the"]
    assert words[-1] == "s"
    # Contexts need no model and no tokenizer: the folder holds the strings.
    assert json.loads((tmp_path / "vocabulary.json").read_text()) == words


def test_a_harvest_resumes_where_it_was_interrupted_and_refuses_another_model(
    corpus: TextCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny(bert=False)
    arguments = {"rows": 900, "rows_per_shard": 300, "progress": False}
    whole = harvest(model, corpus, tmp_path / "whole", config(), **arguments)
    read, batches = ActivationStream.next, []

    def interrupted(stream: ActivationStream) -> Any:
        batches.append(stream)
        if len(batches) == 4:
            raise KeyboardInterrupt
        return read(stream)

    monkeypatch.setattr(ActivationStream, "next", interrupted)
    with pytest.raises(KeyboardInterrupt):
        harvest(model, corpus, tmp_path / "cut", config(), **arguments)
    assert len(ShardSource(tmp_path / "cut").manifest.shards) == 1
    assert harvest(model, corpus, tmp_path / "cut", config(), **arguments) == whole
    monkeypatch.undo()
    more = harvest(model, corpus, tmp_path / "cut", config(), **{**arguments, "rows": 1500})
    assert more.rows >= 1500
    assert more.shards[: len(whole.shards)] == whole.shards
    with pytest.raises(ValueError, match=r"different settings: stream.hook is 2, asked for 3; stream.seed is 0, asked"):
        harvest(model, corpus, tmp_path / "cut", config(hook=3, seed=1), **arguments)
    other = tiny(bert=False)
    with torch.no_grad():
        next(other.model.parameters()).mul_(1.001)
    with pytest.raises(ValueError, match=r"different settings: model.digest is"):
        harvest(other, corpus, tmp_path / "cut", config(), **{**arguments, "rows": 2000})
    # A finished harvest is found without loading the model: its spec need not exist any more.
    named = dataclasses.replace(model, name="gone/with-the-wind")
    small = harvest(named, corpus, tmp_path / "named", config(), **arguments)
    assert harvest("gone/with-the-wind", corpus, tmp_path / "named", config(), **arguments) == small
    all_of_it = harvest(model, corpus, tmp_path / "all", config(), rows=10**6, progress=False)
    assert all_of_it.text_ended
    assert f"the text ended after {all_of_it.rows} of 1000000 rows" in caplog.text


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package that carries a model and some text, and cannot be imported."""
    package = tmp_path / "site" / "carrier_of_a_model"
    model = tiny(bert=False, head=True)
    model.model.save_pretrained(package / "weights")
    model.tokenizer.save_pretrained(package / "weights")
    (package / "weights" / "pooling").mkdir()
    (package / "weights" / "pooling" / "config.json").write_text('{"pooling": "mean"}')
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "a.txt").write_text("the fox")
    monkeypatch.syspath_prepend(package.parent)
    yield package
    assert "carrier_of_a_model" not in sys.modules


def test_models_by_spec(packaged: Path) -> None:
    from_package = load_model("package:carrier_of_a_model", dtype=torch.float32)
    from_folder = load_model(str(packaged / "weights"), dtype=torch.bfloat16, head=True)
    assert type(from_package.model).__name__ == "LlamaModel"
    assert type(from_folder.model).__name__ == "LlamaForCausalLM"
    assert {p.dtype for p in from_folder.model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad or m.training for m in from_package.model.modules() for p in m.parameters())
    assert from_package.describe()["dtype"] == "float32"
    assert from_package.describe() == load_model("package:carrier_of_a_model", dtype=torch.float32).describe()
    ids = from_package.tokenizer("the quick fox", return_tensors="pt")["input_ids"]
    assert HookedModel(from_package.model, 2)(ids).shape == (1, 3, 16)


def test_models_that_cannot_be_loaded(packaged: Path, tmp_path: Path) -> None:
    for spec, message in [
        ("package:no_such_package", r"'no_such_package' is not installed; install the distribution that holds it"),
        ("package:carrier_of_a_model/a.txt", r"expected a \.gguf file or a folder with config\.json at .*a\.txt"),
        (f"gguf:{tmp_path}/none.gguf", r"no model at .*none\.gguf"),
        (str(packaged), r"no model at .*carrier_of_a_model"),
        ("./mistyped", r"no model at '\./mistyped': expected a \.gguf file or a folder with config\.json"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_model(spec)
    weights = packaged / "weights" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    with pytest.raises(ValueError, match="cannot load the model 'package:carrier_of_a_model'"):
        load_model("package:carrier_of_a_model")
    # A pickle is refused even if there is no other file.
    weights.rename(packaged / "weights" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot load the model"):
        load_model("package:carrier_of_a_model")
    (packaged / "second").mkdir()
    (packaged / "second" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"found 2 \(second, weights\); name it as package:NAME/PATH"):
        load_model("package:carrier_of_a_model")


def write_tiny_gguf(path: Path) -> np.ndarray:
    """A two-layer Llama of width 32 with a byte-level vocabulary; returns its embeddings."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    d_model, d_mlp, n_layers, n_vocab = 32, 64, 2, 40
    tokens = ["<unk>", "<s>", "</s>", *map(chr, range(97, 123)), "\u0120", "\u010a", "th", "the", "##"]
    tokens += [f"<{i}>" for i in range(n_vocab - len(tokens))]
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in [
        ("block_count", n_layers), ("context_length", 64), ("embedding_length", d_model), ("head_count", 2),
        ("feed_forward_length", d_mlp), ("head_count_kv", 1), ("layer_norm_rms_eps", 1e-5), ("rope_freq_base", 1e4),
        ("rope_dimension_count", 16), ("vocab_size", n_vocab), ("tokenizer_model", "gpt2"), ("token_list", tokens),
        ("token_merges", ["t h", "th e"]), ("token_types", [1] * n_vocab), ("bos_token_id", 1), ("eos_token_id", 2),
    ]:  # fmt: skip
        getattr(writer, f"add_{key}")(value)
    shapes = {
        "attn_q": (d_model, d_model), "attn_k": (16, d_model), "attn_v": (16, d_model),
        "attn_output": (d_model, d_model), "ffn_gate": (d_mlp, d_model), "ffn_up": (d_mlp, d_model),
        "ffn_down": (d_model, d_mlp), "attn_norm": (d_model,), "ffn_norm": (d_model,),
    }  # fmt: skip
    embeddings = generator.standard_normal((n_vocab, d_model)).astype(np.float32)
    writer.add_tensor("token_embd.weight", embeddings)
    writer.add_tensor("output_norm.weight", np.ones(d_model, np.float32))
    for layer in range(n_layers):
        for name, shape in shapes.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", generator.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return embeddings


def test_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    embeddings = torch.from_numpy(write_tiny_gguf(path))
    for spec in (str(path), f"gguf:{path}"):
        loaded = load_model(spec, dtype=torch.float32)
        ids = loaded.tokenizer("the cat", return_tensors="pt")["input_ids"]
        strings = token_strings(loaded.tokenizer)
        assert strings[ids[0, 0]] == "the"
        assert strings[29:34] == [" ", "\n", "th", "the", "##"]  # bytes are decoded; a heading is not a WordPiece
        assert torch.equal(HookedModel(loaded.model, 0)(ids), embeddings[ids])
        assert HookedModel(loaded.model, 2)(ids).shape == (1, ids.shape[1], 32)
    size = path.stat().st_size
    for kept in (size - 500, 300, 10, 0):
        os.truncate(path, kept)
        with pytest.raises(ValueError, match=r"cannot load the model '.*tiny\.gguf': "):
            load_model(str(path))


@pytest.mark.parametrize(
    ("flags", "device", "expected"),
    [
        ("fpu avx2 avx512f", "cpu", torch.float32),
        ("fpu avx2 avx512f avx512_bf16", "cpu", torch.bfloat16),
        ("fp asimd bf16", "cpu", torch.bfloat16),
        ("fpu avx2", "cuda", torch.bfloat16),
        ("fpu avx2", "meta", torch.bfloat16),
        (None, "cpu", torch.float32),
    ],
)
def test_a_model_runs_in_what_is_fastest_on_its_device(
    flags: str | None, device: str, expected: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU that only emulates bf16 takes ten times as long with it and more."""
    info = tmp_path / "cpuinfo"
    if flags is not None:
        info.write_text(f"processor : 0\nflags : {flags}\n")
    monkeypatch.setattr(data_models, "CPUINFO", info)
    assert data_models.fast_dtype(device) is expected


def test_a_harvest_goes_on_in_the_type_in_which_it_was_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Perhaps on another machine: the rows would be of two models otherwise."""
    model, text = write_tiny_model(tmp_path / "model"), write_text(tmp_path / "text.txt", words=20_000)
    config = StreamConfig(hook=1, window=32, holdout=100)
    given = (str(model), str(text), tmp_path / "acts", config)
    monkeypatch.setattr(data_models, "fast_dtype", lambda device: torch.float32)
    harvest(*given, rows=500, progress=False)
    monkeypatch.setattr(data_models, "fast_dtype", lambda device: torch.bfloat16)
    manifest = harvest(*given, rows=1000, progress=False)
    assert manifest.rows >= 1000
    assert manifest.provenance["model"]["dtype"] == "float32"
