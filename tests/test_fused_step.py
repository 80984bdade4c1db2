"""FusedTrainStep against autograd + torch.optim.Adam + projection + renormalization, all dense."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastsae
from fastsae import ops
from fastsae.codes import Screen
from fastsae.model.sae import SparseAutoencoder
from fastsae.runs.schedules import Schedule
from fastsae.runs.state_tree import join_state, split_state
from fastsae.training.step import FusedTrainStep
from tests import truth
from tests.dense_sae import DenseSAE, moments_of, sae_for_test, tokens
from tests.truth import BACKENDS


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are small, so a second thread would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def kill_some(sae: SparseAutoencoder, every: int = 2) -> None:
    sae.tokens_since_fired[::every] = sae.dead_after


def check(got: Tensor, expected: Tensor, name: str) -> None:
    # atol covers entries that cancel to almost zero beside numbers of order one.
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14, msg=lambda text: f"{name}: {text}")


# -- equality ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["none", "constant", "layer_norm", "standardize"])
@pytest.mark.parametrize("loss", ["mse", "fvu"])
@pytest.mark.parametrize("aux_k", [None, 6])
@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize("tied", [False, True])
def test_float64_steps_equal_autograd_and_adam(tied, pre_bias, decoder_norm, aux_k, loss, normalize):
    sae = sae_for_test(
        d_sae=60, k=3, tied=tied, pre_bias=pre_bias, decoder_norm=decoder_norm, aux_k=aux_k, aux_coef=0.5, loss=loss,
        normalize=normalize, dead_after=1000,
    )  # fmt: skip
    kill_some(sae)
    dense = DenseSAE(sae)
    step = FusedTrainStep(sae, lr=1e-3)
    # A wrong gradient shows in the weights at the second step only: Adam's first step is lr·sign(g).
    for seed in (1, 2):
        x = tokens(16, 10, seed)
        metrics, truth = step(x), dense.step(x)
        for name in ("loss", loss, "grad_norm") + (("aux",) if aux_k else ()):
            check(metrics[name], truth[name].detach(), name)
        for name, p in sae.named_parameters():
            check(p.detach(), dense.params[name].detach(), f"{name} after step {seed}")
        for name, moment in dense.moments().items():
            check(moments_of(step)[name], moment, name)
        assert torch.equal(sae.tokens_since_fired, dense.since)
        assert int(metrics["dead"]) == int((dense.since >= 1000).sum())
        assert float(metrics["l0"]) == float((truth["A"] != 0).sum() / 16)
    assert (aux_k is None) or float(metrics["aux"]) > 0, "the case should train dead latents"


@pytest.mark.parametrize("normalize", ["none", "constant"])
def test_a_transcoder_step_equals_autograd_and_adam(normalize):
    sae = sae_for_test(d_out=7, pre_bias=False, aux_k=5, dead_after=1000, normalize=normalize)
    kill_some(sae)
    dense, step = DenseSAE(sae), FusedTrainStep(sae, lr=1e-3)
    for seed in (1, 2):
        x, y = tokens(24, 10, seed), tokens(24, 7, seed + 10)
        metrics, truth = step(x, target=y), dense.step(x, y)
        check(metrics["loss"], truth["loss"].detach(), "loss")
    for name, p in sae.named_parameters():
        check(p.detach(), dense.params[name].detach(), name)


def test_pre_bias_with_a_target_of_the_same_width():
    sae = sae_for_test(pre_bias=True, tied=True)
    dense, step = DenseSAE(sae), FusedTrainStep(sae, lr=1e-3)
    for seed in (1, 2):
        x, y = tokens(24, 10, seed), tokens(24, 10, seed + 10)
        check(step(x, target=y)["loss"], dense.step(x, y)["loss"].detach(), "loss")
    for name, p in sae.named_parameters():
        check(p.detach(), dense.params[name].detach(), name)


def test_leading_batch_dimensions_are_tokens():
    one, other = sae_for_test(), sae_for_test()
    x = tokens(24, 10)
    flat, shaped = FusedTrainStep(one)(x), FusedTrainStep(other)(x.view(2, 3, 4, 10))
    assert torch.equal(flat["loss"], shaped["loss"])
    assert torch.equal(one.W_enc, other.W_enc)


def large(**settings) -> SparseAutoencoder:
    return sae_for_test(d_in=32, d_sae=192, k=8, dtype=torch.float32, **settings)


def steps_for(backend: str) -> int:
    """Two hundred, or as many as interpreted and emulated kernels manage in a few seconds (`--all-interpreted`)."""
    return 8 if backend in truth.GPU and not torch.cuda.is_available() else 200


@pytest.mark.few_cases
@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
def test_200_fp32_steps_drift_no_more_than_the_order_of_summation(backend):
    """The fused run may differ from a dense run at most twice as much as dense runs with other orders of summation."""
    order = [torch.randperm(32, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    runs = [DenseSAE(large(), permute=permute) for permute in (None, *order)]
    sae = large()
    step = FusedTrainStep(sae, lr=1e-3, backend=backend)
    curves: list[list[float]] = [[] for _ in range(4)]
    for seed in range(steps_for(backend)):
        x = tokens(64, 32, seed, torch.float32)
        curves[3].append(float(step(x)["loss"]))
        for i, dense in enumerate(runs):
            curves[i].append(float(dense.step(x)["loss"].detach()))

    def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return max(float((a[name] - b[name]).detach().norm() / a[name].detach().norm()) for name in a)

    def gap(i: int, j: int) -> float:
        return max(abs(a - b) / a for a, b in zip(curves[i], curves[j], strict=True))

    assert len(curves[0]) < 200 or curves[0][-1] < 0.5 * curves[0][0], "the runs should learn something"
    weights = [run.params for run in runs]
    drift = max(distance(weights[0], other) for other in weights[1:])
    fused = distance(weights[0], dict(sae.named_parameters()))
    rounding = 2**-22  # a few units in the last place: all that a few steps differ by
    assert fused <= 2 * drift + rounding, f"weights: fused differs by {fused:.2e}, dense runs by {drift:.2e}"
    loss_drift = max(gap(0, i) for i in (1, 2))
    assert gap(0, 3) <= 2 * loss_drift, f"loss: fused differs by {gap(0, 3):.2e}, dense runs by {loss_drift:.2e}"


@pytest.mark.few_cases
@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_moments_follow_the_loss_curve(backend):
    held_out = tokens(1024, 32, 999, torch.float32)
    curves: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for moments, curve in curves.items():
        sae = large()
        step = FusedTrainStep(sae, lr=1e-3, moments=moments, backend=backend)
        steps = steps_for(backend)
        for seed in range(steps):
            step(tokens(64, 32, seed, torch.float32))
            if seed % (steps // 4) == steps // 4 - 1:
                with torch.no_grad():
                    curve.append(float(sae(held_out).loss))
    assert moments_of(step)["W_enc.exp_avg_sq"].dtype == torch.bfloat16
    worst = max(abs(a - b) / a for a, b in zip(curves["fp32"], curves["bf16"], strict=True))
    assert worst < 0.005, f"bf16 moments moved the loss on held-out rows by {worst:.2%}"


def test_the_decoder_keeps_unit_norm_and_free_does_not():
    for decoder_norm in ("unit", "free"):
        sae = large(decoder_norm=decoder_norm)
        step = FusedTrainStep(sae, lr=1e-2)
        for seed in range(5):
            step(tokens(64, 32, seed, torch.float32))
        off = float((sae.W_dec.detach().norm(dim=1) - 1).abs().max())
        assert (off < 1e-6) if decoder_norm == "unit" else (off > 1e-2)


def test_a_schedule_sets_the_rate():
    schedule = Schedule(total=10, warmup=4, decay="linear", decay_fraction=0.5)
    step = FusedTrainStep(sae_for_test(), lr=1e-3, schedule=schedule)
    rates = [float(step(tokens(16, 10, seed))["lr"]) for seed in range(10)]
    assert rates == pytest.approx([1e-3 * schedule(t) for t in range(10)])
    step.lr.fill_(1.0)
    step.schedule = None
    assert float(step(tokens(16, 10))["lr"]) == 1.0


# -- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_state_restores_bit_exactly_in_the_middle(moments):
    def make(seed: int) -> tuple[SparseAutoencoder, FusedTrainStep]:
        sae = large(seed=seed, aux_k=4, dead_after=200)
        return sae, FusedTrainStep(sae, lr=1e-3 * (1 + seed), moments=moments, seed=5 + seed)

    def train(step: FusedTrainStep, seeds: range) -> list[float]:
        return [float(step(tokens(64, 32, seed, torch.float32))["loss"]) for seed in seeds]

    sae, step = make(0)
    train(step, range(8))
    module, optimizer = copy.deepcopy(sae.state_dict()), copy.deepcopy(step.state_dict())
    plain, tensors = split_state(optimizer)  # as a checkpoint stores it: JSON and tensors
    plain = json.loads(json.dumps(plain))
    ahead = train(step, range(8, 16))

    resumed, resumed_step = make(3)
    resumed.load_state_dict(module)
    resumed_step.load_state_dict(join_state(plain, tensors))
    assert train(resumed_step, range(8, 16)) == ahead
    for name, value in sae.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    for name, value in moments_of(step).items():
        assert torch.equal(value, moments_of(resumed_step)[name]), name


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "lion", "signsgd"])
def test_every_optimizer_takes_its_own_state(optimizer):
    step, other = (FusedTrainStep(sae_for_test(), optimizer=optimizer) for _ in range(2))
    step(tokens(16, 10))
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    other.sae.load_state_dict(step.sae.state_dict())
    for each in (step, other):
        each(tokens(16, 10))
    assert torch.equal(step.sae.W_dec, other.sae.W_dec)
    assert int(other.count) == 2


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    step = FusedTrainStep(sae_for_test())
    step(tokens(16, 10))
    good = copy.deepcopy(step.state_dict())

    def changed(edit) -> dict:
        state = copy.deepcopy(good)
        edit(state["optimizer"]["state"])
        return state

    cases = {
        "keys": {name: value for name, value in good.items() if name != "seed"},
        "format": good | {"format": 99},
        r"expected .*'exp_avg_sq'": changed(lambda state: state["b_enc"].pop("exp_avg_sq")),
        "moments of 3 of 4 parameters": changed(lambda state: state.pop("b_enc")),
        r"exp_avg of W_enc is \(3, 3\) on cpu": changed(lambda state: state["W_enc"].update(exp_avg=torch.zeros(3, 3))),
        r"exp_avg of parameter 1 is torch.bfloat16": changed(
            lambda state: state["W_enc"].update(exp_avg=state["W_enc"]["exp_avg"].bfloat16())
        ),
    }
    before = copy.deepcopy(moments_of(step))
    for message, state in cases.items():
        with pytest.raises(ValueError, match=message):
            step.load_state_dict(state)
    for name, value in before.items():
        assert torch.equal(value, moments_of(step)[name])


# -- weights written outside the step ---------------------------------------------------------------------------------


def edit_data(sae: SparseAutoencoder) -> None:
    sae.encoder_weight.data.mul_(-1)


def edit_one_row_data(sae: SparseAutoencoder) -> None:
    sae.encoder_weight.data[3] += 5.0


def edit_bias_data(sae: SparseAutoencoder) -> None:
    sae.b_enc.data[7] += 30.0


def edit_state_dict(sae: SparseAutoencoder) -> None:
    sae.load_state_dict(large(seed=11).state_dict())


def edit_by_hand(sae: SparseAutoencoder) -> None:
    params = list(sae.parameters())
    grads = torch.autograd.grad(sae(tokens(64, 32, 50, torch.float32)).loss, params)  # this leaves the ledger alone
    with torch.no_grad():
        for p, grad in zip(params, grads, strict=True):
            p.sub_(0.5 * grad)


def edit_beside_the_sample(sae: SparseAutoencoder) -> None:
    """Edits a weight that the fingerprint does not sample; torch's version counter sees the write."""
    with torch.no_grad():
        sae.encoder_weight[3, 0] += 5.0


