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
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

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
    with pytest.warns(UserWarning, match="it stays on, because this SAE was trained without a target"):
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
    assert not any(t.is_meta for t in (*empty.parameters(), *empty.buffers()))  # those that are not saved begin anew
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


@pytest.mark.parametrize("strict", [True, False])
def test_the_weights_of_another_rule_are_refused_in_every_way_of_loading(strict: bool) -> None:
    """L0 would silently be another: 33 instead of 4."""
    theirs, relu = decided(), fresh(fastsae.ReLU(l1=1.0))
    both = r"activation\.k \(got 4, .*activation\.kind \(got 'topk', expected 'relu'\)"
    for load_it in (
        lambda: relu.load_state_dict(theirs.state_dict(), strict=strict),
        lambda: relu.load_state_dict(theirs.state_dict(), strict=strict, assign=True),
        lambda: set_model_state_dict(
            relu, get_model_state_dict(theirs), options=StateDictOptions(strict=strict)
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=both):
            load_it()
    # Inside a larger module, whose load_state_dict is torch's own, the settings are removed by name.
    outer, state = nn.Sequential(nn.Tanh(), relu), nn.Sequential(nn.Tanh(), theirs).state_dict()
    with pytest.raises(ValueError, match=r"remove '1\._extra_state' from the state to load it anyway"):
        outer.load_state_dict(state, strict=strict)
    del state["1._extra_state"]
    outer.load_state_dict(state, strict=strict)
    assert torch.equal(relu.W_enc, theirs.W_enc)


def batch(rule: Any = None, **settings: Any) -> fastsae.SAEBatch:
    return fastsae.SAEBatch(3, D, M, rule or fastsae.TopK(4), **settings)


OTHER_BATCHES = {
    "rule": (lambda: batch(fastsae.ReLU(l1=1.0)), r"activation\.kind \(got 'topk', expected 'relu'\)"),
    "k of one": (
        lambda: batch([fastsae.TopK(4), fastsae.TopK(5), fastsae.TopK(4)]),
        r"activation\.k \(got 4, expected \[4, 5, 4\]\)",
    ),
    "pre_bias": (lambda: batch(pre_bias=False), r"pre_bias \(got True, expected False\)"),
    "encoder_norm": (lambda: batch(encoder_norm="forward"), r"encoder_norm \(got 'free', expected 'forward'\)"),
    "decoder_norm": (lambda: batch(decoder_norm="forward"), r"decoder_norm \(got 'unit', expected 'forward'\)"),
    "loss": (lambda: batch(loss="fvu"), r"loss \(got 'mse', expected 'fvu'\)"),
}


@pytest.mark.parametrize("case", OTHER_BATCHES)
def test_a_batch_of_saes_records_its_settings_too(case: str) -> None:
    make, message = OTHER_BATCHES[case]
    mine, theirs = make(), batch(seeds=(7, 8, 9))
    before = mine.get_parameter("W_enc").clone()
    with pytest.raises(ValueError, match=message):
        mine.load_state_dict(theirs.state_dict())
    assert torch.equal(mine.get_parameter("W_enc"), before)
    mine.load_state_dict(theirs.state_dict(), allow_other_config=True)
    assert torch.equal(mine.get_parameter("W_enc"), theirs.get_parameter("W_enc"))


def test_a_batch_takes_the_state_of_an_equal_one_and_one_without_settings() -> None:
    rules = [fastsae.TopK(4), fastsae.TopK(5), fastsae.TopK(4)]
    for state in (batch(rules, seeds=(7, 8, 9)).state_dict(), batch(rules, seeds=(4, 5, 6), ghost="pull").state_dict()):
        again = batch(rules)
        assert not (keys := again.load_state_dict(state)).missing_keys + keys.unexpected_keys
        assert torch.equal(again.get_parameter("W_enc"), state["W_enc"])
        state.pop(EXTRA_STATE)
        batch(rules).load_state_dict(state)
    for one, other in ((batch(), fresh()), (fresh(), batch())):
        with pytest.raises(ValueError, match="the state is of an SAE with other settings"):
            one.load_state_dict(other.state_dict())  # type: ignore[attr-defined]


STEPS: dict[str, Any] = {
    "fused": lambda rule, **more: fastsae.FusedTrainStep(fresh(rule), 1e-3, **more),
    "plain": lambda rule, **more: PlainTrainStep(fresh(rule), lr=1e-3, **more),
    "batch": lambda rule, **more: fastsae.BatchTrainStep(batch(rule), 1e-3, **more),
}


@pytest.mark.parametrize("kind", STEPS)
def test_the_state_of_a_step_is_of_one_sae_and_one_optimizer(kind: str) -> None:
    make, x = STEPS[kind], tokens(24, D)
    theirs = make(fastsae.TopK(4))
    theirs(x.float() if kind == "batch" else x)
    state = copy.deepcopy(theirs.state_dict())
    for mine, message in (
        (make(fastsae.TopK(5)), r"activation\.k \(got 4, expected 5\)"),
        (make(fastsae.GroupMax(5)), r"activation\.kind \(got 'topk', expected 'group_max'\)"),
        (make(fastsae.TopK(4), optimizer="adamw"), r"optimizer \(got 'Adam', expected 'AdamW'\)"),
    ):
        before = mine.state_dict()["optimizer"]["param_groups"]
        with pytest.raises(ValueError, match=message):
            mine.load_state_dict(state)
        assert mine.state_dict()["optimizer"]["param_groups"] == before
        mine.load_state_dict(state, allow_other_config=True)
    state.pop("settings")  # of an older fastsae
    make(fastsae.TopK(5)).load_state_dict(state)


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


@pytest.mark.parametrize("nested", [False, True])
def test_a_part_of_a_state_loads_where_it_need_not_be_strict(nested: bool) -> None:
    sae = fresh(seed=4)
    module, prefix = (nn.ModuleDict({"sae": sae}), "sae.") if nested else (sae, "")
    before = {name: t.clone() for name, t in sae.state_dict().items()}
    part = {prefix + "W_enc": decided().W_enc.detach(), prefix + "other": torch.zeros(3)}
    missing, unexpected = module.load_state_dict(part, strict=False)
    assert set(missing) == {prefix + name for name in before if name not in ("W_enc", EXTRA_STATE)}
    assert unexpected == [prefix + "other"]
    assert torch.equal(sae.W_enc, decided().W_enc)
    assert torch.equal(sae.W_dec, before["W_dec"])
    with pytest.raises(RuntimeError, match=r"Missing key.*\n.*Unexpected key"):
        module.load_state_dict(part)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*b_enc"):
        module.load_state_dict({prefix + "W_enc": before["W_enc"], prefix + "b_enc": torch.zeros(3)}, strict=False)
    assert torch.equal(sae.W_enc, decided().W_enc)


def test_a_hook_may_rename_what_a_state_has() -> None:
    sae, state = fresh(seed=4), decided().state_dict()
    state["encoder"] = state.pop("W_enc")
    sae.register_load_state_dict_pre_hook(lambda m, state, *rest: state.update(W_enc=state.pop("encoder")))
    sae.load_state_dict(state)
    assert torch.equal(sae.W_enc, decided().W_enc)


@pytest.mark.parametrize("extra", [torch.zeros(3), torch.zeros(3, dtype=torch.uint8), {"k": 4}, None])
def test_malformed_settings_in_a_state_are_refused(extra: Any) -> None:
    with pytest.raises(ValueError, match=r"_extra_state in the state is .*, expected uint8 \(n,\)"):
        fresh().load_state_dict({**fresh().state_dict(), EXTRA_STATE: extra})


def with_config(state: dict[str, Any], config: dict[str, Any]) -> dict[str, Tensor]:
    return {**state, EXTRA_STATE: torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)}


