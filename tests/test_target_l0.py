"""An L0 that is asked for: thresholds from data, the penalty's driven weight, BatchTopK's threshold at inference."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastsae
from fastsae.model.calibrate import PIECE, Tail
from fastsae.model.files import WEIGHTS
from fastsae.model.rules import Activation
from fastsae.model.rules.threshold import DEFAULT_L0, INTEGRAL, PROPORTIONAL, REWARD, SMOOTH, START, START_L0
from fastsae.runs.trainer import TrainConfig, Trainer
from fastsae.training.batch import SAEBatch
from fastsae.training.step import FusedTrainStep, PlainTrainStep
from tests.family_case import D, M, family_sae, tokens
from tests.train_case import BATCH, D_IN, rows, source

pytestmark = pytest.mark.usefixtures("one_thread")

FIXTURE = Path(__file__).parent / "fixtures" / "activations.safetensors"
TARGETED: dict[str, Any] = {
    "relu": fastsae.ReLU,
    "gated": fastsae.Gated,
    "jumprelu": fastsae.JumpReLU,
    "jumprelu-tanh": lambda **more: fastsae.JumpReLU(penalty_kind="tanh", **more),
    "jumprelu-target": lambda **more: fastsae.JumpReLU(penalty_kind="target", **more),
}
DRIVEN = [name for name in TARGETED if name != "jumprelu-target"]


@pytest.fixture(scope="module")
def real() -> Tensor:
    """Every twelfth direction of a language model's residual stream, and the two largest: rows (2048, 48)."""
    x = load_file(FIXTURE)["activations"].float()
    return torch.cat([x[:, ::12][:, :46], x[:, [247, 507]]], 1)


# -- BatchTopK's threshold --------------------------------------------------------------------------------------------


def test_the_running_threshold_is_a_mean_whose_weights_sum_to_one() -> None:
    rule, made = fastsae.BatchTopK(2, decay=0.5), torch.tensor(True)
    state = rule.new_buffers()
    for least, expected in ((8.0, 8.0), (2.0, (4 + 2) / 1.5 - 0.0), (math.inf, 4.0), (6.0, (2 + 1 + 6) / 1.75)):
        rule.observe(torch.tensor(least), state, made)
        assert float(state["threshold"]) == pytest.approx(expected, rel=1e-6)
    assert float(state["threshold_weight"]) == 1 - 0.5**3  # a batch without an act above 0 does not count


def test_after_one_batch_the_mean_is_its_value_bit_for_bit() -> None:
    for decay in (0.0, 0.3, 0.9, 0.999):
        state = fastsae.BatchTopK(2, decay=decay).new_buffers()
        fastsae.BatchTopK(2, decay=decay).observe(torch.tensor(1.2345678), state, torch.tensor(True))
        assert torch.equal(state["threshold"], torch.tensor(1.2345678))


def test_the_tail_by_hand() -> None:
    tail = Tail(torch.device("cpu"))
    tail.add(torch.tensor([[1.0, -5.0, 0.0], [2.0, 4.0, 8.0]]))
    tail.add(torch.tensor([3.0]))
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 8.0])
    for wanted in range(1, 6):
        assert int((values > tail.bar(wanted)).sum()) == wanted
    assert tail.bar(2.4) == tail.bar(2)
    assert tail.bar(6) == 0
    assert 3 < tail.bar(2) < 4


@pytest.mark.parametrize("rule", [
    fastsae.BatchTopK(16), fastsae.Matryoshka(fastsae.BatchTopK(16), groups=(64, 192)),
], ids=lambda rule: rule.kind)  # fmt: skip
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_calibrated_is_a_mean_l0_of_k_whatever_the_blocks(rule: Activation, normalize: str, real: Tensor) -> None:
    sae = fastsae.SparseAutoencoder(48, 256, rule, seed=0, normalize=normalize).init_from_(real)
    assert sae.calibrate_threshold_(real) is sae
    found = float(sae.eval().encode(real).l0.double().mean())
    assert found == pytest.approx(16, rel=3e-3)
    threshold = float(sae.threshold)
    sae.calibrate_threshold_((block for block in real.view(4, 2, 256, 48)), batch_size=100)
    assert float(sae.threshold) == pytest.approx(threshold, rel=2**-11)
    assert float(sae.threshold_weight) == 1


