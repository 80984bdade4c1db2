"""Threshold rules in training, accelerated: each loss, and the libraries' trainers from dense starts to sparse ends."""

from __future__ import annotations

import copy
import importlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastsae
from fastsae.swapped import Unsupported
from fastsae.swapped.base import Swapped
from fastsae.swapped.lazy import LazyActs
from fastsae.training.optimizers import FusedOptimizer
from tests.accelerate_case import CASES, D, M, default_dtype, inputs, lens_step, library, make
from tests.test_accelerate_trainers import same, stream

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::fastsae.backends.errors.BackendWarning", "ignore::UserWarning"),
]

LENS = ["lens-standard-training", "lens-jumprelu-training", "lens-gated-training"]
SPARSE = [
    (name, i) for name in LENS for i, settings in enumerate(CASES[name].settings) if settings.get("lp_norm", 1) == 1
]


def close(mine: Tensor, truth: Tensor, what: str = "") -> None:
    torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-11, msg=lambda text: f"{what}: {text}")


def bias_of(module: nn.Module) -> nn.Parameter:
    named = dict(module.named_parameters())
    return next(named[one] for one in ("b_gate", "gate_bias", "b_enc", "encoder.bias") if one in named)


# -- SAELens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "number"), SPARSE)
def test_each_loss_of_saelens_in_both_regimes(name: str, number: int) -> None:
    """Every term of the loss, its acts and hidden_pre, for 2-D and 3-D inputs; more latents active makes it dense."""
    for raised, sparse in ((0.0, True), (2.0, False)):
        theirs, mine = make(name, number), fastsae.accelerate(make(name, number))
        with torch.no_grad():
            for module in (theirs, mine):
                bias_of(module).add_(raised)
        for x in (inputs(3), inputs(4).view(4, 6, D)):
            dead = torch.arange(M) % 3 == 0
            a, b = (lens_step(module, x, dead) for module in (theirs, mine))
            assert isinstance(b.feature_acts, LazyActs) == sparse
            assert isinstance(b.hidden_pre, LazyActs) == sparse
            assert a.losses.keys() == b.losses.keys()
            for key, value in a.losses.items():
                assert float(value) != 0 or not sparse, key
                close(b.losses[key], value, key)
            close(b.feature_acts + 0, a.feature_acts, "acts")
            assert bool((a.feature_acts != 0).any())
            close(b.hidden_pre + 0, a.hidden_pre, "hidden_pre")


def test_a_sparsity_loss_that_is_not_known_is_refused_as_by_saelens() -> None:
    for module in (make("lens-jumprelu-training", 0), fastsae.accelerate(make("lens-jumprelu-training", 0))):
        module.cfg.jumprelu_sparsity_loss_mode = "nonsense"
        with pytest.raises(ValueError, match="Invalid sparsity loss mode: nonsense"):
            lens_step(module, inputs(3), None)


@pytest.mark.parametrize("name", LENS)
def test_an_empty_batch(name: str) -> None:
    theirs, mine = make(name, 0), fastsae.accelerate(make(name, 0))
    a, b = (module.encode(inputs(0, n=0)) for module in (theirs, mine))
    assert a.shape == b.shape == (0, M)
    close(mine.decode(b), theirs.decode(a))
    for module in (theirs, mine):
        assert bool(lens_step(module, inputs(0, n=0), None).loss.isnan())


@pytest.mark.parametrize("name", [*LENS, "lens-dense-training"])
def test_hooks_run_as_often_as_the_librarys(name: str) -> None:
    """Those on the input once, in both regimes; those on the acts get dense ones, and change them."""
    theirs, mine = make(name, 0), fastsae.accelerate(make(name, 0))
    counts = []
    for module in (theirs, mine):
        counts.append([])
        module.hook_sae_input.add_hook(lambda x, hook, seen=counts[-1]: seen.append(1) or x * 1.5)
    close(lens_step(mine, inputs(1), None).loss, lens_step(theirs, inputs(1), None).loss)
    assert counts[0] == counts[1] == [1]
    for module in (theirs, mine):
        module.hook_sae_acts_post.add_hook(lambda acts, hook: torch.where(acts > 0.1, 0, acts))
    close(lens_step(mine, inputs(1), None).loss, lens_step(theirs, inputs(1), None).loss)


