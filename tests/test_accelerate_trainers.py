"""fastsae.optim over accelerated modules, alone and in the libraries' own trainers: the same weights after steps."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastsae
from fastsae.ops.ledger import LedgerGradient
from fastsae.swapped import Unsupported
from fastsae.swapped.base import Swapped
from fastsae.training.optimizers import FusedOptimizer
from tests.accelerate_case import ALL, CASES, FIRST, D, K, M, dead_latents, default_dtype, inputs, library, make

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::fastsae.backends.errors.BackendWarning", "ignore::UserWarning"),
]
STEPS = 50
TRAINED = [one for one in ALL if CASES[one[0]].trains]
trained = pytest.mark.parametrize(("name", "number"), TRAINED)


def same(mine: nn.Module, theirs: nn.Module) -> None:
    # A float32 threshold rounds its own gradient, whose norm clips all of them.
    rtol = 1e-9 if all(p.dtype == torch.float64 for p in theirs.parameters()) else 1e-5
    for (key, p), q in zip(theirs.state_dict().items(), mine.state_dict().values(), strict=True):
        torch.testing.assert_close(q, p, rtol=rtol, atol=rtol / 100, msg=lambda text, key=key: f"{key}: {text}")


def run(
    module: Any, optimizer: torch.optim.Optimizer, name: str, steps: int, dtype: torch.dtype, perm: Any = None
) -> None:
    for i in range(steps):
        x = inputs(i, dtype)
        CASES[name].loss(module, x if perm is None else x[:, perm], dead_latents(name, i)).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("name", "number", "kind"),
    [(*one, kind) for one in TRAINED for kind in ("fused", "torch") if kind == "torch" or CASES[one[0]].fused],
)
def test_steps_in_float64(name: str, number: int, kind: str) -> None:
    theirs, mine = make(name, number), fastsae.accelerate(make(name, number))
    truth = torch.optim.Adam(theirs.parameters(), lr=5e-3)
    if kind == "fused":
        optimizer: torch.optim.Optimizer = fastsae.optim.Adam(mine, lr=5e-3)
    else:
        optimizer = torch.optim.Adam(mine.parameters(), lr=5e-3)
    run(theirs, truth, name, STEPS, torch.float64)
    run(mine, optimizer, name, STEPS, torch.float64)
    same(mine, theirs)


@pytest.mark.parametrize(("name", "number"), [one for one in TRAINED if CASES[one[0]].fused])
def test_the_state_is_torchs(name: str, number: int) -> None:
    """After steps of torch's Adam on the library's own class, goes on with its state, and back."""
    theirs, mine = make(name, number), fastsae.accelerate(make(name, number))
    truth = torch.optim.Adam(theirs.parameters(), lr=5e-3)
    run(theirs, truth, name, 4, torch.float64)
    if len(truth.state) < len(list(theirs.parameters())):
        pytest.skip("the library's class gives a parameter no gradient, and torch's Adam has no state for it")
    mine.load_state_dict(theirs.state_dict())
    optimizer = fastsae.optim.Adam(mine, lr=1.0)
    optimizer.load_state_dict(truth.state_dict())
    assert optimizer.param_groups[0]["lr"] == 5e-3
    for module, one in ((theirs, truth), (mine, optimizer)):
        run(module, one, name, 4, torch.float64)
    same(mine, theirs)
    back = torch.optim.Adam(fastsae.unaccelerate(mine).parameters(), lr=5e-3)
    back.load_state_dict(optimizer.state_dict())
    del optimizer
    for module, one in ((theirs, truth), (mine, back)):
        run(module, one, name, 4, torch.float64)
    same(mine, theirs)


def permuted(module: Any, perm: Tensor) -> Any:
    """The module of inputs whose dimensions have another order."""
    found = copy.deepcopy(module)
    with torch.no_grad():
        for key, p in found.named_parameters():
            for dim, size in enumerate(p.shape):
                if size == D:
                    p.copy_(p.index_select(dim, perm))
            assert D != M, key
    return found


def distance(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p - q).double().norm() / q.double().norm().clamp(min=1e-12)) for p, q in pairs)


@pytest.mark.parametrize(("name", "number"), [one for one in FIRST if CASES[one[0]].trains])
def test_drift_in_float32(name: str, number: int, record_property: Any) -> None:
    """No farther from the library's own run than twice what another order of its sums makes of it."""
    theirs = make(name, number, torch.float32)
    start = copy.deepcopy(theirs)
    run(theirs, torch.optim.Adam(theirs.parameters(), lr=1e-3), name, STEPS, torch.float32)
    drifts = []
    for seed in range(3):
        perm = torch.randperm(D, generator=torch.Generator().manual_seed(seed))
        other = permuted(start, perm)
        run(other, torch.optim.Adam(other.parameters(), lr=1e-3), name, STEPS, torch.float32, perm)
        drifts.append(distance(permuted(other, perm.argsort()), theirs))
    mine = fastsae.accelerate(copy.deepcopy(start))
    optimizer = fastsae.optim.Adam(mine, lr=1e-3) if CASES[name].fused else torch.optim.Adam(mine.parameters(), lr=1e-3)
    run(mine, optimizer, name, STEPS, torch.float32)
    found = distance(mine, theirs)
    record_property("drift", f"{name}: {found:.2e}, another order {max(drifts):.2e}")
    print(f"drift {name}: {found:.2e}, another order {max(drifts):.2e}")
    assert found <= 2 * max(drifts)


