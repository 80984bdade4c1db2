"""Settings that follow the data and the weights: an open pre_bias, and a state dict that carries its SAE's settings."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

import fastsae
from fastsae.backends import BackendWarning
from fastsae.model.parameters import EXTRA_STATE
from fastsae.runs.evaluate import evaluate
from fastsae.training.step import PlainTrainStep
from tests.dense_sae import tokens

D, M = 10, 30


def fresh(rule: Any = None, **settings: Any) -> fastsae.SparseAutoencoder:
    return fastsae.SparseAutoencoder(D, M, rule or fastsae.TopK(4), **{"dtype": torch.float64, "seed": 0, **settings})


# -- pre_bias ---------------------------------------------------------------------------------------------------------


def test_pre_bias_left_open_is_on_without_a_target_and_off_where_the_widths_differ() -> None:
    assert fresh().pre_bias
    assert not fresh(d_out=7).pre_bias
    assert fresh().config["pre_bias"] is None
    assert fresh(d_out=7).config["pre_bias"] is False
    assert fresh(pre_bias=True).config["pre_bias"] is True


CALLS = {
    "forward": lambda sae, x, y: sae(x, target=y),
    "inputs": lambda sae, x, y: sae.inputs(x, y),
    "init_from_": lambda sae, x, y: sae.init_from_(x, y),
    "fused step": lambda sae, x, y: fastsae.FusedTrainStep(sae)(x, target=y),
    "evaluate": lambda sae, x, y: evaluate(sae, x, targets=y),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_first_target_turns_an_open_pre_bias_off_before_anything_is_computed(call: str) -> None:
    x, y = tokens(24, D, 1), tokens(24, D, 2)
    sae, off = fresh(), fresh(pre_bias=False)
    with torch.no_grad():
        sae.b_dec.fill_(1.0)
        off.b_dec.fill_(1.0)
    with pytest.warns(UserWarning, match="pre_bias was left None: it is now off") as caught:
        CALLS[call](sae, x, y)
    (message,) = [str(w.message) for w in caught if not issubclass(w.category, BackendWarning)]
    assert "\n" not in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", BackendWarning)
        CALLS[call](off, x, y)
        CALLS[call](sae, x, y)
        CALLS[call](off, x, y)
    assert sae.config == off.config
    assert torch.equal(sae(x, target=y).loss, off(x, target=y).loss)


def test_an_explicit_pre_bias_stays() -> None:
    x, y = tokens(24, D, 1), tokens(24, D, 2)
    sae = fresh(pre_bias=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", BackendWarning)
        sae(x, target=y)
    assert sae.config["pre_bias"] is True


def test_training_without_a_target_decides_pre_bias_and_inference_does_not() -> None:
    x, y = tokens(24, D, 1), tokens(24, D, 2)
    looked = fresh().eval()
    looked(x)
    looked.encode(x)
    assert looked.config["pre_bias"] is None
    trained = fresh()
    PlainTrainStep(trained, lr=1e-3)(x)
    assert trained.config["pre_bias"] is True
    with pytest.warns(UserWarning, match="it stays on, since this SAE was trained without a target"):
        trained(x, target=y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", BackendWarning)
        trained(x, target=y)
    assert trained.pre_bias


def test_a_transcoder_with_the_default_pre_bias_learns_as_one_without() -> None:
    """With pre_bias on, b_dec, which is not the mean of x, is subtracted from x: the same run then explains less."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 16, generator=generator).relu()
    y = x @ torch.randn(16, 16, generator=generator) + 8 * torch.randn(16, generator=generator)
    fvu = {}
    for pre_bias in (None, False, True):
        sae = fastsae.SparseAutoencoder(16, 64, fastsae.TopK(8), pre_bias=pre_bias, seed=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            sae.init_from_(x, y)
            step = fastsae.FusedTrainStep(sae, lr=3e-3)
            for batch, target in zip(x.split(128) * 6, y.split(128) * 6, strict=True):
                metrics = step(batch, target=target)
        fvu[pre_bias] = float(metrics["fvu"])
    assert fvu[None] == fvu[False] < 0.8 * fvu[True]


def test_a_compiled_module_decides_pre_bias_without_recompiling() -> None:
    torch._dynamo.reset()
    sae, x = fresh(), tokens(24, D)
    compiled = torch.compile(sae, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            compiled(x)
    assert sae.config["pre_bias"] is True
    torch._dynamo.reset()
    target = fresh()
    compiled = torch.compile(target, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, target=x.flip(0)).loss, fresh(pre_bias=False)(x, target=x.flip(0)).loss)


# -- a state's settings -----------------------------------------------------------------------------------------------


def decided() -> fastsae.SparseAutoencoder:
    sae = fresh()
    sae(tokens(24, D))
    return sae


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_state_survives_every_way_of_saving_it(tmp_path: Path) -> None:
    sae = decided()
    torch.save(sae.state_dict(), tmp_path / "sae.pt")
    save_file(sae.state_dict(), tmp_path / "sae.safetensors")
    save_model(sae, str(tmp_path / "model.safetensors"))
    dcp.save(sae.state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    into = fresh(seed=3).state_dict()
    dcp.load(into, checkpoint_id=tmp_path / "dcp", no_dist=True)
    ways: list[dict[str, Tensor]] = [
        sae.state_dict(), copy.deepcopy(sae.state_dict()), torch.load(tmp_path / "sae.pt", weights_only=True),
        load_file(tmp_path / "sae.safetensors"), load_file(tmp_path / "model.safetensors"), into,
    ]  # fmt: skip
    for state in ways:
        again = fresh(seed=1)
        assert not (keys := again.load_state_dict(state)).missing_keys + keys.unexpected_keys
        assert again.config == sae.config
        assert torch.equal(again.W_enc, sae.W_enc)
    again = fresh(seed=1)
    assert load_model(again, str(tmp_path / "model.safetensors")) == (set(), [])
    with torch.device("meta"):
        empty = fresh()
    empty.load_state_dict(sae.state_dict(), strict=True, assign=True)
    assert torch.equal(empty.W_enc, sae.W_enc)
    x = tokens(8, D)
    assert torch.equal(torch.func.functional_call(fresh(seed=1), sae.state_dict(), (x,)).loss, sae(x).loss)


OTHER = {
    "k": (lambda: fresh(fastsae.TopK(5)), r"activation\.k \(got 4, expected 5\)"),
    "rule": (
        lambda: fresh(fastsae.GroupMax(5)),
        r"activation\.k \(got 4, expected 5\), activation\.kind \(got 'topk', expected 'group_max'\)",
    ),
    "inner": (
        lambda: fresh(fastsae.Matryoshka(fastsae.TopK(4), groups=(M,))),
        r"activation\.kind \(got 'topk', expected 'matryoshka'\)",
    ),
    "pre_bias": (lambda: fresh(pre_bias=False), r"pre_bias \(got True, expected False\)"),
    "loss": (lambda: fresh(loss="fvu"), r"loss \(got 'mse', expected 'fvu'\)"),
    "normalize": (lambda: fresh(normalize="layer_norm"), r"normalize \(got 'none', expected 'layer_norm'\)"),
    "decoder_norm": (lambda: fresh(decoder_norm="free"), r"decoder_norm \(got 'unit', expected 'free'\)"),
    "width": (lambda: fastsae.SparseAutoencoder(D, M + 1, fastsae.TopK(4)), r"d_sae \(got 30, expected 31\)"),
}


@pytest.mark.parametrize("case", OTHER)
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "in a larger module"])
def test_a_state_of_other_settings_is_refused_before_anything_changes(case: str, nested: bool) -> None:
    make, message = OTHER[case]
    mine, theirs = make(), decided()
    before = copy.deepcopy(mine.state_dict())
    module, state = (nn.Sequential(mine), nn.Sequential(theirs)) if nested else (mine, theirs)
    with pytest.raises(ValueError, match=message):
        module.load_state_dict(state.state_dict())
    for name, value in mine.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_other_settings_can_be_allowed() -> None:
    sae, other = decided(), fresh(fastsae.TopK(5), seed=4)
    state = sae.state_dict()
    other.load_state_dict(state, allow_other_config=True)
    assert torch.equal(other.W_enc, sae.W_enc)
    assert other.activation == fastsae.TopK(5)
    assert EXTRA_STATE in state