def test_hooks_on_the_input_run_once_after_training_too() -> None:
    """Where many latents are active, and a look came before the library's dense path."""
    theirs, mine = make("lens-dense", 0), fastsae.accelerate(make("lens-dense", 0))
    seen: list[Tensor] = []
    mine.hook_sae_input.add_hook(lambda x, hook: seen.append(x))
    acts = mine.encode(inputs(1))
    assert not isinstance(acts, LazyActs)
    close(acts, theirs.encode(inputs(1)))
    assert len(seen) == 1


def test_a_penalty_that_is_no_l1_reads_dense_acts_and_normalized_inputs_too() -> None:
    for name, settings in (
        ("lens-standard-training", {"lp_norm": 2.0}),
        ("lens-gated-training", {"normalize_activations": "layer_norm"}),
        ("lens-jumprelu-training", {"normalize_activations": "constant_norm_rescale"}),
    ):
        theirs, mine = (CASES[name].make(settings, torch.float64) for _ in range(2))
        fastsae.accelerate(mine)
        losses = [lens_step(module, inputs(2), None).loss for module in (theirs, mine)]
        close(losses[1], losses[0], name)
        for loss in losses:
            loss.backward()
        for p, q in zip(theirs.parameters(), mine.parameters(), strict=True):
            close(q.grad, p.grad, name)


def test_without_gradients_no_band_is_encoded() -> None:
    mine = fastsae.accelerate(make("lens-jumprelu-training", 0))
    with torch.no_grad():
        held = mine.encode(inputs(1)).kept
    assert bool((held.acts != 0).all())
    assert bool((mine.encode(inputs(1)).kept.acts == 0).any())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("StandardTrainingSAE", {"l1_coefficient": 1.0}),
        ("JumpReLUTrainingSAE", {"l0_coefficient": 2.0, "jumprelu_bandwidth": 0.2, "pre_act_loss_coefficient": 1e-3,
                                 "jumprelu_sparsity_loss_mode": "tanh", "jumprelu_ste_to_input": True}),
        ("GatedTrainingSAE", {"l1_coefficient": 1.0}),
    ],
)  # fmt: skip
def test_saelens_trainer_from_its_own_start(kind: str, settings: dict[str, Any]) -> None:
    """Half of the latents fire at first, and few at the end: both paths, in one run."""
    lens = library("sae_lens")
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    steps, trainers = 120, []
    for _ in range(2):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = getattr(lens, f"{kind}Config")(d_in=D, d_sae=M, dtype="float64", **settings)
        run = SAETrainerConfig(
            total_training_samples=32 * steps, train_batch_size_samples=32, lr=1e-2, lr_end=1e-3, device="cpu",
            dead_feature_window=10, lr_warm_up_steps=5,
        )  # fmt: skip
        run.logger.log_to_wandb = False
        trainers.append(SAETrainer(run, getattr(lens, kind)(config), stream()))
    theirs, mine = trainers[0], fastsae.accelerate(trainers[1])
    assert isinstance(mine.optimizer, FusedOptimizer)
    lazy = []
    batches = [stream(1), stream(1)]
    for _ in range(steps):
        outs = [trainer.step(next(batch)) for trainer, batch in zip((theirs, mine), batches, strict=True)]
        for trainer in (theirs, mine):
            trainer.n_training_steps += 1
        acts = outs[1].feature_acts
        lazy.append(isinstance(acts, LazyActs))
        assert not (lazy[-1] and acts.is_made)  # the trainer has counted what fired
        assert torch.equal(acts != 0, outs[0].feature_acts != 0)
    assert not lazy[0]
    assert lazy[-1]
    assert sum(lazy) > 20
    assert torch.equal(mine.act_freq_scores, theirs.act_freq_scores)
    same(mine.sae, theirs.sae)


# -- dictionary_learning ----------------------------------------------------------------------------------------------