def test_calibrating_keeps_no_block_of_all_rows(real: Tensor, monkeypatch) -> None:
    monkeypatch.setattr("fastsae.model.calibrate.PIECE", 256 * 10)
    sae = fastsae.SparseAutoencoder(48, 256, fastsae.BatchTopK(16), seed=0)
    largest = []
    plain = Tail.add
    monkeypatch.setattr(Tail, "add", lambda self, z: largest.append(z.numel()) or plain(self, z))
    sae.calibrate_threshold_(real)
    assert max(largest) <= 256 * 10 < PIECE


def test_calibrating_is_refused_where_it_has_no_meaning() -> None:
    with pytest.raises(ValueError, match="has no running threshold to calibrate; only BatchTopK has one"):
        family_sae(fastsae.TopK(3)).calibrate_threshold_(tokens())
    sae = family_sae(fastsae.BatchTopK(3))
    with pytest.raises(ValueError, match="got no rows"):
        sae.calibrate_threshold_(tokens()[:0])
    with pytest.raises(ValueError, match="not finite on the rows to calibrate on"):
        sae.calibrate_threshold_(tokens() * float("nan"))
    assert float(sae.threshold) == -1


def test_a_run_ends_with_the_threshold_of_its_last_weights(tmp_path: Path) -> None:
    """Few steps and many: the mean L0 on rows that were not trained on is k."""
    for steps in (12, 60):
        sae = fastsae.SparseAutoencoder(D_IN, 96, fastsae.BatchTopK(6), seed=0)
        result = Trainer(sae, source(), TrainConfig(steps=steps, batch_size=BATCH, lr=3e-3, tensorboard=False,
                         progress=False), tmp_path / str(steps)).run()  # fmt: skip
        assert result.evaluation is not None
        assert result.evaluation["l0"] == pytest.approx(6, rel=0.1)
        assert result.evaluation["asked_l0"] == 6
        assert float(fastsae.load(result.checkpoint).threshold) == float(sae.threshold)


def test_an_older_file_is_read_with_a_word_about_its_threshold(tmp_path: Path) -> None:
    sae = family_sae(fastsae.BatchTopK(3, decay=0.999), dtype=torch.float32)
    fastsae.save(sae, tmp_path)
    for threshold, weight in ((-1.0, 0.0), (0.25, 1.0)):
        tensors = load_file(tmp_path / WEIGHTS)
        header = {"fastsae": (tmp_path / "config.json").read_text().strip()}
        tensors.pop("threshold_weight", None)
        save_file({**tensors, "threshold": torch.tensor(threshold)}, tmp_path / WEIGHTS, metadata=header)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = fastsae.load(tmp_path)
        assert [str(w.message)[:40] for w in caught] == (["this state's BatchTopK threshold 0.25 is"] if weight else [])
        assert (float(loaded.threshold), float(loaded.threshold_weight)) == (threshold, weight)
    state = sae.state_dict()
    family_sae(fastsae.BatchTopK(3), dtype=torch.float32).load_state_dict(state)  # decay is a setting of training


# -- where a rule starts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("l0", [10.0, 50.0])
@pytest.mark.parametrize("name", TARGETED)
def test_the_first_batch_has_the_l0_that_is_asked_for(name: str, l0: float, real: Tensor) -> None:
    sae = fastsae.SparseAutoencoder(48, 512, TARGETED[name](target_l0=l0), seed=0)
    assert not sae.started
    sae.calibrate_(real).init_from_(real)
    out = sae(real)
    assert sae.started
    assert float(out.codes.l0.double().mean()) == pytest.approx(l0, rel=0.01)
    # Latents fire about equally often, although two directions have half of the variance.
    often = sae.counts_of(out.codes).double() / len(real)
    assert float(often.max()) < 4 * l0 / 512
    zero = float((sae.inputs(real).target - sae.inputs(real).target.mean(0)).square().sum(1).mean())
    losses = {key: float(value.detach()) for key, value in out.losses.items()}
    assert losses["mse"] < zero
    share = float(sae.penalty_weight) * losses["sparsity"] / zero
    if name != "jumprelu-target":
        assert share == pytest.approx(START_L0 if name.startswith("jump") else START, rel=1e-4)