def test_a_missing_setting_is_accepted_and_an_unknown_one_is_named() -> None:
    state = decided().state_dict()
    config = json.loads(bytes(state[EXTRA_STATE].tolist()))
    config.pop("layers")
    fresh().load_state_dict(with_config(state, config))
    with pytest.raises(ValueError, match=r"colour \(got 'blue', expected 'no such setting'\)"):
        fresh().load_state_dict(with_config(state, {**config, "colour": "blue"}))


BEFORE = {
    "weighted": (fastsae.TopK(4, weighted=True), {}, fastsae.TopK(4)),
    "weighted inside": (
        fastsae.Matryoshka(fastsae.TopK(4, weighted=True), groups=(10, 20)), {},
        fastsae.Matryoshka(fastsae.TopK(4), groups=(10, 20)),
    ),
    "normalize": (fastsae.TopK(4), {"normalize": "standardize"}, fastsae.TopK(4)),
}  # fmt: skip


@pytest.mark.parametrize("name", BEFORE)
def test_a_state_from_before_a_setting_is_not_taken_for_one_with_it(name: str) -> None:
    """It was saved by what the setting's absence meant."""
    rule, settings, plain = BEFORE[name]
    state = fresh(plain, pre_bias=True).state_dict()
    config = json.loads(bytes(state[EXTRA_STATE].tolist()))
    del config["normalize"]
    inside = config["activation"].get("inner", config["activation"])
    del inside["weighted"]
    old = with_config(state, config)
    fresh(plain, pre_bias=True).load_state_dict(old)
    module = fresh(rule, pre_bias=True, **settings)
    with pytest.raises(ValueError, match=rf"{name.split()[0]} \(got (False|'none'), expected (True|'standardize')\)"):
        module.load_state_dict(old)
    module.load_state_dict(old, allow_other_config=True)


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