EDITS = [
    edit_beside_the_sample,
    edit_data,
    edit_one_row_data,
    edit_bias_data,
    edit_state_dict,
    edit_by_hand,
]


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "edit",
    # What sees an edit is the same on every backend, so two of them say that a GPU's backend asks.
    [pytest.param(edit, marks=[] if i < 2 else pytest.mark.few_cases) for i, edit in enumerate(EDITS)],
    ids=lambda edit: edit.__name__,
)
def test_edited_weights_are_seen(edit, backend):
    """After an edit between steps, the next step equals that of a fresh dense truth on the edited weights."""
    sae = large()
    sae.backend = backend
    step = FusedTrainStep(sae, lr=1e-3, backend=backend)
    step(tokens(64, 32, 1, torch.float32))
    edit(sae)
    dense = DenseSAE(sae)
    x = tokens(64, 32, 2, torch.float32)
    truth = dense.losses(x, count=False)
    codes = sae.encode(x)
    torch.testing.assert_close(codes.to_dense(), truth["A"].detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(step(x)["loss"].float(), truth["loss"].detach(), rtol=1e-4, atol=0)
    after = DenseSAE(sae).losses(x, count=False)["loss"].detach()
    torch.testing.assert_close(step(x)["loss"].float(), after, rtol=1e-4, atol=0)


def test_the_screen_is_rebuilt_exactly_when_the_weights_were_written(monkeypatch):
    made = []

    def prepare(W: Tensor, b: Tensor | None = None, *, x: Tensor, k: int, backend: str | None = None) -> Screen:
        made.append(W.detach().clone())
        return Screen([W.detach().clone()], "reference/copy")

    monkeypatch.setattr(ops, "prepare_screen", prepare)
    sae = large()
    sae.backend = "reference"
    step = FusedTrainStep(sae, backend="reference")
    for seed in range(3):
        step(tokens(16, 32, seed, torch.float32))
    assert len(made) == 1, "an update should maintain the screen, and only the first step build one"
    for i, edit in enumerate(EDITS):
        edit(sae)
        step(tokens(16, 32, 4, torch.float32))
        step(tokens(16, 32, 5, torch.float32))
        assert len(made) == 2 + i, f"{edit.__name__}: the screen was built {len(made)} times, expected {2 + i}"
    step.refresh(tokens(16, 32, 6, torch.float32))
    assert len(made) == 2 + len(EDITS)
    assert torch.equal(made[-1], sae.W_enc)


# -- what a step refuses and leaves alone -----------------------------------------------------------------------------


def test_bad_settings_are_refused():
    sae = sae_for_test()
    for message, settings in {
        "moments is 'fp8'": {"moments": "fp8"},
        "lr is -1": {"lr": -1.0},
        "0 <= beta < 1": {"betas": (0.9, 1.0)},
        "eps is nan": {"eps": float("nan")},
    }.items():
        with pytest.raises(ValueError, match=message):
            FusedTrainStep(sae, **settings)
    sae.b_enc.requires_grad_(False)
    with pytest.raises(ValueError, match="b_enc do not require a gradient"):
        FusedTrainStep(sae)


def test_bad_batches_are_refused_and_change_nothing():
    sae = sae_for_test()
    step = FusedTrainStep(sae, check=True)
    before = copy.deepcopy(sae.state_dict())
    nan = tokens(8, 10)
    nan[3, 2] = float("nan")
    for message, x in {"empty batch": tokens(0, 10), r"expected \(\*batch, 10\)": tokens(8, 9), "NaN": nan}.items():
        with pytest.raises(ValueError, match=message):
            step(x)
    with pytest.raises(fastsae.BackendError, match="cuda"):
        FusedTrainStep(copy.deepcopy(sae), backend="cuda")(tokens(8, 10))
    sae.loss = "fvu"
    with pytest.raises(ValueError, match="divides by the variance of the batch; got 1 tokens"):
        step(tokens(1, 10))
    assert int(step.count) == 0
    before.pop("_extra_state")  # it holds the loss, which this test has changed
    for name, value in before.items():
        assert torch.equal(value, sae.state_dict()[name]), name


def test_a_module_that_moved_needs_a_new_step():
    sae = sae_for_test(dtype=torch.float32)
    step = FusedTrainStep(sae)
    sae.double()
    with pytest.raises(RuntimeError, match="make a new optimizer after moving"):
        step(tokens(8, 10))


def test_no_dead_latents_cost_no_second_encode(monkeypatch):
    calls = []
    real = ops.encode_topk
    monkeypatch.setattr(ops, "encode_topk", lambda *args, **more: calls.append(more.get("rows")) or real(*args, **more))
    sae = sae_for_test(aux_k=5, dead_after=1000)
    step = FusedTrainStep(sae)
    metrics = step(tokens(16, 10))
    assert calls == [None]
    assert float(metrics["aux"]) == 0.0
    kill_some(sae)
    step(tokens(16, 10))
    assert len(calls) == 3
    assert calls[2].dtype == torch.int32
