"""Counts are those of one plain loop over the same tokens, with checkpoints, microbatches, hooks and steps as without.

Dead-latent counters, densities, BatchTopK's threshold, the driven penalty weight and drawn prefixes. The plain loop is
held against counts made by hand from its codes; everything else is held against the plain loop.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastsae
from fastsae.model import counting
from fastsae.training.batch import SAEBatch
from fastsae.training.step import PlainTrainStep
from tests.counts_case import ByHand, assert_same, buffers
from tests.family_case import RULES, D, M, N, family_sae, tokens
from tests.train_case import trainer

DRIVEN = RULES | {
    "jumprelu-driven": fastsae.JumpReLU(target_l0=4.0),
    "matryoshka-sampled-topk": fastsae.Matryoshka(fastsae.TopK(5), sampled=4, shortest=3),
}
STATEFUL = ("topk", "batch_topk", "jumprelu-driven", "gated", "matryoshka-sampled", "matryoshka-sampled-topk")
"""Rules whose forward pass reads counters, with AuxK all of them; of each mechanism one."""
LATE = 45
"""Tokens after which a latent is dead: more than one batch, fewer than two, so that dead latents change often."""

Optimizer = Callable[[fastsae.SparseAutoencoder], torch.optim.Optimizer]


def with_torch(sae: fastsae.SparseAutoencoder) -> torch.optim.Optimizer:
    return torch.optim.Adam(sae.parameters(), lr=1e-2, eps=1e-4)


def with_ours(sae: fastsae.SparseAutoencoder) -> torch.optim.Optimizer:
    return fastsae.optim.Adam(sae, lr=1e-2, eps=1e-4)


OPTIMIZERS = {"torch": with_torch, "fastsae": with_ours}


def sae_of(rule: str, **settings: Any) -> fastsae.SparseAutoencoder:
    """A third of the latents hardly ever fires; AuxK looks at those that are dead."""
    usual = {"aux_k": 3, "dead_after": LATE, "dead": False} | settings
    sae = family_sae(DRIVEN[rule], **usual).start_(tokens(seed=99))
    with torch.no_grad():
        sae.b_enc[::3] -= 1.5
    return sae


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("rule", DRIVEN)
def test_a_plain_loop_counts_as_computed_by_hand(rule: str, make: str) -> None:
    sae = sae_of(rule)
    optimizer, truth, dead = OPTIMIZERS[make](sae), ByHand(sae), set()
    for i in range(4):
        out = sae(tokens(seed=i))
        truth.check(sae)  # a forward pass alone counts nothing
        out.loss.backward()
        truth.count(out.codes.to_dense())
        truth.check(sae)  # before the step
        optimizer.step()
        optimizer.zero_grad()
        truth.check(sae)
        dead.add(tuple(sae.dead.tolist()))
    assert int(sae.fired_over) == 4 * N
    assert rule in ("gated", "gated-weighted", "jumprelu-target") or len(dead) > 1, "latents should die or come back"


# -- activation checkpointing ------------------------------------------------------------------------------------------


def plainly(sae: fastsae.SparseAutoencoder, x: Tensor) -> Tensor:
    return sae(x).loss


def checkpointed(reentrant: bool) -> Callable[[fastsae.SparseAutoencoder, Tensor], Tensor]:
    return lambda sae, x: checkpoint(lambda t: sae(t).loss, x.requires_grad_(), use_reentrant=reentrant)


HOW = {"reentrant": checkpointed(True), "not": checkpointed(False)}


def in_turn(losses: Iterable[Tensor]) -> None:
    """Forward, backward, forward, backward."""
    for loss in losses:
        loss.backward()


def in_one(losses: Iterable[Tensor]) -> None:
    """Every forward pass, and one backward pass for all."""
    torch.stack(list(losses)).sum().backward()


def forward_first(losses: Iterable[Tensor]) -> None:
    """Every forward pass, then the backward passes: others count between a forward pass and its own backward pass."""
    for loss in list(losses):
        loss.backward()


def last_first(losses: Iterable[Tensor]) -> None:
    for loss in reversed(list(losses)):
        loss.backward()


ORDERS = {order.__name__: order for order in (in_turn, in_one, forward_first, last_first)}


def trained(rule: str, how: Any, make: str, order: str, steps: int = 2) -> dict[str, Tensor]:
    sae = sae_of(rule)
    optimizer = OPTIMIZERS[make](sae)
    for i in range(steps):
        ORDERS[order](how(sae, tokens(seed=10 * i + j)) for j in range(3))
        optimizer.step()
        optimizer.zero_grad()
    return buffers(sae) | dict(sae.named_parameters())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rule", STATEFUL)
def test_checkpointing_changes_no_count_and_no_gradient(rule: str, order: str) -> None:
    """Passes that are computed again see what they saw: dead latents, prefixes and the penalty's weight.

    Both optimizers and both ways of torch for every rule and order, and every rule with all four pairs of them.
    """
    turned = (list(ORDERS).index(order) + STATEFUL.index(rule)) % 2
    for make, how in zip(OPTIMIZERS, list(HOW)[:: -1 if turned else 1], strict=True):
        assert_same(trained(rule, HOW[how], make, order), trained(rule, plainly, make, order))


def test_one_backward_pass_counts_its_batches_in_their_order() -> None:
    in_turns, at_once = (sae_of("batch_topk", aux_k=None) for _ in range(2))
    for sae, order in ((in_turns, in_turn), (at_once, in_one)):
        order(plainly(sae, tokens(seed=i)) for i in range(3))
    assert_same(buffers(at_once), buffers(in_turns))


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_same_sae_twice_in_one_checkpoint(reentrant: bool) -> None:
    found = []
    for again in (False, True):
        sae = sae_of("matryoshka-sampled")

        def twice(t: Tensor, sae: fastsae.SparseAutoencoder = sae) -> Tensor:
            return sae(sae(t).recon).loss

        for i in range(2):
            x = tokens(seed=i).requires_grad_()
            (checkpoint(twice, x, use_reentrant=reentrant) if again else twice(x)).backward()
        found.append(buffers(sae) | {f"grad.{n}": p.grad for n, p in sae.named_parameters()})
    assert int(found[0]["fired_over"]) == 4 * N
    assert_same(*found)


def test_a_checkpoint_of_too_long_ago_is_refused() -> None:
    sae = sae_of("topk")
    late = checkpointed(False)(sae, tokens(seed=50))
    for i in range(counting.KEPT):
        sae(tokens(seed=i)).loss.backward()
    before = sae_of("topk")
    kept = checkpointed(False)(sae, tokens(seed=51))
    sae(tokens(seed=77)).loss.backward()
    with pytest.raises(RuntimeError, match=f"recomputes a forward pass after more than {counting.KEPT} later batches"):
        late.backward()
    kept.backward()
    assert int(sae.fired_over) == (counting.KEPT + 2) * N
    assert set(sae.state_dict()) == set(before.state_dict())
    assert sae._buffers["tokens_since_fired"] is sae.tokens_since_fired


# -- what counts, and what does not ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("rule", ["batch_topk", "jumprelu-driven", "matryoshka-sampled"])
def test_looking_counts_nothing(rule: str, make: str) -> None:
    """Evaluation hooks in the middle of training, in whatever mode, between forward and backward too."""
    looked, plain = sae_of(rule), sae_of(rule)
    for sae in (looked, plain):
        optimizer = OPTIMIZERS[make](sae)
        for i in range(3):
            loss = sae(tokens(seed=i)).loss
            if sae is looked:
                look(sae)
            loss.backward()
            if sae is looked:
                look(sae)
            optimizer.step()
            optimizer.zero_grad()
    assert_same(buffers(looked) | dict(looked.named_parameters()), buffers(plain) | dict(plain.named_parameters()))


def look(sae: fastsae.SparseAutoencoder) -> None:
    other = tokens(seed=70)
    sae(other)  # no backward pass
    with torch.no_grad():
        sae(other)
        sae.decode(sae.encode(other), like=other)
    with torch.inference_mode():
        sae(other)
    sae.eval()
    sae(other.requires_grad_()).loss.backward(inputs=[other])
    sae.train()


def test_a_graph_counts_once_and_a_failed_backward_pass_not_at_all() -> None:
    sae = sae_of("batch_topk")
    truth = ByHand(sae)
    out = sae(tokens())
    truth_after = copy.deepcopy(truth)
    truth_after.count(out.codes.to_dense())
    handle = sae.b_enc.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        out.loss.backward(retain_graph=True)
    truth.check(sae)
    handle.remove()
    assert not counting._passed
    for _ in range(2):
        out.loss.backward(retain_graph=True)
        truth_after.check(sae)
    torch.autograd.grad(out.loss, [sae.W_dec], create_graph=True)
    truth_after.check(sae)
    sae.zero_grad()
    truth_after.check(sae)


def by_grad(out: fastsae.model.sae.ForwardResult, sae: fastsae.SparseAutoencoder) -> None:
    torch.autograd.grad(out.loss, list(sae.parameters()))


def of_recon(out: fastsae.model.sae.ForwardResult, sae: fastsae.SparseAutoencoder) -> None:
    out.recon.square().sum().backward()


def of_acts(out: fastsae.model.sae.ForwardResult, sae: fastsae.SparseAutoencoder) -> None:
    out.codes.acts.sum().backward()


def of_decoder(out: fastsae.model.sae.ForwardResult, sae: fastsae.SparseAutoencoder) -> None:
    out.loss.backward(inputs=[sae.W_dec])


@pytest.mark.parametrize("backward", [by_grad, of_recon, of_acts, of_decoder])
@pytest.mark.parametrize("rule", ["batch_topk", "gated", "matryoshka"])
def test_any_backward_pass_through_the_batch_counts(rule: str, backward: Callable[..., None]) -> None:
    sae = sae_of(rule)
    truth, out = ByHand(sae), sae(tokens())
    backward(out, sae)
    truth.count(out.codes.to_dense())
    truth.check(sae)


@pytest.mark.parametrize("backward", [of_recon, of_decoder])
def test_a_frozen_encoder_counts_too(backward: Callable[..., None]) -> None:
    sae = sae_of("batch_topk", aux_k=None)
    sae.W_enc.requires_grad_(False)
    sae.b_enc.requires_grad_(False)
    sae.pre_bias = False
    truth, out = ByHand(sae), sae(tokens())
    backward(out, sae)
    truth.count(out.codes.to_dense())
    truth.check(sae)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_dead_after_is_in_tokens_whatever_the_microbatches(make: str) -> None:
    whole, parts = sae_of("topk", aux_k=None), sae_of("topk", aux_k=None)
    whole(tokens(40)).loss.backward()
    for x in tokens(40).split([7, 1, 20, 12]):
        parts(x).loss.backward()
    truth = ByHand(sae_of("topk"))
    for row in whole(tokens(40)).codes.to_dense().split(1):
        truth.count(row)
    assert torch.equal(parts.fired, whole.fired)
    assert int(parts.fired_over) == int(whole.fired_over) == 40
    never = whole.fired == 0
    assert bool(never.any())
    assert torch.equal(parts.tokens_since_fired[never], whole.tokens_since_fired[never])
    assert torch.equal(parts.fired, truth.fired)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_loss_that_is_not_finite_does_not_count(make: str) -> None:
    sae, truth = sae_of("batch_topk"), ByHand(sae_of("batch_topk"))
    optimizer = OPTIMIZERS[make](sae)
    bad = tokens()
    bad[3, 4] = torch.nan
    sae(bad).loss.backward()
    truth.check(sae)
    optimizer.zero_grad()
    out = sae(tokens())
    out.loss.backward()
    truth.count(out.codes.to_dense())
    truth.check(sae)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_step_that_a_scaler_skips_has_counted(make: str) -> None:
    """Its batch went forward and backward, with a finite loss; the documentation says so."""
    sae = sae_of("batch_topk")
    optimizer, scaler, truth = OPTIMIZERS[make](sae), torch.amp.GradScaler("cpu", init_scale=2.0**40), ByHand(sae)
    before = sae.W_dec.detach().clone()
    out = sae(tokens())
    scaler.scale(out.loss * 1e300).backward()
    truth.count(out.codes.to_dense())
    truth.check(sae)
    scaler.step(optimizer)
    assert torch.equal(sae.W_dec, before)
    truth.check(sae)


# -- steps and runs ----------------------------------------------------------------------------------------------------


def test_a_fused_step_that_is_not_made_does_not_count() -> None:
    sae = sae_of("batch_topk")
    step, truth = fastsae.FusedTrainStep(sae, k_schedule=lambda i: 5 - min(i, 3)), ByHand(sae)
    bad = tokens()
    bad[0, 0] = torch.inf
    with pytest.warns(RuntimeWarning, match="a gradient, the loss or the learning rate is not finite"):
        step(bad)
    truth.check(sae)
    assert (int(step.skipped), int(step.count)) == (1, 0)
    metrics = step(tokens())
    assert (int(step.skipped), int(step.count)) == (1, 1)
    assert float(metrics["l0"]) == 4  # k follows the calls, the skipped one included
    assert (int(sae.fired_over), int(sae.fired.sum())) == (N, 4 * N)


@pytest.mark.parametrize("rule", DRIVEN)
def test_steps_count_as_a_loop_does(rule: str) -> None:
    fused, plain, loop = (sae_of(rule, decoder_norm="unit") for _ in range(3))
    steps = fastsae.FusedTrainStep(fused, lr=1e-2, eps=1e-4), PlainTrainStep(plain, lr=1e-2, eps=1e-4)
    optimizer = with_ours(loop)
    for i in range(3):
        for step in steps:
            step(tokens(seed=i))
        loop(tokens(seed=i)).loss.backward()
        optimizer.step()
    assert [int(steps[0].count), steps[1].step, int(loop.fired_over)] == [3, 3, 3 * N]
    assert_same(buffers(fused), buffers(loop))
    assert_same(buffers(plain), buffers(loop))


@pytest.mark.parametrize("fused", [True, False])
def test_a_run_counts_its_batches_and_no_evaluation(fused: bool, tmp_path: Path) -> None:
    codes: list[Tensor] = []
    run = trainer(
        tmp_path, lambda n, x: codes.append(run.sae.encode(x).to_dense()), steps=12, eval_every=0, fused=fused
    )
    truth = ByHand(run.sae)
    with torch.no_grad():
        run.sae.b_dec += 1e-3  # so that it is not set from data after the first batch was encoded
    run.run()
    for A in codes:
        truth.count(A)
    truth.check(run.sae)
    assert len(codes) == 12


def test_resampled_latents_start_anew_and_looking_for_rows_counts_nothing() -> None:
    sae = sae_of("batch_topk")
    truth = ByHand(sae)
    for i in range(3):
        out = sae(tokens(seed=i))
        out.loss.backward()
        truth.count(out.codes.to_dense())
    dead = sae.dead.clone()
    assert fastsae.resample_(sae, tokens(64, seed=9)) == int(dead.sum()) > 0
    truth.since[dead] = 0
    truth.check(sae)


# -- many at once ------------------------------------------------------------------------------------------------------

MANY = {
    "topk": [fastsae.TopK(3), fastsae.TopK(5)],
    "batch_topk": [fastsae.BatchTopK(3), fastsae.BatchTopK(5)],
    "relu": [fastsae.ReLU(0.1), fastsae.ReLU(0.3)],
    "matryoshka": fastsae.Matryoshka(fastsae.BatchTopK(4), groups=(8, 32)),
    "group_max": fastsae.GroupMax(8),
    "abs_topk": fastsae.AbsTopK(4),
}


def many(rule: str) -> SAEBatch:
    batch = SAEBatch(2, D, M, MANY[rule], ghost="pull", dead_after=LATE, dtype=torch.float64)
    with torch.no_grad():
        batch.b_enc[:, ::3] -= 1.5
    return batch


def loss_of(batch: SAEBatch, x: Tensor) -> Tensor:
    return batch(x).losses["loss"].sum()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rule", MANY)
def test_saes_of_a_batch_count_alike(rule: str, order: str) -> None:
    found = []
    for how in ("plain", *HOW):
        batch = many(rule)
        optimizer = torch.optim.Adam(batch.parameters(), lr=1e-2)
        for i in range(2):
            xs = [tokens(seed=10 * i + j).requires_grad_() for j in range(3)]
            if how == "plain":
                with torch.no_grad():
                    batch(xs[0])
                batch(xs[0])
                ORDERS[order](loss_of(batch, x) for x in xs)
            else:
                ORDERS[order](
                    checkpoint(lambda x, b=batch: loss_of(b, x), x, use_reentrant=how == "reentrant") for x in xs
                )
            optimizer.step()
            optimizer.zero_grad()
        found.append(buffers(batch) | dict(batch.named_parameters()))
    for other in found[1:]:
        assert_same(other, found[0])


@pytest.mark.parametrize("rule", MANY)
def test_a_batch_of_saes_counts_as_computed_by_hand(rule: str) -> None:
    batch = many(rule)
    truths = [ByHand(batch.to_sae(i)) for i in range(2)]
    for i in range(3):
        x = tokens(seed=i).expand(2, N, D).clone()
        if i == 1:
            x[1, 0, 0] = torch.nan  # of the second SAE alone
        out = batch(x)
        out.losses["loss"].sum().backward()
        for j, truth in enumerate(truths):
            if (i, j) != (1, 1):
                truth.count(out.A[j])
    for j, truth in enumerate(truths):
        truth.check(batch.to_sae(j), density=False)


# -- compiled modules --------------------------------------------------------------------------------------------------


def test_compiled_passes_count_once_and_looking_counts_nothing() -> None:
    plain, sae = sae_of("topk"), sae_of("topk")
    run: Any = torch.compile(sae, backend="eager")
    for i in range(2):
        plain(tokens(seed=i)).loss.backward()
        with torch.no_grad():
            run(tokens(seed=i))
        run(tokens(seed=i)).loss.backward()
    assert_same(buffers(sae), buffers(plain))
    x = tokens(seed=5).requires_grad_()
    plain(x).loss.backward()
    checkpoint(lambda t: run(t).loss, x, use_reentrant=True).backward()
    assert_same(buffers(sae), buffers(plain))
    before = buffers(sae)
    loss = checkpoint(lambda t: run(t).loss, x, use_reentrant=False)
    with pytest.raises(
        RuntimeError, match=r"recomputes a compiled .* would count its tokens twice; compile the function that"
    ):
        loss.backward()
    assert int(sae.fired_over) == int(before["fired_over"]) + N
