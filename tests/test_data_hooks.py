"""Hooks of several kinds of models, and several hooks in one pass: random models made from transformers configs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastsae.data.hooks import HookedModel, find, in_residual_stream
from fastsae.data.splice import splice
from fastsae.model.rules import TopK
from fastsae.model.sae import SparseAutoencoder
from fastsae.runs.spliced import spliced_loss
from tests.data_case import ToyModel

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

LLAMA = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
         "num_key_value_heads": 1, "max_position_embeddings": 32}  # fmt: skip
# As many layers as the text has: a count tells the two stacks apart in no model of this kind.
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 8,
          "patch_size": 4}  # fmt: skip


def model(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    made: nn.Module
    if kind == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2}
        config = transformers.T5Config(vocab_size=60, initializer_factor=10.0, **sizes)
        made = transformers.T5ForConditionalGeneration(config)
    elif kind == "bart":
        sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
                 "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}  # fmt: skip
        made = transformers.BartForConditionalGeneration(transformers.BartConfig(vocab_size=60, init_std=0.5, **sizes))
    elif kind == "llava":
        vision = transformers.CLIPVisionConfig(projection_dim=16, **VISION)
        config = transformers.LlavaConfig(vision_config=vision, text_config=transformers.LlamaConfig(**LLAMA))
        made = transformers.LlavaForConditionalGeneration(config)
    elif kind == "idefics":
        text = transformers.LlamaConfig(pad_token_id=0, **LLAMA)
        config = transformers.Idefics3Config(vision_config=VISION, text_config=text, pad_token_id=0)
        made = transformers.Idefics3ForConditionalGeneration(config)
    elif kind == "mixtral":
        made = transformers.MixtralForCausalLM(transformers.MixtralConfig(num_local_experts=4, **LLAMA))
    else:
        made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    return made.eval()


def token_ids(seed: int = 1) -> Tensor:
    return torch.randint(3, 50, (4, 11), generator=torch.Generator().manual_seed(seed))


def states(of: Any, ids: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """The hidden states that transformers gives, by side; an encoder-decoder reads the ids on both."""
    with torch.no_grad():
        if of.config.is_encoder_decoder:
            out = of(input_ids=ids, decoder_input_ids=ids, output_hidden_states=True, use_cache=False)
            return {"encoder": out.encoder_hidden_states, "decoder": out.decoder_hidden_states}
        return {"text": of(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states}


@pytest.mark.parametrize("kind", ["llama", "mixtral", "llava", "idefics", "t5", "bart"])
def test_numbers_count_the_layers_that_read_the_text(kind: str) -> None:
    of, ids = model(kind), token_ids()
    for side, expected in states(of, ids).items():
        # The last state of a model with a final norm has been through it.
        for count in range(len(expected) - (kind != "bart")):
            hook: int | str = f"decoder.{count}" if side == "decoder" else count
            assert torch.equal(HookedModel(of, hook)(ids), expected[count]), (side, count)
            if side == "encoder":
                assert torch.equal(HookedModel(of, f"encoder.{count}")(ids), expected[count])


@pytest.mark.parametrize("kind", ["llama", "mixtral", "llava", "idefics", "t5"])
def test_what_the_parts_of_a_layer_give_is_what_it_adds_to_the_residual_stream(kind: str) -> None:
    of, ids = model(kind), token_ids()
    for side in ("", "decoder.") if kind == "t5" else ("",):
        names = ("attn", "cross", "mlp") if side else ("attn", "mlp")
        for layer in range(2):
            residual = (f"{side}{layer}", f"{side}{layer + 1}")
            before, after, *parts = HookedModel(of, (*residual, *(f"{side}{name}.{layer}" for name in names))).parts(
                ids
            )
            torch.testing.assert_close(before + sum(parts), after, rtol=1e-4, atol=1e-5)
            assert all(float(part.abs().max()) > 1e-4 for part in parts), "a part that adds nothing shows nothing"
            for name in names:
                assert in_residual_stream(of, f"{side}{name}.{layer}") == (kind != "t5" or side == "decoder.")
                assert not in_residual_stream(of, f"{side}{name}.{layer}:input")


@pytest.mark.parametrize("side", ["", "encoder.", "decoder."])
def test_an_mlp_whose_modules_lie_in_the_layer(side: str) -> None:
    of, ids = model("bart"), token_ids()
    x, y = HookedModel(of, (f"{side}mlp.1:input", f"{side}mlp.1")).parts(ids)
    layer = (of.model.decoder if side == "decoder." else of.model.encoder).layers[1]
    assert torch.equal(y, layer.fc2(layer.activation_fn(layer.fc1(x))))
    assert find(of, f"{side}attn.1").module is layer.self_attn


@pytest.mark.parametrize("kind", ["llava", "idefics", "t5", "bart"])
def test_which_of_two_stacks_a_number_counts_is_said(kind: str) -> None:
    of = model(kind)
    note = HookedModel(of, (2, "mlp.0")).note()
    assert note is not None
    if kind in ("llava", "idefics"):
        stack = {"llava": "model.language_model.layers", "idefics": "model.text_model.layers"}[kind]
        assert f"2, mlp.0 counts those of the text, {stack}" in note
        assert find(of, 2).name == f"{stack}.1"
    else:
        stack, other = {
            "t5": ("encoder.block", "decoder.block"),
            "bart": ("model.encoder.layers", "model.decoder.layers"),
        }[kind]
        assert f"2, mlp.0 counts those of the encoder, {stack} (the other is {other}, named decoder.L)" in note
        assert HookedModel(of, "decoder.1").note() is None
    assert HookedModel(of, find(of, 1).name).note() is None
    assert HookedModel(model("llama"), 1).note() is None


def test_wrong_hooks_of_models_with_two_stacks() -> None:
    t5 = model("t5")
    for hook, message in [
        (3, "the model has 2 layers: hook must be 0 to 2, got 3"),
        ("decoder.4", "the decoder has 3 layers: hook must be 0 to 3, got 4"),
        (
            "cross.0",
            r"cannot tell which module of layer 0 is its cross; encoder\.block\.0 has: layer; give the hook as a",
        ),
        ("decoder.mlp.3", "mlp.L takes L from 0 to 2, got mlp.3"),
        ("1:input", "the model has no module '1'"),
    ]:
        with pytest.raises(ValueError, match=message):
            find(t5, hook)
    llava = model("llava")
    with pytest.raises(ValueError, match=r"never reaches model\.vision_tower\.encoder\.layers\.0"):
        HookedModel(llava, ("model.vision_tower.encoder.layers.0", 1))(token_ids())
    with pytest.raises(ValueError, match=r"the model has no module 'decoder\.1'"):
        find(llava, "decoder.1")


@pytest.mark.parametrize("kind", ["llama", "mixtral", "llava", "t5", "bart"])
def test_several_hooks_in_one_pass_are_those_of_a_pass_each(kind: str) -> None:
    of, ids = model(kind), token_ids()
    hooks = (2, "mlp.0:input", "mlp.0", "attn.1", 0) + (
        ("decoder.1", "decoder.mlp.1") if kind in ("t5", "bart") else ()
    )
    hooked = HookedModel(of, hooks)
    parts = hooked.parts(ids)
    for hook, name, part in zip(hooks, hooked.names, parts, strict=True):
        alone = HookedModel(of, hook)
        assert alone.name == name
        assert torch.equal(part, alone(ids)), hook
    assert torch.equal(hooked(ids), torch.cat(parts, dim=-1))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in of.modules())


def test_a_pass_goes_no_further_than_its_last_hook_and_what_it_writes_later_changes_nothing() -> None:
    """The toy model writes into its embeddings after their hook."""
    of, ids = ToyModel(), torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    parts = HookedModel(of, ("layers.0.mlp", "embed", 1)).parts(ids)
    assert [layer.calls for layer in of.layers] == [1, 0, 0]
    assert torch.equal(parts[1], of.embed(ids))
    assert torch.equal(parts[2], HookedModel(of, 1)(ids))


def test_hooks_that_cannot_stand_together() -> None:
    of = ToyModel()
    with pytest.raises(ValueError, match=r"the hooks 1 and 'layers\.0' are the same place, layers\.0; give it once"):
        HookedModel(of, (1, 2, "layers.0"))
    with pytest.raises(ValueError, match="got no hook"):
        HookedModel(of, ())
    with pytest.raises(ValueError, match="never reaches unused"):
        HookedModel(of, (1, "unused"))(torch.zeros(2, 5, dtype=torch.int64))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("llama", torch.float64), ("mixtral", torch.bfloat16), ("t5", torch.bfloat16)]
)
def test_activations_have_the_dtype_in_which_the_model_was_loaded(kind: str, dtype: torch.dtype) -> None:
    of = model(kind).to(dtype)
    assert all(part.dtype == dtype for part in HookedModel(of, (1, "mlp.1")).parts(token_ids()))
    assert all(p.dtype == dtype for p in of.parameters())


@pytest.mark.parametrize("kind", ["llava", "mixtral", "t5", "bart"])
def test_splicing_in_models_of_these_kinds(kind: str) -> None:
    of, ids = model(kind), token_ids()
    one, two = (SparseAutoencoder(16, 48, TopK(4), seed=seed, pre_bias=False).eval() for seed in (0, 1))
    sides = ("", "decoder.") if kind in ("t5", "bart") else ("",)
    for side in sides:
        sites = {f"{side}1": one, (f"{side}mlp.1:input", f"{side}mlp.1"): two}
        result = spliced_loss(of, sites, ids)
        assert result.n_predictions == 40
        assert result.kl_spliced > 0
        with torch.no_grad(), splice(of, sites, error_term=True):
            kept = states(of, ids)
        for name, expected in states(of, ids).items():
            assert all(torch.equal(a, b) for a, b in zip(kept[name], expected, strict=True))