def test_settings_of_training_alone_may_differ() -> None:
    other = fresh(aux_k=3, aux_coef=0.5, dead_after=7, init_norm=0.5, rule_dtype=torch.float64, seed=4)
    other.load_state_dict(decided().state_dict())
    other = fresh(ghost="pull", ghost_coef=0.5, seed=4)
    other.load_state_dict(decided().state_dict())
    assert torch.equal(other.W_enc, decided().W_enc)


def test_an_open_pre_bias_takes_what_the_state_has_decided() -> None:
    transcoder = fresh(pre_bias=False)
    sae = fresh(seed=4)
    sae.load_state_dict(transcoder.state_dict())
    assert sae.config["pre_bias"] is False
    still_open = fresh(seed=4)
    still_open.load_state_dict(fresh().state_dict())
    assert still_open.config["pre_bias"] is None


def test_a_state_without_settings_loads_as_before() -> None:
    state = {name: t for name, t in decided().state_dict().items() if name != EXTRA_STATE}
    sae = fresh(seed=4)
    sae.load_state_dict(state)
    assert torch.equal(sae.W_enc, decided().W_enc)
    assert sae.config["pre_bias"] is True  # the default before pre_bias could be open
    state.pop("b_enc")
    with pytest.raises(RuntimeError, match="Missing key"):
        sae.load_state_dict(state)