TRAINERS = {
    "standard": ("standard", "StandardTrainer", {"l1_penalty": 2.0}),
    "standard-resampling": ("standard", "StandardTrainer", {"l1_penalty": 2.0, "resample_steps": 30}),
    "april": ("standard", "StandardTrainerAprilUpdate", {"l1_penalty": 1.0}),
    "p-anneal": ("p_anneal", "PAnnealTrainer", {
        "initial_sparsity_penalty": 2.0, "anneal_start": 40, "anneal_end": 90, "n_sparsity_updates": 5, "p_end": 1.4,
        "sparsity_function": "Lp^p",
    }),
    "p-anneal-lp": ("p_anneal", "PAnnealTrainer", {
        "initial_sparsity_penalty": 2.0, "anneal_start": 40, "anneal_end": 90, "n_sparsity_updates": 5, "p_end": 1.4,
        "sparsity_function": "Lp", "resample_steps": 50,
    }),
    "gated": ("gdm", "GatedSAETrainer", {"l1_penalty": 1.0}),
    "jumprelu": ("jumprelu", "JumpReluTrainer", {"bandwidth": 0.3, "sparsity_penalty": 1.0, "target_l0": 3.0}),
}  # fmt: skip


def trainer_of(name: str, kind: Any = None, **more: Any) -> Any:
    library("dictionary_learning")
    file, cls, settings = TRAINERS[name]
    found = getattr(importlib.import_module(f"dictionary_learning.trainers.{file}"), cls)
    given = {
        "steps": 200, "activation_dim": D, "dict_size": M, "layer": 0, "lm_name": "", "lr": 1e-2, "warmup_steps": 5,
        "sparsity_warmup_steps": 10, "seed": 0, "device": "cpu", **settings, **more,
    }  # fmt: skip
    torch.manual_seed(0)
    with default_dtype(torch.float64):
        return (kind or found)(**given)


@pytest.mark.parametrize("name", TRAINERS)
def test_dictionary_learning_trainer_from_its_own_start(name: str) -> None:
    """As theirs, swapped as an object, by its class, and with its SAE alone, whose optimizer stays the library's."""
    theirs, mine = trainer_of(name), fastsae.accelerate(trainer_of(name))
    by_class, only_module = trainer_of(name, fastsae.accelerate(type(theirs))), trainer_of(name)
    fastsae.accelerate(only_module.ae)
    lazily = []
    for trainer in (theirs, mine, by_class, only_module):
        batches = stream()
        torch.manual_seed(1)  # resampling draws
        with default_dtype(torch.float64):
            for i in range(120):
                x = next(batches)
                trainer.update(i, x)
                if trainer is mine:
                    with torch.no_grad():
                        lazily.append(isinstance(trainer.ae.encode(x), LazyActs))
        assert isinstance(trainer.optimizer, FusedOptimizer) == (trainer in (mine, by_class))
        # The library's L0 is in float32.
        rtol = 1e-6 if name == "jumprelu" else 1e-9
        for (key, p), q in zip(theirs.ae.state_dict().items(), trainer.ae.state_dict().values(), strict=True):
            torch.testing.assert_close(
                q, p, rtol=rtol, atol=rtol / 100, msg=lambda text, key=key: f"{key}: {text}"
            )  # fmt: skip
        assert trainer.optimizer.param_groups[0]["lr"] == theirs.optimizer.param_groups[0]["lr"]
    assert not lazily[0]
    assert lazily[-1]
    assert sum(lazily) > 20
    with default_dtype(torch.float64):
        log, truth = (trainer.loss(next(stream(9)), step=120, logging=True) for trainer in (mine, theirs))
    assert isinstance(log[2], LazyActs)
    torch.testing.assert_close(log[2] + 0, truth[2], rtol=1e-5, atol=1e-7)
    assert log[3].keys() == truth[3].keys()
    for key, value in truth[3].items():
        assert float(log[3][key]) == pytest.approx(float(value), rel=1e-6), key
    for parameter in theirs.get_logging_parameters():
        assert float(getattr(mine, parameter)) == pytest.approx(float(getattr(theirs, parameter)), rel=1e-6)


