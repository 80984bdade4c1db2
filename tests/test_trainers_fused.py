"""fastsae.optim under Lightning Fabric, Accelerate and a Hugging Face Trainer gives the weights of a plain loop."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

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
