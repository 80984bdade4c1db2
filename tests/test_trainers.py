"""The module in other training loops: torch.optim, Lightning Fabric, Accelerate, torch.compile; one dense truth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastsae.model.sae import SparseAutoencoder
from tests.dense_sae import DenseSAE, sae_for_test, tokens

STEPS = 20


def fresh() -> SparseAutoencoder:
    sae = sae_for_test(d_in=16, d_sae=64, k=4, aux_k=6, dead_after=150, dtype=torch.float32, normalize="constant")
    sae.tokens_since_fired[::3] = 149
    return sae


def batches() -> list[Tensor]:
    return [tokens(64, 16, seed, torch.float32) for seed in range(STEPS)]


@pytest.fixture(scope="module")
def truth() -> DenseSAE:
    dense = DenseSAE(fresh(), lr=1e-3)
    curve = [float(dense.step(x)["loss"].detach()) for x in batches()]
    assert curve[-1] < 0.9 * curve[0], "the run should learn something"
    return dense


def check(sae: SparseAutoencoder, truth: DenseSAE) -> None:
    for name, p in sae.named_parameters():
        torch.testing.assert_close(p.detach(), truth.params[name].detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(sae.tokens_since_fired, truth.since)


def adam(sae: SparseAutoencoder) -> torch.optim.Adam:
    return torch.optim.Adam(sae.parameters(), lr=1e-3)


def test_a_plain_loop(truth):
    sae = fresh()
    optimizer = adam(sae)
    for x in batches():
        loss = sae(x).loss
        optimizer.zero_grad()
        loss.backward()
        sae.project_gradients_()
        optimizer.step()
        sae.normalize_decoder_()
    check(sae, truth)


def test_lightning_fabric(truth):
    fabric_module = pytest.importorskip("lightning_fabric")
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1)
    sae = fresh()
    model, optimizer = fabric.setup(sae, adam(sae))
    for x in fabric.setup_dataloaders(torch.utils.data.DataLoader(batches(), batch_size=None)):
        loss = model(x).loss
        optimizer.zero_grad()
        fabric.backward(loss)
        sae.project_gradients_()
        optimizer.step()
        sae.normalize_decoder_()
    check(sae, truth)


def test_accelerate(truth):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    sae = fresh()
    loader = torch.utils.data.DataLoader(torch.cat(batches()), batch_size=64)
    model, optimizer, loader = accelerator.prepare(sae, adam(sae), loader)
    for x in loader:
        loss = model(x).loss
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.unwrap_model(model).project_gradients_()
        optimizer.step()
        accelerator.unwrap_model(model).normalize_decoder_()
    check(sae, truth)


class LossFirst(torch.nn.Module):
    """The SAE with its loss as the first output, where Hugging Face's Trainer looks for it."""

    def __init__(self, sae: SparseAutoencoder):
        super().__init__()
        self.sae, self.config = sae, sae.config

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.sae(x)
        return out.loss, out.recon


def hugging_face(model: torch.nn.Module, folder: Path):
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=64, report_to=[], use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False, save_strategy="no", lr_scheduler_type="constant", max_grad_norm=0.0,
    )  # fmt: skip
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=[{"x": row} for row in torch.cat(batches())],
        data_collator=lambda rows: {"x": torch.stack([row["x"] for row in rows])},
        optimizers=(torch.optim.Adam(model.parameters(), lr=1e-3), None),
    )  # fmt: skip


def test_hugging_face_trainer(tmp_path):
    hugging_face(fresh(), tmp_path)  # the Trainer reads and writes model.config
    sae = fresh()
    before = float(sae(torch.cat(batches())).loss.detach())
    trainer = hugging_face(LossFirst(sae), tmp_path)
    trainer.train()
    assert float(sae(torch.cat(batches())).loss.detach()) < 0.9 * before
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "model.safetensors").is_file()


@pytest.mark.long
def test_torch_compile_without_a_graph_break(truth):
    sae = fresh()
    compiled = torch.compile(sae, fullgraph=True)
    optimizer = adam(sae)
    for x in batches():
        loss = compiled(x).loss
        optimizer.zero_grad()
        loss.backward()
        sae.project_gradients_()
        optimizer.step()
        sae.normalize_decoder_()
    check(sae, truth)


def test_compiled_encode_returns_codes():
    sae = fresh().eval()
    x = tokens(8, 16, dtype=torch.float32).view(2, 4, 16)
    codes = torch.compile(sae.encode, fullgraph=True)(x)
    assert torch.equal(codes.acts, sae.encode(x).acts)
    assert torch.equal(codes.indices, sae.encode(x).indices)
    assert codes.batch_shape == (2, 4)