@pytest.mark.parametrize("threshold", [-0.02, 0.0, 0.1, 0.149, 0.3])
def test_the_steps_of_dictionary_learnings_acts(threshold: float) -> None:
    """At thresholds in the kernel's band around 0, acts of 0 have gradients, and at negative ones they count."""
    found = []
    for accelerated in (False, True):
        trainer = trainer_of("jumprelu")
        with torch.no_grad():
            trainer.ae.threshold.fill_(threshold).add_(torch.linspace(-0.01, 0.01, M, dtype=torch.float64))
            trainer.ae.b_enc.sub_(1.2)
        if accelerated:
            fastsae.accelerate(trainer.ae)
            fastsae.accelerate(trainer)
        with default_dtype(torch.float64):
            log = trainer.loss(inputs(5), step=100, logging=True)
            loss = trainer.loss(inputs(5), step=100)
        loss.backward()
        grad = trainer.ae.threshold.grad
        found.append((loss.detach(), grad, log.losses["loss"], trainer.num_tokens_since_fired.clone()))
        if accelerated:
            assert isinstance(log.f, LazyActs)
    assert bool((found[0][1] != 0).any())
    for a, b in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("power", [0.5, 0.0])
def test_a_norm_of_acts_below_1(power: float) -> None:
    """One step: at acts near 0 its gradient is too steep for more of them to stay together."""
    losses, grads = [], []
    for accelerated in (False, True):
        trainer = trainer_of("p-anneal")
        with torch.no_grad():
            trainer.ae.encoder.bias.sub_(0.12)
        trainer.p = power
        if accelerated:
            fastsae.accelerate(trainer)
        losses.append(trainer.loss(inputs(2), step=20))
        losses[-1].backward()
        grads.append([p.grad.to_dense() for p in trainer.ae.parameters()])
    close(losses[1], losses[0])
    for a, b in zip(*grads, strict=True):
        close(b, a)


def test_a_run_of_the_library_goes_on_accelerated() -> None:
    """The state of its ConstrainedAdam is taken over in the middle."""
    theirs, mine = trainer_of("standard"), trainer_of("standard")
    for i, x in zip(range(80), stream(3), strict=False):
        if i == 40:
            fastsae.accelerate(mine)
        for trainer in (theirs, mine):
            trainer.update(i, x)
    same(mine.ae, theirs.ae)


def test_what_cannot_be_fused_is_named_and_nothing_changes() -> None:
    trainer = trainer_of("standard")
    trainer.optimizer.constrained_params = list(trainer.ae.encoder.parameters())
    with pytest.raises(Unsupported, match=r"constrains decoder\.weight alone"):
        fastsae.accelerate(trainer)
    trainer.optimizer = torch.optim.Adam(trainer.ae.parameters(), lr=1.0)
    with pytest.raises(Unsupported, match="expected to be a ConstrainedAdam"):
        fastsae.accelerate(trainer)
    assert not isinstance(trainer.ae, Swapped)
    from dictionary_learning.trainers.gated_anneal import GatedAnnealTrainer

    with pytest.raises(Unsupported, match="GatedAnnealTrainer cannot be accelerated"):
        fastsae.accelerate(GatedAnnealTrainer)


def test_gated_acts_by_decoder_norms_and_ghosts_are_the_librarys() -> None:
    theirs, mine = make("dictionary-gated", 0), fastsae.accelerate(make("dictionary-gated", 0))
    x = inputs(1)
    for module in (theirs, mine):
        module.zero_grad()
    acts = [module.encode(x, return_gate=True, normalize_decoder=True)[0] for module in (theirs, mine)]
    outs = [module.decode(f, normalize_decoder=True) for module, f in zip((theirs, mine), acts, strict=True)]
    assert isinstance(acts[1], LazyActs)
    assert not acts[1].is_made
    close(outs[1], outs[0])
    close(acts[1] + 0, acts[0])
    for out in outs:
        out.square().sum().backward()
    for p, q in zip(theirs.parameters(), mine.parameters(), strict=True):
        if p.grad is not None:
            close(q.grad, p.grad)
    theirs, mine = make("dictionary-standard", 0), fastsae.accelerate(make("dictionary-standard", 0))
    for a, b in zip(*(m(x, output_features=True, ghost_mask=torch.ones(M)) for m in (theirs, mine)), strict=True):
        close(b, a)
    copied = copy.deepcopy(mine)
    close(copied(x), theirs(x))