def test_clipping_and_seen_gradients() -> None:
    """.grad has the parameter's shape; its dense form is torch's; the norm that clips is the library's."""
    theirs, mine = make("lens-topk-training", 0), fastsae.accelerate(make("lens-topk-training", 0))
    optimizer = fastsae.optim.Adam(mine)
    norms = []
    for module in (theirs, mine):
        CASES["lens-topk-training"].loss(module, inputs(1), dead_latents("lens-topk-training", 1)).backward()
        norms.append(nn.utils.clip_grad_norm_(module.parameters(), 0.1))
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-9, atol=0)
    for p, q in zip(theirs.parameters(), mine.parameters(), strict=True):
        assert isinstance(q.grad, LedgerGradient)
        assert q.grad.shape == q.shape
        torch.testing.assert_close(q.grad.to_dense(), p.grad, rtol=1e-9, atol=1e-11)
    del optimizer


def test_microbatches_and_a_model_around_it() -> None:
    modules = [nn.Sequential(nn.Linear(D, D, dtype=torch.float64), make("lens-topk", 1)) for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    fastsae.accelerate(modules[1])
    optimizers = [torch.optim.Adam(modules[0].parameters(), lr=1e-2), fastsae.optim.Adam(modules[1], lr=1e-2)]
    for i in range(5):
        for module, optimizer in zip(modules, optimizers, strict=True):
            for j in range(2):
                (module(inputs(2 * i + j)) - inputs(0)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    same(modules[1], modules[0])


# -- the libraries' trainers ------------------------------------------------------------------------------------------


def stream(seed: int = 0, n: int = 32) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(n, D, generator=generator, dtype=torch.float64)


LENS = [name for name in CASES if name.startswith("lens") and name.endswith("training")]


def lens_trainer(name: str, steps: int = STEPS, kind: Any = None) -> Any:
    library("sae_lens")
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    config = SAETrainerConfig(
        total_training_samples=32 * steps, train_batch_size_samples=32, lr=1e-2, lr_end=1e-3, device="cpu",
        dead_feature_window=3, lr_warm_up_steps=5, lr_scheduler_name="cosineannealing",
        feature_sampling_window=10,
    )  # fmt: skip
    config.logger.log_to_wandb = False
    # Its float32 thresholds stay what they are when `fit` casts.
    return (kind or SAETrainer)(config, make(name, 0).to(torch.float64), stream())


@pytest.mark.parametrize("name", LENS)
def test_saelens_trainer(name: str, tmp_path: Path) -> None:
    theirs, mine = lens_trainer(name), fastsae.accelerate(lens_trainer(name))
    by_class = lens_trainer(name, kind=fastsae.accelerate(type(theirs)))
    assert isinstance(mine.optimizer, FusedOptimizer)
    assert isinstance(by_class.optimizer, FusedOptimizer)
    for trainer in (theirs, mine, by_class):
        with warnings.catch_warnings():
            warnings.simplefilter("error", category=UserWarning)
            warnings.filterwarnings("ignore", message=".*reference backend")
            # torch's, once in a process: a gradient of the library's dense path has its order, the parameter another.
            warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
            trainer.fit()
        assert torch.equal(trainer.act_freq_scores, theirs.act_freq_scores)
        assert torch.equal(trainer.dead_neurons, theirs.dead_neurons)
        assert trainer.optimizer.param_groups[0]["lr"] == theirs.optimizer.param_groups[0]["lr"]
        same(trainer.sae, theirs.sae)
    assert bool(theirs.dead_neurons.any()) or name != "lens-topk-training", "the loss on dead latents was never tried"
    mine.save_checkpoint("here", tmp_path)
    fresh = lens_trainer(name)
    fresh.sae.load_weights_from_checkpoint(tmp_path / "here")
    fresh.load_trainer_state(tmp_path / "here")
    for trainer in (fresh, theirs, mine):
        batches = stream(5)
        for _ in range(3):
            trainer.step(next(batches))
            trainer.n_training_steps += 1
    same(mine.sae, theirs.sae)
    same(fresh.sae, theirs.sae)


DICTIONARIES = {
    "dictionary-topk": ("top_k", "TopKTrainer", {"k": K}),
    "dictionary-batchtopk": ("batch_top_k", "BatchTopKTrainer", {"k": K}),
    "dictionary-matryoshka": (
        "matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer",
        {"k": K, "group_fractions": [0.25, 0.25, 0.5], "group_weights": [0.5, 0.3, 0.2]},
    ),
}  # fmt: skip


def dictionary_trainer(name: str, kind: Any = None, **settings: Any) -> Any:
    import importlib

    library("dictionary_learning")
    file, cls, more = DICTIONARIES[name]
    found = getattr(importlib.import_module(f"dictionary_learning.trainers.{file}"), cls)
    given = {
        "steps": 60, "activation_dim": D, "dict_size": M, "layer": 0, "lm_name": "", "lr": 1e-2, "warmup_steps": 5,
        "decay_start": 30, "seed": 0, "device": "cpu", **more, **settings,
    }  # fmt: skip
    if name != "dictionary-jumprelu":
        given["threshold_start_step"] = 10
    with default_dtype(torch.float64):
        torch.manual_seed(0)
        trainer = (kind or found)(**given)
    trainer.dead_feature_threshold = 40
    return trainer


@pytest.mark.parametrize("aux", [0.0, 1 / 32])
@pytest.mark.parametrize("name", DICTIONARIES)
def test_dictionary_learning_trainer(name: str, aux: float) -> None:
    theirs, mine = (dictionary_trainer(name, auxk_alpha=aux) for _ in range(2))
    fastsae.accelerate(mine)
    by_class = dictionary_trainer(name, fastsae.accelerate(type(theirs)), auxk_alpha=aux)
    only_module = dictionary_trainer(name, auxk_alpha=aux)
    fastsae.accelerate(only_module.ae)
    losses: list[list[float]] = []
    dead: list[list[int]] = []
    for trainer in (theirs, mine, by_class, only_module):
        batches = stream()
        with default_dtype(torch.float64):
            losses.append([])
            dead.append([])
            for i in range(STEPS):
                losses[-1].append(trainer.update(i, next(batches)))
                dead[-1].append(int(trainer.dead_features))
        assert isinstance(trainer.optimizer, FusedOptimizer) == (trainer in (mine, by_class))
        torch.testing.assert_close(torch.tensor(losses[-1]), torch.tensor(losses[0]), rtol=1e-9, atol=1e-11)
        # The library casts the error in its loss on dead latents to float32, and its running threshold is float32.
        for (key, p), q in zip(theirs.ae.state_dict().items(), trainer.ae.state_dict().values(), strict=True):
            rtol = 1e-9 if p.dtype == torch.float64 and not aux else 1e-6
            torch.testing.assert_close(q, p, rtol=rtol, atol=rtol / 10, msg=lambda text, key=key: f"{key}: {text}")
        assert dead[-1] == dead[0]
    if not aux:  # without that loss the library's own log fails
        return
    assert max(dead[0]) > 0, "the loss on dead latents was never tried"
    log = mine.loss(next(stream(9)), step=60, logging=True)
    truth = theirs.loss(next(stream(9)), step=60, logging=True)
    assert (log.f != 0).sum() == (truth.f != 0).sum()
    assert log.losses == pytest.approx(truth.losses, rel=1e-6)


def test_train_sae_of_dictionary_learning(tmp_path: Path) -> None:
    library("dictionary_learning")
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
    from dictionary_learning.training import trainSAE

    found = []
    for i, kind in enumerate((TopKTrainer, fastsae.accelerate(TopKTrainer))):
        config = {"trainer": kind, "steps": 20, "activation_dim": D, "dict_size": M, "k": K, "layer": 0, "lm_name": "",
                  "lr": 1e-2, "warmup_steps": 5, "seed": 0, "device": "cpu", "wandb_name": "x"}  # fmt: skip
        trainSAE((x.float() for x in stream()), [config], steps=20, save_dir=str(tmp_path / str(i)), device="cpu")
        state = torch.load(tmp_path / str(i) / "trainer_0" / "ae.pt")
        sae = AutoEncoderTopK(D, M, K)
        sae.load_state_dict(state)
        found.append(sae)
    assert distance(found[1], found[0]) < 1e-4


@contextlib.contextmanager
def tiny_run(path: Path, optimizer: str, dtype: torch.dtype = torch.float32, **coder: Any) -> Iterator[Any]:
    """sparsify's Trainer on a Llama of random weights, for STEPS steps of its optimizer."""
    library("sparsify")
    from datasets import Dataset
    from sparsify import SparseCoderConfig, TrainConfig, Trainer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=D, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    )
    tokens = torch.randint(0, 50, (4 * STEPS, 16), generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("torch")
    config = TrainConfig(
        SparseCoderConfig(num_latents=M, k=K, **coder), batch_size=2, optimizer=optimizer, lr=1e-2, lr_warmup_steps=3,
        auxk_alpha=1 / 32, dead_feature_threshold=100, grad_acc_steps=2, micro_acc_steps=2, layers=[0, 1],
        log_to_wandb=False, save_dir=str(path),
    )  # fmt: skip
    trainer = Trainer(config, data, model.to(dtype))
    for sae in trainer.saes.values():
        sae.to(dtype)
    yield trainer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("optimizer", "coder"), [("adam", {}), ("adam", {"transcode": True, "skip_connection": True}), ("signum", {})]
)
def test_sparsify_trainer(optimizer: str, coder: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    saes = []
    for accelerated in (False, True):
        with tiny_run(tmp_path, optimizer, dtype, **coder) as trainer:
            if accelerated:
                fastsae.accelerate(trainer)
            assert isinstance(trainer.optimizers[0], FusedOptimizer) == (accelerated and optimizer == "adam")
            trainer.fit()
            assert trainer.lr_schedulers == [] or trainer.lr_schedulers[0].last_epoch == STEPS
            saes.append(trainer.saes)
    for key, theirs in saes[0].items():
        assert type(theirs).load_from_disk(tmp_path / "unnamed" / key)
        if dtype == torch.float64:
            same(saes[1][key], theirs)
        assert distance(saes[1][key], theirs) < 1e-4
        torch.testing.assert_close(saes[1][key].W_dec.norm(dim=1), theirs.W_dec.norm(dim=1), rtol=1e-4, atol=1e-6)


def test_an_optimizer_that_cannot_be_fused_is_named() -> None:
    trainer = lens_trainer("lens-topk-training")
    trainer.optimizer = torch.optim.SGD(trainer.sae.parameters(), lr=1.0)
    with pytest.raises(Unsupported, match="SGD, expected one of"):
        fastsae.accelerate(trainer)
    assert not isinstance(trainer.sae, Swapped)
    trainer.optimizer = torch.optim.Adam(trainer.sae.parameters(), lr=1.0, amsgrad=True)
    with pytest.raises(Unsupported, match="amsgrad"):
        fastsae.accelerate(trainer)
