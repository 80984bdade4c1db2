"""circuit-tracer's sparse encoders and cross-layer transcoders, accelerated: the library's tensors, entry by entry."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import fastsae
from fastsae.ops.encode import encode_above, encode_topk
from fastsae.swapped import Unsupported
from fastsae.swapped.base import Swapped
from fastsae.swapped.lazy import LazyActs
from tests.accelerate_case import D, K, M, filled, inputs, library, transcoder
from tests.test_accelerate_modules import described, load_without_fastsae
from tests.test_accelerate_trainers import STEPS, distance, permuted, same

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::fastsae.backends.errors.BackendWarning", "ignore::UserWarning"),
]
LAYERS = 3
RULES = ({}, {"rule": "jumprelu"}, {"rule": "jumprelu", "trains": True}, {"rule": "topk"}, {"shift": -1.0})
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
ZEROED: tuple[Any, ...] = (slice(0, 1), slice(0), slice(-3, None), slice(None))


@pytest.fixture(autouse=True)
def _library() -> None:
    library("circuit_tracer")


def close(mine: Tensor, truth: Tensor, dtype: torch.dtype = torch.float64) -> None:
    tight, loose = (1e-9, 1e-11) if dtype == torch.float64 else (2e-5, 2e-5) if dtype == torch.float32 else (0.05, 0.05)
    assert mine.dtype == truth.dtype
    torch.testing.assert_close(mine, truth, rtol=tight, atol=loose)


def same_sparse(mine: Tensor, truth: Tensor, dtype: torch.dtype = torch.float64) -> None:
    """The same entries in the same order, ready for `.indices()`."""
    assert mine.is_coalesced()
    assert mine.shape == truth.shape
    assert torch.equal(mine.indices(), truth.indices())
    close(mine.values(), truth.values(), dtype)


def pair(settings: dict[str, Any], dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    return transcoder(settings, dtype), fastsae.accelerate(transcoder(settings, dtype))


def cross(
    settings: dict[str, Any], dtype: torch.dtype = torch.float64, sizes: tuple[int, int, int] = (LAYERS, M, D),
    shift: float = 1.0,
) -> Any:  # fmt: skip
    """sizes: layers, latents of each, width. shift: by how much biases are lowered."""
    kind = importlib.import_module("circuit_tracer.transcoder.cross_layer_transcoder").CrossLayerTranscoder
    given = {"lazy_decoder": False, **settings}
    module = filled(kind(*sizes, dtype=dtype, **given), "b_enc", shift)
    if given.get("activation_function") == "jump_relu":
        with torch.no_grad():
            threshold = torch.linspace(-0.1, 1.2, sizes[0] * sizes[1], dtype=torch.float64)
            module.activation_function.threshold.copy_(threshold.view(sizes[0], 1, sizes[1])).requires_grad_(False)
    return module


def layers_of(x: Tensor) -> Tensor:
    return torch.stack([x, x.flip(0), -x])


# -- SingleLayerTranscoder --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", RULES, ids=str)
def test_encode_sparse(settings: dict[str, Any], dtype: torch.dtype) -> None:
    theirs, mine = pair(settings, dtype)
    for zeroed in ZEROED:
        for n in (24, 1, 0):
            x = inputs(1, torch.float64, n)  # cast by the transcoder
            with torch.no_grad():
                (truth, vectors), (found, ours) = (module.encode_sparse(x, zeroed) for module in (theirs, mine))
                same_sparse(found, truth, dtype)
                assert torch.equal(ours, vectors)
                for a, b in zip(mine.decode_sparse(found), theirs.decode_sparse(truth), strict=True):
                    close(a, b, dtype)


@pytest.mark.parametrize("settings", RULES[1:4], ids=str)
def test_gradients_of_encode_sparse(settings: dict[str, Any]) -> None:
    """To x, to all parameters and to the threshold. The library's own ReLU cannot go backward through it."""
    grads = []
    for module in pair(settings):
        x = inputs(2).requires_grad_()
        sparse, vectors = module.encode_sparse(x, slice(0, 2))
        recon, scaled = module.decode_sparse(sparse)
        loss = (recon - 1).square().mean() + (sparse.values() * vectors.sum(-1)).sin().sum() + scaled.square().sum()
        loss.backward()
        grads.append([x.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(b, a)


@pytest.mark.parametrize("wide", [False, True])
def test_bfloat16_compares_rounded_pre_acts(wide: bool) -> None:
    """As the library does: a pre-act just over the threshold that rounds down to it is not active."""
    rules = importlib.import_module("circuit_tracer.transcoder.activation_functions")
    module = transcoder({}, torch.bfloat16)
    x, at = inputs(3, torch.bfloat16, 2000), torch.tensor(0.5115, dtype=torch.float32).expand(M).clone()
    module.activation_function = rules.JumpReLU(at if wide else at.bfloat16(), 0.5)
    mine = fastsae.accelerate(copy.deepcopy(module))
    with torch.no_grad():
        truth = module.encode_sparse(x)[0]
        pre = (x.double() @ module.W_enc.double().t() + module.b_enc.double())[1:]
        threshold = module.activation_function.threshold.double()
        assert int(((pre > threshold) != (pre.bfloat16() > threshold)).sum()) > 5, "no pre-act is carried over"
        found = mine.encode_sparse(x)[0]
        same_sparse(found, truth, torch.bfloat16)


def test_the_dense_path_answers_where_top_k_takes_negative_pre_acts() -> None:
    theirs, mine = pair({"rule": "topk"})
    with torch.no_grad():
        for module in (theirs, mine):
            module.b_enc.sub_(2.0)
        truth, found = (module.encode_sparse(inputs(1))[0] for module in (theirs, mine))
        assert bool((truth.values() < 0).any())
        same_sparse(found, truth)
        close(mine.encode(inputs(1)), theirs.encode(inputs(1)))


def test_nothing_dense_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    _, mine = pair({"rule": "jumprelu"})

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("a dense product was computed")

    monkeypatch.setattr(torch.nn.functional, "linear", refuse)
    acts = mine.encode(inputs(1))
    mine.decode(acts)
    mine.encode_sparse(inputs(1))
    assert isinstance(acts, LazyActs)
    assert not acts.is_made
    with pytest.raises(AssertionError, match="a dense product"):
        mine.encode(inputs(1), apply_activation_function=False)


@pytest.mark.parametrize("skip", [False, True])
def test_weights_that_are_read_from_a_file(skip: bool, tmp_path: Path) -> None:
    theirs = transcoder({"skip_connection": skip}, torch.float64)
    path = str(tmp_path / "layer_0.safetensors")
    fastsae.accelerate(copy.deepcopy(theirs)).to_safetensors(path)
    kind = type(theirs)
    how: dict[str, Any] = {"transcoder_path": path, "dtype": torch.float64, "skip_connection": skip}
    lazy = kind(D, M, nn.functional.relu, 0, lazy_encoder=True, lazy_decoder=True, **how)
    lazy.load_state_dict({key: p for key, p in theirs.state_dict().items() if key not in ("W_enc", "W_dec")})
    fastsae.accelerate(lazy)
    assert {"W_enc", "W_dec"}.isdisjoint(dict(lazy.named_parameters()))
    with torch.no_grad():
        x = inputs(4)
        close(lazy(x), theirs(x))
        same_sparse(lazy.encode_sparse(x)[0], theirs.encode_sparse(x)[0])
        recons = [module.decode_sparse(module.encode_sparse(x)[0], x)[0] for module in (theirs, lazy)]
        close(recons[1], recons[0])
    with pytest.raises(Unsupported, match="no parameter of its own for W_enc, W_dec"):
        fastsae.optim.Adam(lazy)


def test_a_set_of_transcoders() -> None:
    kind = importlib.import_module("circuit_tracer.transcoder.single_layer_transcoder").TranscoderSet
    settings = {"rule": "jumprelu", "skip_connection": True}
    theirs, mine = (
        kind({i: transcoder(settings, torch.float64) for i in range(LAYERS)}, "hook_in", "hook_out") for _ in range(2)
    )
    assert fastsae.accelerate(mine) is mine
    assert all(isinstance(one, Swapped) for one in mine)
    x = layers_of(inputs(5))
    with torch.no_grad():
        truth, found = (module.compute_attribution_components(x) for module in (theirs, mine))
        same_sparse(found.pop("activation_matrix"), truth.pop("activation_matrix"))
        for key, value in truth.items():
            close(found[key], value)
        close(mine.encode(x), theirs.encode(x))
        close(mine.decode(mine.encode(x), x), theirs.decode(theirs.encode(x), x))
    assert not any(isinstance(one, Swapped) for one in fastsae.unaccelerate(mine))


def test_what_a_transcoder_may_not_have() -> None:
    module = transcoder({}, torch.float64)
    module.activation_function = nn.GELU()
    with pytest.raises(Unsupported, match="activation_function of the SingleLayerTranscoder is GELU, expected ReLU"):
        fastsae.accelerate(module)
    rules = importlib.import_module("circuit_tracer.transcoder.activation_functions")
    module.activation_function = rules.JumpReLU(torch.zeros(1, M))
    with pytest.raises(Unsupported, match=rf"threshold of JumpReLU has shape \(1, {M}\), expected"):
        fastsae.accelerate(module)
    assert not isinstance(module, Swapped)


# -- CrossLayerTranscoder ---------------------------------------------------------------------------------------------

CROSS = ({}, {"activation_function": "jump_relu"}, {"activation_function": "jump_relu", "skip_connection": True})


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("settings", CROSS, ids=str)
def test_cross_layer_values(settings: dict[str, Any], dtype: torch.dtype) -> None:
    theirs, mine = cross(settings, dtype), fastsae.accelerate(cross(settings, dtype))
    x = layers_of(inputs(1, dtype))
    with torch.no_grad():
        for zeroed in ZEROED:
            (truth, vectors), (found, ours) = (module.encode_sparse(x, zeroed) for module in (theirs, mine))
            same_sparse(found, truth, dtype)
            assert torch.equal(ours, vectors)
        components = [module.compute_attribution_components(x) for module in (theirs, mine)]
        same_sparse(components[1].pop("activation_matrix"), components[0].pop("activation_matrix"), dtype)
        for key, value in components[0].items():
            close(components[1][key], value, dtype)
        close(mine.encode(x) + 0, theirs.encode(x), dtype)
        acts = mine.encode(x)
        truth = theirs.decode(theirs.encode(x), x)
        close(mine.decode(acts, x), truth, dtype)
        assert not acts.is_made
        close(mine.decode(acts.to_sparse(), x), truth, dtype)
        if "skip_connection" not in settings:  # there the library's call asks for inputs that it does not pass
            close(mine(x), theirs(x), dtype)
        for one in (x[1], x[1][0], x[1].view(2, 3, 4, D)):
            close(mine.encode_layer(one, 1) + 0, theirs.encode_layer(one, 1), dtype)
            close(mine.encode_layer(one, 2, False), theirs.encode_layer(one, 2, False), dtype)


@pytest.mark.parametrize("settings", CROSS, ids=str)
def test_cross_layer_gradients(settings: dict[str, Any]) -> None:
    grads = []
    for module in (cross(settings), fastsae.accelerate(cross(settings))):
        x = layers_of(inputs(2)).requires_grad_()
        loss = (module.decode(module.encode(x).to_sparse(), x) - 1).square().mean()
        loss = loss + module.encode_layer(x[1], 1).square().sum() + module.encode(x).sin().sum()
        if settings:
            sparse, vectors = module.encode_sparse(x)
            loss = loss + (sparse.values() * vectors.sum(-1)).sum()
        loss.backward()
        grads.append([x.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(b, a)


def cross_loss(module: Any, x: Tensor) -> Tensor:
    found = module.decode(module.encode(x), x)  # without the positions after the last act, as the library has it
    return (found - x.detach().roll(1, 1)[:, : found.shape[1]]).square().sum(-1).mean()


def cross_run(module: Any, dtype: torch.dtype, lr: float, perm: Tensor | None = None) -> None:
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)
    for i in range(STEPS):
        x = layers_of(inputs(i, dtype))
        cross_loss(module, x if perm is None else x[..., perm]).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("settings", CROSS, ids=str)
def test_cross_layer_steps(settings: dict[str, Any]) -> None:
    theirs, mine = cross(settings), fastsae.accelerate(cross(settings))
    assert isinstance(mine.encode(layers_of(inputs(0))), LazyActs)
    for module in (theirs, mine):
        cross_run(module, torch.float64, 5e-3)
    same(mine, theirs)


@pytest.mark.parametrize("settings", CROSS, ids=str)
def test_cross_layer_drift_in_float32(settings: dict[str, Any]) -> None:
    """No farther from the library's own run than twice what another order of its sums makes of it."""
    theirs = cross(settings, torch.float32)
    start, drifts = copy.deepcopy(theirs), []
    cross_run(theirs, torch.float32, 1e-3)
    for seed in range(3):
        perm = torch.randperm(D, generator=torch.Generator().manual_seed(seed))
        other = permuted(start, perm)
        cross_run(other, torch.float32, 1e-3, perm)
        drifts.append(distance(permuted(other, perm.argsort()), theirs))
    mine = fastsae.accelerate(copy.deepcopy(start))
    cross_run(mine, torch.float32, 1e-3)
    assert distance(mine, theirs) <= 2 * max(drifts)


@hypothesis.settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
@hypothesis.given(
    sizes=st.tuples(st.integers(1, 4), st.integers(2, 50), st.integers(2, 16)), n=st.integers(1, 20),
    rule=st.sampled_from(["relu", "jump_relu"]), skip=st.booleans(), shift=st.floats(-1, 2), seed=st.integers(0, 99),
)  # fmt: skip
def test_cross_layer_loss_and_gradients_of_any_configuration(
    sizes: tuple[int, int, int], n: int, rule: str, skip: bool, shift: float, seed: int
) -> None:
    chosen = {"activation_function": rule, "skip_connection": skip}
    modules = [cross(chosen, sizes=sizes, shift=shift) for _ in "ab"]
    fastsae.accelerate(modules[1])
    x = inputs(seed, n=n * sizes[0], width=sizes[2]).view(sizes[0], n, sizes[2])
    given_x = [x.clone().requires_grad_() for _ in modules]
    with torch.no_grad():
        acts = modules[0].encode(x)
        same_sparse(modules[1].encode_sparse(x, slice(0))[0], acts.to_sparse())
    if not bool((acts != 0).any()) or int(acts.nonzero()[:, 1].max()) < n - 1:
        return  # its decode leaves positions after the last act out, or fails: see the next test
    losses = [cross_loss(module, one) for module, one in zip(modules, given_x, strict=True)]
    close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    close(given_x[1].grad, given_x[0].grad)
    for p, q in zip(*(module.parameters() for module in modules), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            close(q.grad, p.grad)


def test_cross_layer_quirks_of_length() -> None:
    """The library leaves out positions after the last act, and refuses acts that are all 0."""
    theirs, mine = cross({}), fastsae.accelerate(cross({}))
    with torch.no_grad():
        acts = torch.zeros(LAYERS, 9, M, dtype=torch.float64)
        acts[1, 4, 3], acts[0, 2, 5] = 1.5, -2.0
        assert theirs.decode(acts).shape == (LAYERS, 5, D)
        close(mine.decode(acts.to_sparse()), theirs.decode(acts))
        for module in (theirs, mine):
            with pytest.raises((RuntimeError, IndexError, ValueError)):
                module.decode(torch.zeros_like(acts).to_sparse())


def test_cross_layer_object(tmp_path: Path) -> None:
    theirs = cross(CROSS[1])
    mine = fastsae.accelerate(cross(CROSS[1]))
    x = layers_of(inputs(3))
    assert [key for key, _ in mine.named_parameters()] == [key for key, _ in theirs.named_parameters()]
    with torch.no_grad():
        buffer = io.BytesIO()
        torch.save(mine, buffer)
        buffer.seek(0)
        for one in (copy.deepcopy(mine), torch.load(buffer, weights_only=False)):
            close(one.decode(one.encode(x)), theirs.decode(theirs.encode(x)))
        assert type(copy.deepcopy(mine)) is type(mine)
        mine.to_safetensors(str(tmp_path))
        load = importlib.import_module("circuit_tracer.transcoder.cross_layer_transcoder").load_clt
        for lazy in (False, True):
            loaded = load(str(tmp_path), dtype=torch.float64, lazy_decoder=lazy, lazy_encoder=lazy)
            loaded.load_state_dict(
                {key: value for key, value in theirs.state_dict().items() if key in loaded.state_dict()}
            )
            fastsae.accelerate(loaded)
            close(loaded.decode(loaded.encode(x).to_sparse()), theirs.decode(theirs.encode(x)))
            same_sparse(loaded.encode_sparse(x)[0], theirs.encode_sparse(x)[0])
    with pytest.raises(Unsupported, match="CrossLayerTranscoder has no parameter of its own for W_enc"):
        fastsae.optim.Adam(mine)
    assert type(fastsae.unaccelerate(mine)) is type(theirs)


def test_cross_layer_pickle_loads_where_fastsae_is_not_installed(tmp_path: Path) -> None:
    theirs, mine = cross(CROSS[2]), fastsae.accelerate(cross(CROSS[2]))
    written = pickle.dumps(mine)
    assert b"fastsae" not in written
    (tmp_path / "pickle").write_bytes(written)
    described(theirs, mine, tmp_path)
    load_without_fastsae([tmp_path])


def test_positions_that_are_zeroed_are_not_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token of a text has a norm so large that most of its latents are active."""
    seen = []
    base = importlib.import_module("fastsae.swapped.base")
    monkeypatch.setattr(base.ops, "encode_above", lambda x, *a, **k: seen.append(len(x)) or encode_above(x, *a, **k))
    monkeypatch.setattr(base.ops, "encode_topk", lambda x, *a, **k: seen.append(len(x)) or encode_topk(x, *a, **k))
    for settings in ({}, {"rule": "topk"}):
        pair(settings)[1].encode_sparse(inputs(1), slice(0, K))
    assert seen == [24 - K] * 2
