"""fastsae.optim with torch's schedulers, Fabric, Accelerate, a Hugging Face Trainer: the weights of a plain loop."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

import fastsae
from fastsae.model.sae import SparseAutoencoder
from fastsae.training.step import PlainTrainStep
from tests.dense_sae import sae_for_test, tokens

STEPS, MICRO = 12, 2
"""Microbatches in all, and in one step."""
CLIP = 0.5


def fresh() -> SparseAutoencoder:
    sae = sae_for_test(d_in=16, d_sae=64, k=4, aux_k=6, dead_after=150, dtype=torch.float32, normalize="constant")
    sae.tokens_since_fired[::3] = 149
    return sae


def batches() -> list[Tensor]:
    return [tokens(64, 16, seed, torch.float32) for seed in range(STEPS)]


def made(sae: SparseAutoencoder) -> tuple[fastsae.optim.Adam, Any]:
    optimizer = fastsae.optim.Adam(sae, lr=1e-3)
    return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS // MICRO)


def plain_loop(
    sae: SparseAutoencoder, *, own_optimizer: bool, clip: float | None = CLIP, narrow: bool = False
) -> SparseAutoencoder:
    """Two microbatches per step, clipped, scheduled, with fastsae's or torch's optimizer. narrow: inputs in bf16."""
    optimizer: Any = fastsae.optim.Adam(sae, lr=1e-3) if own_optimizer else torch.optim.Adam(sae.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS // MICRO)
    for i, x in enumerate(batches()):
        (sae(x.bfloat16() if narrow else x).loss / MICRO).backward()
        if i % MICRO < MICRO - 1:
            continue
        if not own_optimizer:
            sae.project_gradients_()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(sae.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        if not own_optimizer:
            sae.normalize_decoder_()
        scheduler.step()
    return sae


def assert_equal(got: SparseAutoencoder, expected: SparseAutoencoder, *, bits: bool = True) -> None:
    for name, value in expected.state_dict().items():
        if bits:
            assert torch.equal(got.state_dict()[name], value), name
        elif value.is_floating_point():
            torch.testing.assert_close(got.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_a_plain_loop_is_torchs() -> None:
    ours = plain_loop(fresh(), own_optimizer=True)
    assert_equal(ours, plain_loop(fresh(), own_optimizer=False), bits=False)
    assert not torch.equal(ours.W_dec, plain_loop(fresh(), own_optimizer=True, clip=None).W_dec), "clipping did nothing"


# Settings of a scheduler, one of each way in which torch's change an optimizer.
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "once": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=9),  # the betas too
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4),
    "in turn": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "by the loss": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("on_device", [False, True])
def test_torchs_schedulers(name: str, on_device: bool, tmp_path: Path) -> None:
    """Two microbatches a step under autocast, stopped and resumed halfway, as torch's Adam with the same scheduler."""

    def train(sae: SparseAutoencoder, make: Callable[..., Any], part: range, saved: Path | None = None) -> Path:
        lr = torch.tensor(1e-2, dtype=torch.float64) if on_device else 1e-2
        optimizer = make(sae if make is fastsae.optim.Adam else sae.parameters(), lr=lr, eps=1e-4)
        scheduler = SCHEDULERS[name](optimizer)
        parts = {"sae": sae, "optimizer": optimizer, "scheduler": scheduler}
        if saved is not None:
            state = torch.load(saved, weights_only=True)
            for key, one in parts.items():
                one.load_state_dict(state[key])
        for i in part:
            with torch.autocast("cpu", torch.bfloat16):
                loss = sae(batches()[i]).loss / MICRO
            loss.backward()
            if i % MICRO < MICRO - 1:
                continue
            if make is torch.optim.Adam:
                sae.project_gradients_()
            optimizer.step()
            optimizer.zero_grad()
            if make is torch.optim.Adam:
                sae.normalize_decoder_()
            scheduler.step(*([1.0] if name == "by the loss" else []))
        path = tmp_path / f"{make.__module__}-{part.start}-{part.stop}.pt"
        torch.save({key: one.state_dict() for key, one in parts.items()}, path)
        return path

    half = train(fresh(), fastsae.optim.Adam, range(STEPS // 2))
    resumed, whole, theirs = fresh(), fresh(), fresh()
    train(resumed, fastsae.optim.Adam, range(STEPS // 2, STEPS), half)
    last = train(whole, fastsae.optim.Adam, range(STEPS))
    assert_equal(resumed, whole)
    truth = train(theirs, torch.optim.Adam, range(STEPS))
    assert_equal(whole, theirs, bits=False)
    rates = [torch.load(path, weights_only=True)["optimizer"]["param_groups"][0] for path in (last, truth)]
    assert float(rates[0]["lr"]) == pytest.approx(float(rates[1]["lr"]), rel=1e-12)
    assert float(rates[0]["lr"]) != 1e-2
    assert rates[0]["betas"] == pytest.approx(rates[1]["betas"], rel=1e-12)


def test_hooks_of_states_run() -> None:
    optimizer = fastsae.optim.Adam(fresh(), lr=1e-2)
    seen: list[str] = []

    def halve(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        seen.append("before")
        return {**state, "param_groups": [{**group, "lr": group["lr"] / 2} for group in state["param_groups"]]}

    registered = optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("after"))
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert (seen, optimizer.param_groups[0]["lr"], saved["param_groups"][0]["lr"]) == (["before", "after"], 5e-3, 1e-2)
    registered.remove()
    with pytest.raises(ValueError, match="has 0 parameters"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert seen == ["before", "after"], "a state that is refused was not loaded"


def test_a_fused_step_is_a_step_to_hooks_and_schedulers() -> None:
    step = fastsae.FusedTrainStep(fresh(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(step.optimizer, lambda i: 1 / (i + 1))
    seen: list[str] = []
    step.optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    step.optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i, x in enumerate(batches()[:2]):
            assert float(step(x)["lr"]) == pytest.approx(1e-2 / (i + 1), rel=1e-12)
            scheduler.step()
    assert seen == ["before", "after"] * 2


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_fabric(precision: str, tmp_path: Path) -> None:
    """Resumed halfway from a saved state. Mixed precision narrows the inputs, but no op."""
    fabric_module = pytest.importorskip("lightning_fabric")
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1, precision=precision)

    def train(sae: SparseAutoencoder, part: range, resume: Path | None) -> Path:
        optimizer, scheduler = made(sae)
        model, wrapped = fabric.setup(sae, optimizer)
        if resume is not None:
            state = fabric.load(resume)
            sae.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
        for i in part:
            fabric.backward(model(batches()[i]).loss / MICRO)
            if i % MICRO == MICRO - 1:
                fabric.clip_gradients(model, wrapped, max_norm=CLIP)
                wrapped.step()
                wrapped.zero_grad()
                scheduler.step()
        saved = tmp_path / f"{part.stop}.ckpt"
        state = {"model": sae.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        fabric.save(saved, state)
        return saved

    half = train(fresh(), range(STEPS // 2), None)
    sae = fresh()
    train(sae, range(STEPS // 2, STEPS), half)
    assert_equal(sae, plain_loop(fresh(), own_optimizer=True, narrow=precision == "bf16-mixed"))


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerate(mixed_precision: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    def train(sae: SparseAutoencoder, part: range, resume: Path | None) -> Path:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=MICRO, mixed_precision=mixed_precision
        )  # fmt: skip
        optimizer, scheduler = made(sae)
        loader = torch.utils.data.DataLoader(torch.cat([batches()[i] for i in part]), batch_size=64)
        model, wrapped, loader, scheduler = accelerator.prepare(sae, optimizer, loader, scheduler)
        if resume is not None:
            accelerator.load_state(str(resume))
        for x in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(x).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                wrapped.step()
                scheduler.step()
                wrapped.zero_grad()
        saved = tmp_path / str(part.stop)
        accelerator.save_state(str(saved))
        return saved

    half = train(fresh(), range(STEPS // 2), None)
    sae = fresh()
    train(sae, range(STEPS // 2, STEPS), half)
    assert_equal(sae, plain_loop(fresh(), own_optimizer=True))


@pytest.mark.parametrize("bf16", [False, True])
def test_hugging_face_trainer(bf16: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    def train(sae: SparseAutoencoder, folder: Path, steps: int, resume: bool) -> None:
        arguments = transformers.TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=64, gradient_accumulation_steps=MICRO,
            max_grad_norm=CLIP, report_to=[], use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
            save_strategy="steps", save_steps=STEPS // MICRO // 2, bf16=bf16, seed=0, logging_steps=1,
        )  # fmt: skip
        optimizer, scheduler = made(sae)
        trainer = transformers.Trainer(
            model=sae, args=arguments, train_dataset=[{"x": row} for row in torch.cat(batches())],
            data_collator=lambda rows: {"x": torch.stack([row["x"] for row in rows])},
            optimizers=(optimizer, scheduler),
        )  # fmt: skip
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
        trainer.train(resume_from_checkpoint=resume or None)
        norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
        assert norms
        assert all(norm > 0 for norm in norms)

    whole = fresh()
    train(whole, tmp_path / "whole", STEPS // MICRO, resume=False)
    assert_equal(whole, plain_loop(fresh(), own_optimizer=True), bits=False)
    train(fresh(), tmp_path / "cut", STEPS // MICRO // 2, resume=False)
    resumed = fresh()
    train(resumed, tmp_path / "cut", STEPS // MICRO, resume=True)
    assert_equal(resumed, whole)


def test_copies_of_a_trained_module_hold_no_terms() -> None:
    sae = fresh()
    optimizer, _ = made(sae)
    sae(batches()[0]).loss.backward()
    twin = copy.deepcopy(sae)
    assert all(p.grad is None or type(p.grad) is Tensor for p in twin.parameters())
    optimizer.step()


def test_a_step_says_what_to_do_with_a_wrapped_module(tmp_path: Path) -> None:
    sae = fresh()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        wrapped: Any = torch.nn.parallel.DistributedDataParallel(sae)
        for make in (fastsae.FusedTrainStep, PlainTrainStep):
            with pytest.raises(TypeError, match=r"sae is a DistributedDataParallel.* a torch optimizer.*pass \.module"):
                make(wrapped, lr=1e-3)
        for use in (lambda: fastsae.save(wrapped, tmp_path), lambda: fastsae.resample_(wrapped, batches()[0])):
            with pytest.raises(TypeError, match=r"expected a SparseAutoencoder; pass the module inside it, \.module"):
                use()
    finally:
        torch.distributed.destroy_process_group()
    for made_of, hint in (
        (torch.nn.Sequential(sae), "pass the one inside it"),
        (fastsae.SAEBatch(2, 16, 64, fastsae.TopK(4)), r"take one SAE of it with \.to_sae\(i\).*BatchTrainStep"),
        (torch.nn.Linear(2, 2), "expected a SparseAutoencoder$"),
    ):
        with pytest.raises(TypeError, match=hint):
            fastsae.FusedTrainStep(made_of)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="batch is a SparseAutoencoder, expected an SAEBatch"):
        fastsae.BatchTrainStep(sae, 1e-3)  # type: ignore[arg-type]
    # A compiled module is the SAE; and the learning rate of a step is set in any of three ways.
    step = fastsae.FusedTrainStep(torch.compile(sae, backend="eager"), lr=1e-3)  # type: ignore[arg-type]
    assert float(step(batches()[0])["lr"]) == 1e-3
    step.lr = 1e-4
    assert float(step(batches()[0])["lr"]) == 1e-4
    step.lr.fill_(1e-5)
    assert float(step(batches()[0])["lr"]) == 1e-5
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(step.optimizer, T_max=4)
    schedule.step()
    assert 0 < float(step(batches()[0])["lr"]) < 1e-5


def test_a_compiled_module_is_its_sae_to_steps_and_files(tmp_path: Path) -> None:
    """torch.compile's wrapper names the parameters otherwise, and is another object than the one an optimizer holds."""
    for make in (fastsae.FusedTrainStep, PlainTrainStep):
        sae = fresh()
        compiled: Any = torch.compile(sae, backend="eager")
        step = make(compiled, lr=1e-3)
        step(batches()[0])
        assert make(fresh(), lr=1e-3).load_state_dict(step.state_dict()) is None  # of the same names
        before = step.optimizer.state[sae.W_dec]["exp_avg"].clone()
        step.forget_rows_(torch.arange(3))
        moments = step.optimizer.state[sae.W_dec]["exp_avg"]
        assert bool(before[:3].any())
        assert not bool(moments[:3].any())
        assert torch.equal(moments[3:], before[3:])
    fastsae.save(compiled, tmp_path)
    assert all(map(torch.equal, fastsae.load(tmp_path).parameters(), sae.parameters()))