@pytest.mark.parametrize("extra", [torch.zeros(3), torch.zeros(3, dtype=torch.uint8), {"k": 4}, None])
def test_malformed_settings_in_a_state_are_refused(extra: Any) -> None:
    with pytest.raises(ValueError, match=r"_extra_state in the state is .*, expected uint8 \(n,\)"):
        fresh().load_state_dict({**fresh().state_dict(), EXTRA_STATE: extra})


def test_a_missing_setting_is_accepted_and_an_unknown_one_is_named() -> None:
    state = decided().state_dict()
    config = json.loads(bytes(state[EXTRA_STATE].tolist()))

    def with_config(config: dict[str, Any]) -> dict[str, Tensor]:
        return {**state, EXTRA_STATE: torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)}

    config.pop("layers")
    fresh().load_state_dict(with_config(config))
    with pytest.raises(ValueError, match=r"colour \(got 'blue', expected 'no such setting'\)"):
        fresh().load_state_dict(with_config({**config, "colour": "blue"}))


# -- load, and config -------------------------------------------------------------------------------------------------


def test_a_loaded_module_is_in_eval_mode_and_trains_when_asked(tmp_path: Path) -> None:
    sae = fastsae.load(fastsae.save(decided(), tmp_path / "sae"))
    assert not any(module.training for module in sae.modules())
    before = sae.tokens_since_fired.clone()
    sae(tokens(8, D))
    assert torch.equal(sae.tokens_since_fired, before)
    assert sae.train()(tokens(8, D)).loss.requires_grad


def test_config_is_a_dict_and_what_transformers_reads() -> None:
    config = fresh().config
    assert json.loads(json.dumps(config)) == config == config.to_dict() == json.loads(config.to_json_string())
    assert type(config.to_dict()) is dict
    config.use_cache = False  # transformers' Trainer sets this
    assert config == fresh().config
    assert fastsae.SparseAutoencoder.from_config(config).config == config