@pytest.mark.parametrize("settings", [
    {"loss": "fvu"}, {"tied": True}, {"pre_bias": False}, {"decoder_norm": "free", "init_norm": 0.3},
    {"normalize": "none"}, {"normalize": "layer_norm"}, {"dtype": torch.bfloat16}, {"skip": True, "layers": 2},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", ["relu", "gated", "jumprelu"])
def test_it_starts_so_in_every_structure(name: str, settings: dict, real: Tensor) -> None:
    sae = fastsae.SparseAutoencoder(48, 256, TARGETED[name](target_l0=8.0), seed=0, **settings)
    step = FusedTrainStep(sae, lr=1e-3)
    assert float(step(real[:512])["l0"]) == pytest.approx(8, rel=0.03 if "dtype" not in settings else 0.1)
    assert math.isfinite(float(step(real[512:1024])["loss"]))


def test_a_transcoder_starts_from_its_target(real: Tensor) -> None:
    sae = fastsae.SparseAutoencoder(48, 256, fastsae.JumpReLU(target_l0=8.0), d_out=9, seed=0)
    metrics = FusedTrainStep(sae, lr=1e-3)(real[:512], real[:512, :9])
    assert float(metrics["l0"]) == pytest.approx(8, rel=0.01)


def test_rows_that_are_not_finite_do_not_count_and_two_are_needed(real: Tensor) -> None:
    x = real[:512].clone()
    x[::7] = float("nan")
    bad, good = (fastsae.SparseAutoencoder(48, 256, fastsae.JumpReLU(), seed=0) for _ in range(2))
    bad.start_(x)
    good.start_(x[torch.isfinite(x).all(-1)])
    assert all(torch.equal(a, b) for a, b in zip(bad.state_dict().values(), good.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="has 1 finite rows"):
        fastsae.SparseAutoencoder(48, 256, fastsae.JumpReLU(), seed=0).start_(x[:2])


def test_it_starts_once_and_a_loaded_one_does_not_start_again(real: Tensor, tmp_path: Path) -> None:
    sae = fastsae.SparseAutoencoder(48, 64, fastsae.Gated(target_l0=4.0), seed=0)
    sae.start_(real[:512])
    before = {name: t.clone() for name, t in sae.state_dict().items()}
    sae.start_(100 * real[512:])
    assert all(torch.equal(t, before[name]) for name, t in sae.state_dict().items())
    fastsae.save(sae, tmp_path)
    other = fastsae.SparseAutoencoder(48, 64, fastsae.Gated(target_l0=4.0), seed=1)
    assert not other.started
    other.load_state_dict(before)
    for loaded in (fastsae.load(tmp_path), copy.deepcopy(sae), other):
        assert loaded.started
    other.reset_parameters(1)
    assert not other.started


@pytest.fixture
def compiler() -> None:
    """Without what an earlier test compiled: a graph with breaks also serves a module that asks for one without."""
    torch.compiler.reset()


@pytest.mark.usefixtures("compiler")
def test_a_compiled_module_starts_outside_its_graph(real: Tensor) -> None:
    x = real[:256]
    plain, compiled = (fastsae.SparseAutoencoder(48, 64, fastsae.JumpReLU(target_l0=4.0), seed=0) for _ in range(2))
    run = torch.compile(compiled, backend="eager")
    for _ in range(2):
        for sae, forward in ((plain, plain), (compiled, run)):
            sae.zero_grad()
            forward(x).loss.backward()
        torch.testing.assert_close(compiled.W_enc.grad, plain.W_enc.grad)
    assert compiled.started
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[key], value)


@pytest.mark.usefixtures("compiler")
def test_a_graph_without_a_break_says_what_to_call_first(real: Tensor, tmp_path: Path) -> None:
    """A loaded one needs nothing: what was started stays so, under the names of the wrapper too."""
    x = real[:256]
    sae, loaded = (fastsae.SparseAutoencoder(48, 64, fastsae.JumpReLU(target_l0=4.0), seed=seed) for seed in (0, 1))
    run = torch.compile(sae, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"for a graph without a break, call sae\.start_\(x\) on a batch before"):
        run(x)
    assert not sae.started
    sae.start_(x)
    loss = float(run(x).loss.detach())
    torch.save(run.state_dict(), tmp_path / "state.pt")
    again = torch.compile(loaded, backend="eager", fullgraph=True)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert loaded.started
    assert float(again(x).loss.detach()) == pytest.approx(loss, rel=1e-6)
    assert torch.equal(loaded.log_threshold, sae.log_threshold)


def test_what_a_rule_is_given_and_what_it_makes_of_nothing() -> None:
    assert fastsae.ReLU().target_l0 == fastsae.Gated().target_l0 == fastsae.JumpReLU().target_l0 == DEFAULT_L0
    assert fastsae.ReLU(2.0).target_l0 is None
    assert not fastsae.ReLU(2.0).from_data
    assert not fastsae.JumpReLU(0.1, threshold=1.0).from_data
    assert fastsae.JumpReLU(0.1).from_data
    for make in (lambda: fastsae.ReLU(1.0, target_l0=3.0), lambda: fastsae.JumpReLU(1.0, target_l0=3.0)):
        with pytest.raises(ValueError, match=r"and target_l0 = 3.0: the target drives l.; give one of them"):
            make()
    with pytest.raises(ValueError, match=r"Gated has target_l0 = 0.0, expected a number above 0"):
        fastsae.Gated(target_l0=0.0)
    with pytest.raises(ValueError, match=r"ReLU has target_l0 = 41.0, expected at most d_sae = 40"):
        fastsae.SparseAutoencoder(D, M, fastsae.ReLU(target_l0=41.0))
    with pytest.raises(ValueError, match="a batch of SAEs cannot adjust a penalty"):
        SAEBatch(2, D, M, fastsae.ReLU())
    assert fastsae.SparseAutoencoder(D, M, fastsae.ReLU()).config["normalize"] == "constant"
    assert fastsae.SparseAutoencoder(D, M, fastsae.ReLU(1.0)).config["normalize"] == "none"
    assert fastsae.SparseAutoencoder(D, M, fastsae.ReLU(), normalize="none").config["normalize"] == "none"


# -- the controller ---------------------------------------------------------------------------------------------------


def test_the_weight_by_hand() -> None:
    rule = fastsae.ReLU(target_l0=10.0)
    state = rule.new_buffers()
    made = torch.tensor(True)
    assert float(rule.weight(state)) == 1
    # The first batch: the mean is its L0, and nothing changed yet.
    rule.steer(state, torch.tensor(20.0, dtype=torch.float64), made)
    first = math.log(2)
    assert float(state["log_coef"]) == pytest.approx(INTEGRAL * first)
    # The second: a mean of two whose weights are SMOOTH and 1.
    rule.steer(state, torch.tensor(5.0, dtype=torch.float64), made)
    second = math.log((SMOOTH * 20 + 5) / (1 + SMOOTH) / 10)
    expected = INTEGRAL * (first + second) + PROPORTIONAL * (second - first)
    assert float(state["log_coef"]) == pytest.approx(expected)
    # A step that was not made changes nothing.
    before = {name: t.clone() for name, t in state.items()}
    rule.steer(state, torch.tensor(40.0, dtype=torch.float64), torch.tensor(False))
    assert all(torch.equal(t, before[name]) for name, t in state.items())
    # Nothing active at all, and everything: the error is held.
    low, high = (rule.new_buffers() for _ in range(2))
    for _ in range(3):
        rule.steer(low, torch.tensor(0.0, dtype=torch.float64), made)
        rule.steer(high, torch.tensor(1e6, dtype=torch.float64), made)
    assert float(low["log_coef"]) == pytest.approx(-3 * INTEGRAL)
    assert float(high["log_coef"]) == pytest.approx(3 * INTEGRAL)
    # At its target it rests.
    at = rule.new_buffers()
    rule.steer(at, torch.tensor(10.0, dtype=torch.float64), made)
    assert float(at["log_coef"]) == 0


def jump_state(start: float) -> tuple[fastsae.JumpReLU, dict[str, Tensor]]:
    """A JumpReLU whose first weight is start, and its buffers."""
    rule = fastsae.JumpReLU(target_l0=10.0)
    state = rule.new_buffers()
    rule.start_weight(state, start / START_L0, 1.0)
    return rule, state


def test_the_weight_below_its_start_by_hand() -> None:
    rule, state = jump_state(3.0)
    start = float(state["log_start"])
    assert start == float(state["log_coef"]) == pytest.approx(math.log(3))

    def at(log_coef: float) -> float:
        state["log_coef"].fill_(log_coef)
        return float(rule.weight(state))

    assert at(start) == pytest.approx(3)
    assert at(start + 1) == pytest.approx(3 * math.e)
    assert at(start - math.log(2)) == pytest.approx(0, abs=1e-12)
    assert at(start - math.log(4)) == pytest.approx(-6)
    for side in (-1e-6, 1e-6):  # one slope on both sides
        assert (at(start + side) - at(start)) / side == pytest.approx(3, rel=1e-5)


def test_a_weight_ends_at_its_largest_reward_and_turns_around_at_once() -> None:
    rule, state = jump_state(3.0)
    made = torch.tensor(True)
    for _ in range(200):
        rule.steer(state, torch.tensor(1.0, dtype=torch.float64), made)
    assert float(rule.weight(state)) == pytest.approx(-3 * REWARD)
    rule.steer(state, torch.tensor(20.0, dtype=torch.float64), made)
    assert float(rule.weight(state)) > -3 * REWARD


@pytest.mark.parametrize("name", ["relu", "gated", "jumprelu-tanh"])
def test_a_penalty_of_acts_is_never_a_reward(name: str) -> None:
    """Their reward would enlarge acts."""
    rule = TARGETED[name](target_l0=10.0)
    state = rule.new_buffers()
    assert "log_start" not in state
    rule.start_weight(state, 1.0, 1.0)
    for _ in range(200):
        rule.steer(state, torch.tensor(1.0, dtype=torch.float64), torch.tensor(True))
    assert 0 < float(rule.weight(state)) < 1e-3


@pytest.mark.parametrize("drift", [1 / 45, 0.2])
@pytest.mark.parametrize("held", [2.0, 0.1, -0.1, -1.0])
def test_the_gains_on_an_l0_that_drifts(held: float, drift: float) -> None:
    """log L0 drifts by the distance of the weight from the one that holds it, here in its first value; a held one below
    0 is a free L0 below the target. L0 leaves its target, returns within 300 batches, and does not swing around it.
    """
    rule, state = jump_state(3.0)
    target, made, away = math.log(10), torch.tensor(True), []
    for _ in range(300):
        rule.steer(state, torch.tensor(math.exp(target + sum(away[-1:])), dtype=torch.float64), made)
        away.append(sum(away[-1:]) - drift * (float(rule.weight(state)) / 3 - held))
    side = 1 if held > 1 else -1
    assert max(side * a for a in away) > 0.2
    assert max(-side * a for a in away) < 0.01
    assert abs(away[-1]) < 0.01


def test_an_l0_above_the_free_one_is_reached_by_a_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of two or three of 16 directions, which the squared error alone reconstructs with fewer latents."""
    made = torch.Generator().manual_seed(1)
    directions = torch.nn.functional.normalize(torch.randn(16, 16, generator=made), dim=1)
    x = (torch.rand(2048, 16, generator=made) * (torch.rand(2048, 16, generator=made) < 3 / 16)) @ directions

    def ends(scale: float) -> tuple[float, float]:
        sae = fastsae.SparseAutoencoder(16, 64, fastsae.JumpReLU(target_l0=12.0), seed=1)
        step = FusedTrainStep(sae, lr=3e-3, schedule=fastsae.Schedule(200, 0, "linear", 0.2))
        order = torch.Generator().manual_seed(0)
        seen = [step(scale * x[torch.randint(2048, (128,), generator=order)]) for _ in range(200)]
        return sum(float(m["l0"]) for m in seen[-20:]) / 20, min(float(m["penalty_weight"]) for m in seen)

    l0, weight = ends(30.0)
    assert l0 == pytest.approx(12, rel=0.05)
    assert weight < 0
    monkeypatch.setattr(fastsae.JumpReLU, "rewards", False)
    l0, weight = ends(1.0)
    assert l0 < 0.9 * 12
    assert weight > 0


def test_a_state_from_before_rewards_means_what_it_meant(real: Tensor, tmp_path: Path) -> None:
    sae = fastsae.SparseAutoencoder(48, 64, fastsae.JumpReLU(target_l0=4.0), seed=0).start_(real)
    sae.log_coef.sub_(3.0)
    assert float(sae.penalty_weight) < 0
    fastsae.save(sae, tmp_path)
    assert torch.equal(fastsae.load(tmp_path).penalty_weight, sae.penalty_weight)
    old = sae.state_dict()
    del old["log_start"]
    other = fastsae.SparseAutoencoder(48, 64, fastsae.JumpReLU(target_l0=4.0), seed=1)
    other.load_state_dict(old)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors["log_start"]
    header = {"fastsae": (tmp_path / "config.json").read_text().strip()}
    save_file(tensors, tmp_path / WEIGHTS, metadata=header)
    for loaded in (other, fastsae.load(tmp_path)):
        assert float(loaded.penalty_weight) == pytest.approx(math.exp(float(sae.log_coef)), rel=1e-12)
        step = FusedTrainStep(loaded.train(), lr=1e-3)
        assert float(step(real[:256])["penalty_weight"]) > 0


def test_a_fixed_weight_and_a_quadratic_penalty_are_not_driven(real: Tensor) -> None:
    for rule in (fastsae.JumpReLU(0.1), TARGETED["jumprelu-target"](target_l0=4.0)):
        sae = fastsae.SparseAutoencoder(48, 64, rule, seed=0)
        step = FusedTrainStep(sae, lr=1e-3)
        weights = {float(step(real[:256])["penalty_weight"]) for _ in range(3)}
        assert len(weights) == 1


@pytest.mark.parametrize("name", DRIVEN)
def test_only_a_backward_pass_drives(name: str, real: Tensor) -> None:
    x = real[:256]
    sae = fastsae.SparseAutoencoder(48, 64, TARGETED[name](target_l0=4.0), seed=0)
    sae.start_(x)
    start = float(sae.log_coef)
    sae(x)
    with torch.no_grad():
        sae(x)
    sae.eval()(x).loss.backward()
    assert float(sae.log_coef) == start
    assert float(sae.l0_weight) == 0
    for make in (lambda: torch.optim.Adam(sae.parameters(), lr=1e-3), lambda: fastsae.optim.Adam(sae, lr=1e-3)):
        optimizer = make()
        before = float(sae.log_coef)
        l0 = []
        for _ in range(2):
            out = sae.train()(x)
            l0.append(float(out.codes.l0.double().mean()))
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
        assert float(sae.log_coef) != before
        assert float(sae.l0_mean) > 0
    assert float(sae.l0_weight) == pytest.approx(1 - SMOOTH**4)


@pytest.mark.parametrize("dense_above", [0.0, 1.0])
@pytest.mark.parametrize("name", [*TARGETED, "jumprelu-reward"])
def test_a_fused_step_is_a_plain_one_while_the_weight_is_driven(name: str, dense_above: float, real: Tensor) -> None:
    x = real.double()
    rule = TARGETED[name.removesuffix("-reward")](target_l0=6.0)
    fused, plain = (fastsae.SparseAutoencoder(48, 96, rule, seed=0, dtype=torch.float64) for _ in range(2))
    if name == "jumprelu-reward":
        for sae in (fused, plain):
            sae.start_(x[:200]).log_coef.sub_(2.0)
    steps = (
        FusedTrainStep(fused, lr=1e-3, eps=1e-4, dense_above=dense_above),
        PlainTrainStep(plain, lr=1e-3, eps=1e-4),
    )
    for i in range(8):
        mine, theirs = (step(x[i * 200 :][:200]) for step in steps)
        for key in ("loss", "l0", "penalty_weight"):
            torch.testing.assert_close(mine[key].double(), theirs[key].double(), rtol=1e-9, atol=0)
        if name == "jumprelu-reward":
            assert float(mine["penalty_weight"]) < 0
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[key], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", DRIVEN)
def test_the_inputs_scale_changes_nothing(name: str, real: Tensor) -> None:
    """A power of two to the bit; a hundredth to rounding, which a hundred steps enlarge."""
    curves = {}
    for scale in (1.0, 128.0, 0.01):
        sae = fastsae.SparseAutoencoder(48, 128, TARGETED[name](target_l0=6.0), seed=0)
        step = FusedTrainStep(sae, lr=1e-3)
        curves[scale] = [float(step(scale * real[i % 8 * 256 :][:256])["l0"]) for i in range(40)]
    assert curves[128.0] == curves[1.0]
    assert curves[0.01] == pytest.approx(curves[1.0], rel=0.02)


@pytest.mark.parametrize(("name", "target"), [
    ("relu", 16.0), ("gated", 4.0), ("jumprelu", 16.0),
    *(pytest.param(*other, marks=pytest.mark.long) for other in (("relu", 4.0), ("gated", 16.0), ("jumprelu", 4.0))),
])  # fmt: skip
def test_the_target_is_reached(name: str, target: float, real: Tensor) -> None:
    sae = fastsae.SparseAutoencoder(48, 256, TARGETED[name](target_l0=target), seed=0)
    step = FusedTrainStep(sae, lr=2e-3, schedule=fastsae.Schedule(250, 0, "linear", 0.2))
    order = torch.Generator().manual_seed(0)
    l0 = [float(step(real[torch.randint(2048, (128,), generator=order)])["l0"]) for _ in range(250)]
    assert sum(l0[-20:]) / 20 == pytest.approx(target, rel=0.15)  # in a quarter of the steps of a run


RESUMED = [
    fastsae.ReLU(target_l0=6.0), fastsae.JumpReLU(target_l0=6.0), fastsae.Gated(target_l0=6.0), fastsae.BatchTopK(6),
    fastsae.Matryoshka(fastsae.BatchTopK(6), groups=(32, 64)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "fused"),
    [pytest.param(rule, True, id=f"{rule.kind}-fused") for rule in RESUMED]
    + [
        pytest.param(rule, False, id=f"{rule.kind}-plain", marks=[] if i in (1, 3) else pytest.mark.long)
        for i, rule in enumerate(RESUMED)
    ],
)
def test_a_resumed_run_is_one_that_never_stopped(rule: Activation, fused: bool, tmp_path: Path) -> None:
    whole, resumed = (fastsae.SparseAutoencoder(D_IN, 96, rule, seed=0) for _ in range(2))
    config = TrainConfig(steps=14, batch_size=BATCH, lr=3e-3, checkpoint_every=6, fused=fused, tensorboard=False,
                         progress=False, eval_every=0)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # too few steps to reach anything
        Trainer(whole, source(), config, tmp_path / "a").run()
        for last in (tmp_path / "a" / "checkpoints").glob("step_*14"):
            for file in sorted(last.rglob("*"), reverse=True):
                file.unlink()
            last.rmdir()
        Trainer(resumed, source(), config, tmp_path / "a").run()
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_run_that_ends_off_its_target_says_so_and_one_on_it_does_not(tmp_path: Path) -> None:
    def run(rule: Activation, name: str, **settings: Any) -> dict[str, Any]:
        sae = fastsae.SparseAutoencoder(D_IN, 96, rule, seed=0)
        config = {"steps": 10, "batch_size": BATCH, "tensorboard": False, "progress": False, "lr": 3e-3, **settings}
        result = Trainer(sae, source(), TrainConfig(**config), tmp_path / name).run()
        assert result.evaluation is not None
        return result.evaluation

    with pytest.warns(RuntimeWarning, match=r"the run ended at L0 .* on held-out rows, but 40 was asked for .*--lr"):
        record = run(fastsae.JumpReLU(target_l0=40.0, threshold=1e3), "off")
    assert record["asked_l0"] == 40
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        record = run(fastsae.BatchTopK(6), "on")
        assert "asked_l0" not in run(fastsae.TopK(6), "topk")
    assert abs(record["l0"] / record["asked_l0"] - 1) < 0.1


def test_dead_latents_go_where_live_ones_are(real: Tensor) -> None:
    sae = fastsae.SparseAutoencoder(48, 64, fastsae.JumpReLU(target_l0=4.0), seed=0).start_(real)
    dead = torch.arange(64) < 3
    fastsae.resample_(sae, real[:300], dead=dead)
    torch.testing.assert_close(sae.log_threshold[:3], sae.log_threshold[3:].mean().expand(3))
    torch.testing.assert_close(sae.b_enc[:3], sae.b_enc[3:].mean().expand(3))


def test_the_fixture_is_in_its_own_units(real: Tensor) -> None:
    assert rows().shape[1] == D_IN
    assert float(real.norm(dim=1).mean()) > 50


def test_a_given_threshold_stays(real: Tensor) -> None:
    sae = fastsae.SparseAutoencoder(48, 256, fastsae.JumpReLU(threshold=0.05, target_l0=8), seed=0)
    norms = torch.linalg.vector_norm(sae.W_enc.detach(), dim=1)
    sae.start_(real)
    torch.testing.assert_close(sae.log_threshold.detach().exp(), torch.full((256,), 0.05))
    torch.testing.assert_close(torch.linalg.vector_norm(sae.W_enc.detach(), dim=1), norms)


def test_loaded_weights_are_not_overwritten_by_the_first_batch(real: Tensor) -> None:
    sae, other = (
        fastsae.SparseAutoencoder(48, 256, fastsae.ReLU(target_l0=8), normalize="none", seed=seed) for seed in (0, 1)
    )
    other.start_(real)
    sae.load_state_dict({name: p.detach() for name, p in other.named_parameters()}, strict=False)
    sae.train()(real)
    for name, p in other.named_parameters():
        assert torch.equal(sae.get_parameter(name), p), name


def test_a_target_that_does_not_fit_changes_nothing(real: Tensor) -> None:
    for wrong in (torch.zeros(len(real), 49), torch.zeros(len(real) - 1, 48)):
        sae = fastsae.SparseAutoencoder(48, 256, fastsae.ReLU(target_l0=8), pre_bias=False, seed=0)
        before = {name: t.clone() for name, t in sae.state_dict().items()}
        with pytest.raises(ValueError, match="target has shape"):
            sae.train()(real, target=wrong)
        assert not sae.norm.calibrated
        for name, t in sae.state_dict().items():
            torch.testing.assert_close(t, before[name], rtol=0, atol=0, equal_nan=True)


def test_batches_of_saes_take_old_states_and_refuse_targets() -> None:
    batch = SAEBatch(2, D, M, fastsae.BatchTopK(4))
    state = batch.state_dict()
    state["threshold"] = torch.tensor([-1.0, 0.5])
    del state["threshold_weight"]
    with pytest.warns(UserWarning, match="is from an older fastsae"):
        batch.load_state_dict(state)
    assert batch.threshold_weight.tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="or start thresholds from data"):
        SAEBatch(2, D, M, [fastsae.ReLU(), fastsae.ReLU(1.0)])
