"""SAEBatch: every member is the single SAE of its seed, step after step, whatever the rule."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastsae import AbsTopK, Gated, GroupMax, JumpReLU, Matryoshka, ReLU, SparseAutoencoder, TopK, reference
from fastsae.model import losses
from fastsae.model.rules import Activation, BatchTopK
from fastsae.training.batch import BatchTrainStep, SAEBatch
from fastsae.training.step import FusedTrainStep, PlainTrainStep

B, N, D, M = 3, 40, 10, 24
SEEDS = (5, 0, 9)
RULES: dict[str, Activation] = {
    "topk": TopK(3), "top1": TopK(1), "batch_topk": BatchTopK(3), "group_max": GroupMax(4), "abs_topk": AbsTopK(3),
    "relu": ReLU(0.1), "relu-plain": ReLU(0.1, weighted=False), "jumprelu": JumpReLU(0.1, threshold=0.3, bandwidth=0.5),
    "gated": Gated(0.1), "matryoshka": Matryoshka(TopK(3), groups=(4, 20)),
}  # fmt: skip
DIFFERENT: dict[str, list[Activation]] = {
    "relu": [ReLU(0.1), ReLU(0.0), ReLU(0.4)],
    "jumprelu": [JumpReLU(l0, threshold=0.3, bandwidth=0.5) for l0 in (0.1, 0.4, 0.2)],
    "gated": [Gated(0.1), Gated(0.3), Gated(0.2)],
    "topk": [TopK(1), TopK(5), TopK(3)],
    "batch_topk": [BatchTopK(2), BatchTopK(1), BatchTopK(4)],
}
CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-13}


def inputs(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(
    rules: Activation | list[Activation], steps: int = 6, *, shared: bool = False,
    optimizer: dict[str, Any] | None = None, **settings: Any,
) -> tuple[SAEBatch, list[SparseAutoencoder], list[tuple[dict[str, Tensor], list[dict[str, Tensor]]]]]:  # fmt: skip
    """A batch, and its members trained alone for the same steps, with the metrics of both.

    init_norm is not 1: the gradient of an encoder row that starts as a unit decoder row is pure rounding noise, and
    Adam scales it up to a whole step.
    """
    settings = {"dtype": torch.float64, "dead_after": 60, "init_norm": 0.7, **settings}
    optimizer = {"lr": 1e-2, "eps": 1e-5, **(optimizer or {})}
    batch = SAEBatch(B, D, M, rules, seeds=SEEDS, **settings)
    each = rules if isinstance(rules, list) else [rules] * B
    saes = [SparseAutoencoder(D, M, rule, seed=seed, **settings) for rule, seed in zip(each, SEEDS, strict=True)]
    together = BatchTrainStep(batch, **optimizer)
    alone = [PlainTrainStep(sae, **optimizer) for sae in saes]
    metrics = []
    for i in range(steps):
        x = inputs(i, N, D) if shared else inputs(i, B, N, D)
        metrics.append((together(x), [step(x if shared else x[j]) for j, step in enumerate(alone)]))
    return batch, saes, metrics


def same_weights(batch: SAEBatch, saes: list[SparseAutoencoder]) -> None:
    for i, sae in enumerate(saes):
        for name, p in sae.named_parameters():
            torch.testing.assert_close(getattr(batch, name)[i].detach(), p.detach(), **CLOSE, msg=f"{name} of {i}")
        for name in sae.activation.new_buffers():
            torch.testing.assert_close(getattr(batch, name)[i], getattr(sae, name), rtol=1e-6, atol=0)
        assert torch.equal(batch.tokens_since_fired[i], sae.tokens_since_fired)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
def test_a_batch_is_its_members_in_turn(name: str, decoder_norm: str) -> None:
    batch, saes, metrics = run(RULES[name], decoder_norm=decoder_norm)
    same_weights(batch, saes)
    for together, alone in metrics:
        for key in ("loss", "mse", "fvu", "l0"):
            torch.testing.assert_close(together[key].double(), torch.stack([m[key] for m in alone]).double(), **CLOSE)
        assert together["dead"].tolist() == [int(m["dead"]) for m in alone]


@pytest.mark.parametrize("name", DIFFERENT)
def test_members_may_differ_in_their_sparsity(name: str) -> None:
    same_weights(*run(DIFFERENT[name])[:2])


@pytest.mark.parametrize(
    "settings",
    [
        {"shared": True},
        {"tied": True, "decoder_norm": "free"},
        {"pre_bias": False},
        {"loss": "fvu"},
        {"ghost": "pull", "ghost_coef": 0.5},
        {"ghost": "pull", "tied": True, "decoder_norm": "free"},
        {"optimizer": {"optimizer": "adamw", "weight_decay": 0.1}},
        {"optimizer": {"schedule": lambda step: 1 / (1 + step)}},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_settings(settings: dict[str, Any]) -> None:
    batch, saes, metrics = run(TopK(1), 8, **settings)
    same_weights(batch, saes)
    if "ghost" in settings:
        assert float(metrics[-1][0]["ghost"].min()) > 0, "the case should have dead latents"


@pytest.mark.parametrize("rule", [*RULES.values(), *DIFFERENT.values()], ids=str)
@pytest.mark.parametrize("settings", [{}, {"ghost": "pull"}, {"d_out": 7, "pre_bias": False}, {"loss": "fvu"}], ids=str)
def test_a_forward_pass_is_the_reference(rule: Activation | list[Activation], settings: dict[str, Any]) -> None:
    """Codes, losses and gradients of each member. The forward pass normalizes rows, which only a batch can do."""
    norms = {"decoder_norm": "forward", "encoder_norm": "forward"}
    batch = SAEBatch(B, D, M, rule, init_norm=0.1, dead_after=60, dtype=torch.float64, **norms, **settings)
    with torch.no_grad():
        batch.b_dec.copy_(0.3 * inputs(7, *batch.b_dec.shape))
        batch.b_enc.copy_(0.3 * inputs(8, *batch.b_enc.shape))
    batch.tokens_since_fired[:, ::2] = 100
    x, target = inputs(1, B, N, D), inputs(2, B, N, 7) if "d_out" in settings else None
    goal = x if target is None else target
    out = batch(x, target)
    out.losses["loss"].sum().backward()
    for i, own in enumerate(batch.rules):
        leaves = {name: p[i].detach().clone().requires_grad_() for name, p in batch.named_parameters()}
        named = {**leaves, **{name: F.normalize(leaves[name], dim=-1) for name in ("W_enc", "W_dec")}}
        rule_state = {**named, **{name: getattr(batch, name)[i] for name in own.new_buffers()}}
        truth = reference.forward(
            named, x[i], own, rule_state, target=goal[i], pre_bias=batch.pre_bias, loss=batch.loss
        )
        total = truth.losses["loss"]
        if batch.ghost:
            seen, dead = x[i] - leaves["b_dec"] if batch.pre_bias else x[i], batch.dead[i]
            total = total + losses.ghost_pull(seen, goal[i] - truth.recon, leaves["W_enc"][dead], leaves["W_dec"][dead])
        total.backward()
        torch.testing.assert_close(out.A[i], truth.A, **CLOSE)
        torch.testing.assert_close(out.recon[i], truth.recon, **CLOSE)
        torch.testing.assert_close(out.losses["loss"][i], total, **CLOSE)
        for name, leaf in leaves.items():
            torch.testing.assert_close(getattr(batch, name).grad[i], leaf.grad, **CLOSE, msg=name)


def test_ghosts_pull_as_computed_by_hand() -> None:
    """Two tokens, errors (3, 0) and (0, 1): the first weighs 9/10, the second 1/10."""
    batch = SAEBatch(1, 2, 2, TopK(1), ghost="pull", dead_after=10, dtype=torch.float64)
    with torch.no_grad():
        batch.W_enc.copy_(torch.tensor([[[1.0, 0], [0, 2]]]))
        batch.W_dec.copy_(torch.tensor([[[1.0, 0], [0, 1]]]))
    batch.tokens_since_fired[0, 1] = 10
    x, error = torch.tensor([[[4.0, 1], [2, 6]]]).double(), torch.tensor([[[3.0, 0], [0, 1]]]).double()
    u, w = losses.error_weighted_means(x, error)
    torch.testing.assert_close(u[0], torch.tensor([3.8, 1.5], dtype=torch.float64))
    torch.testing.assert_close(w[0], torch.tensor([2.7, 0.1], dtype=torch.float64))
    expected = torch.tensor([-3.0, -0.1], dtype=torch.float64).exp().log1p().sum()
    target = inputs(0, 1, 2, 2)
    torch.testing.assert_close(batch.ghost_loss(x, target, target - error, batch.dead)[0], expected)
    batch.b_dec.data = torch.tensor([[1.0, -2.0]]).double()  # the encoder sees x - b_dec
    moved = x + batch.b_dec.detach()
    torch.testing.assert_close(batch.ghost_loss(moved, target, target - error, batch.dead)[0], expected)


def test_one_member_is_a_single_sae() -> None:
    batch, _, _ = run(BatchTopK(2), ghost="pull")
    batch.eval()
    x = inputs(50, N, D)
    whole = batch(x)
    for i in range(B):
        sae = batch.to_sae(i).eval()
        out = sae(x)
        torch.testing.assert_close(whole.recon[i], out.recon, **CLOSE)
        torch.testing.assert_close(whole.losses["loss"][i], out.loss, **CLOSE)
        assert (sae.ghost, sae.activation) == ("pull", BatchTopK(2))
        assert torch.equal(batch[i]["W_enc"], sae.W_enc)
    assert len(batch) == B


def test_normalized_rows_are_what_a_member_has() -> None:
    batch = SAEBatch(2, D, M, TopK(1), decoder_norm="forward", encoder_norm="forward", init_norm=0.1)
    x = inputs(1, N, D).float()
    torch.testing.assert_close(batch(x).recon[1], batch.to_sae(1)(x).recon)
    torch.testing.assert_close(batch[1]["W_enc"].norm(dim=1), torch.ones(M))
    torch.testing.assert_close(batch.W_enc[1].norm(dim=1), torch.full((M,), 0.1))


def test_training_resumes_from_its_state() -> None:
    settings: dict[str, Any] = {"ghost": "pull", "dead_after": 60}
    whole, stopped = (SAEBatch(B, D, M, BatchTopK(2), **settings) for _ in "ab")
    step, half = BatchTrainStep(whole, 1e-2), BatchTrainStep(stopped, 1e-2)
    for i in range(3):
        step(inputs(i, N, D).float())
        half(inputs(i, N, D).float())
    again = SAEBatch(B, D, M, BatchTopK(2), seeds=(7, 8, 9), **settings)
    again.load_state_dict(stopped.state_dict())
    resumed = BatchTrainStep(again, 1e-2)
    resumed.load_state_dict(half.state_dict())
    for i in range(3, 6):
        step(inputs(i, N, D).float())
        resumed(inputs(i, N, D).float())
    assert resumed.step == 6
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize("k", [1, 2])
def test_ties_go_to_the_lower_latent(k: int) -> None:
    batch = SAEBatch(1, D, 4, TopK(k), pre_bias=False)
    with torch.no_grad():
        batch.W_enc.copy_(batch.W_enc[:, :1].expand_as(batch.W_enc))
    before = batch.W_dec.detach().clone()
    BatchTrainStep(batch, 1e-2)(inputs(0, N, D).float())
    moved = (batch.W_dec != before).any(-1)[0]
    assert moved.tolist() == [i < k for i in range(4)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 2}, "n is 2 and there are 3 seeds"),
        ({"decoder_norm": "half"}, "decoder_norm is 'half', expected one of unit, forward, free"),
        ({"encoder_norm": "unit"}, "encoder_norm is 'unit', expected one of forward, free"),
        ({"ghost": "residual"}, "ghost is 'residual', expected one of None, pull"),
        ({"tied": True, "encoder_norm": "forward"}, "drop encoder_norm"),
        ({"activation": [TopK(1)]}, "activation has 1 rules, expected one for each of 3 SAEs, all of one kind"),
        ({"activation": [TopK(1), ReLU(1.0), TopK(1)]}, "all of one kind"),
        ({"activation": [ReLU(1.0), ReLU(2.0, weighted=False), ReLU(1.0)]}, "can differ in l1 alone"),
        ({"activation": [GroupMax(1), GroupMax(2), GroupMax(4)]}, "can differ in their seeds alone"),
        ({"activation": Matryoshka(TopK(2), sampled=2, shortest=2)}, "give Matryoshka fixed groups"),
        ({"d_sae": 0}, "d_sae is 0"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAEBatch(**{"n": B, "d_in": D, "d_sae": M, "activation": TopK(1), "seeds": SEEDS, **change})


def test_inputs_that_do_not_fit_are_refused() -> None:
    batch = SAEBatch(B, D, M, TopK(1))
    for x in (torch.zeros(D), torch.zeros(N, D + 1), torch.zeros(B + 1, N, D)):
        with pytest.raises(ValueError, match=rf"expected \(N, {D}\) or \({B}, N, {D}\)"):
            batch(x)
    wide = SAEBatch(B, D, M, TopK(1), d_out=7, pre_bias=False)
    for call in (wide, BatchTrainStep(wide, 1e-3)):
        with pytest.raises(ValueError, match=r"d_out = 7 is not d_in = 10; pass target="):
            call(torch.zeros(N, D))
    with pytest.raises(ValueError, match="expected one of adam, adamw"):
        BatchTrainStep(batch, 1e-3, optimizer="lion")
    with pytest.raises(ValueError, match="optimizer 'adam' has none"):
        BatchTrainStep(batch, 1e-3, weight_decay=0.1)


def test_a_state_of_another_batch_is_refused_and_changes_nothing() -> None:
    """Without settings in it, as older states are, or by allow_other_config: torch's fused Adam would read past the
    moments of a smaller batch.
    """
    steps = [BatchTrainStep(SAEBatch(n, D, m, TopK(3)), lr=1e-2) for n, m in ((2, M), (2, 8), (3, M))]
    for step in steps:
        step(inputs(0, N, D).float())
    step = steps[0]
    good = copy.deepcopy(step.state_dict())
    states = [{**other.state_dict(), "step": 7} for other in steps[1:]]
    states += [{**good, "step": -1}, {**good, "skipped": torch.zeros(5, dtype=torch.int64)}]
    states += [{**good, "step": 7, "optimizer": {}}, {"step": 7}, {}]
    for state in states:
        with pytest.raises(ValueError, match=r"expected|not a state of a step of a batch"):
            step.load_state_dict(state, allow_other_config=True)
        assert step.step == 1
        assert step.skipped.tolist() == [0, 0]
        for name, held in step.optimizer.state_dict()["state"].items():
            assert all(torch.equal(t, good["optimizer"]["state"][name][key]) for key, t in held.items())
    del good["skipped"], good["settings"]  # an older one
    step.load_state_dict(good)


def test_a_frozen_parameter_stays_and_a_skipped_sae_too() -> None:
    batch = SAEBatch(B, D, M, TopK(3), seeds=SEEDS)
    batch.get_parameter("b_dec").requires_grad_(False)
    step, x = BatchTrainStep(batch, lr=1e-2), inputs(0, B, N, D).float()
    x[1, 0, 0] = torch.nan
    before = {name: p.detach().clone() for name, p in batch.named_parameters()}
    with pytest.warns(
        RuntimeWarning, match=r"nothing of SAE 1 \(1 of 40 rows of x hold NaN or infinity: 0\)\. Further"
    ):
        assert step(x)["skipped"].tolist() == [0, 1, 0]
    for name, p in batch.named_parameters():
        same = [torch.equal(new, old) for new, old in zip(p, before[name], strict=True)]
        assert same == ([True] * 3 if name == "b_dec" else [False, True, False])


def test_steps_compute_in_their_own_dtype_under_autocast_and_refuse_inference_mode() -> None:
    x = inputs(0, N, D).float()
    for make in (BatchTrainStep, PlainTrainStep, FusedTrainStep):
        saes: list[Any] = [SAEBatch(2, D, M, TopK(3)) if make is BatchTrainStep else SparseAutoencoder(D, M, TopK(3))]
        saes.append(copy.deepcopy(saes[0]))
        steps: list[Any] = [make(sae, lr=1e-2) for sae in saes]
        steps[0](x)
        with torch.autocast("cpu", torch.bfloat16):
            steps[1](x)
        assert all(map(torch.equal, saes[0].parameters(), saes[1].parameters()))
        with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode\(\) is on; leave it"):
            steps[0](x)


@pytest.mark.parametrize("rule", RULES)
def test_fvu_of_one_token_repeated_is_skipped(rule: str) -> None:
    """Its variance is the rounding of a mean: a divisor that would make a loss of 10¹⁴ of it."""
    step = BatchTrainStep(SAEBatch(2, D, M, RULES[rule], loss="fvu"), lr=1e-2)
    row = 7 + inputs(0, 1, D).float()
    with pytest.warns(RuntimeWarning, match="nothing of SAE 0, 1; the rows of x are finite, and the largest is row"):
        assert step(row.expand(200, D))["skipped"].tolist() == [1, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert step(row.expand(200, D))["skipped"].tolist() == [2, 2]


def test_fvu_of_bfloat16_is_of_the_variance_in_float32() -> None:
    """Far from 0 the mean of rows, rounded to bfloat16, is off by more than they spread."""
    x = (inputs(0, N, D) + 60).bfloat16()
    for dtype in (torch.bfloat16, torch.float32):
        step = BatchTrainStep(SAEBatch(2, D, M, TopK(3), loss="fvu", dtype=dtype), lr=1e-2)
        found = step(x)
        variance = (x.double() - x.double().mean(0)).square().sum()
        torch.testing.assert_close(found["fvu"].double(), found["mse"].double() * N / variance, rtol=2**-6, atol=0)
        torch.testing.assert_close(found["loss"].double(), found["fvu"].double(), rtol=2**-4, atol=0)
        assert found["skipped"].tolist() == [0, 0]


def test_a_compiled_batch_steps_counts_and_skips_as_an_ordinary_one() -> None:
    batches = [SAEBatch(2, D, M, TopK(3), dead_after=60) for _ in range(2)]
    compiled: Any = torch.compile(batches[1], backend="eager")
    steps = [BatchTrainStep(batches[0], lr=1e-2), BatchTrainStep(compiled, lr=1e-2)]
    x = [inputs(seed, 2, N, D).float() for seed in range(3)]
    x[1][1, 3, 0] = torch.nan
    for one in x:
        got = [step(one) for step in steps]
        torch.testing.assert_close(got[1], got[0], equal_nan=True)
    assert steps[1].skipped.tolist() == [0, 1]
    torch.testing.assert_close(batches[1].state_dict(), batches[0].state_dict())
    steps[0].load_state_dict(steps[1].state_dict())
