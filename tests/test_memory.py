"""What no step may do, plain or fused: allocate a tensor of tokens by latents, or read back from the device."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastsae
from fastsae.model.rules import TopK
from fastsae.model.sae import SparseAutoencoder
from fastsae.runs.schedules import Schedule
from fastsae.training.step import FusedTrainStep
from tests.dense_sae import sae_for_test, tokens

BACKENDS = [name for name, info in fastsae.backends().items() if info["available"]]


@pytest.mark.parametrize("loss", ["mse", "fvu"])
@pytest.mark.parametrize("normalize", ["none", "constant", "layer_norm", "standardize"])
def test_nothing_is_read_back_from_the_device(normalize, loss):
    """On the meta device every read of a value raises, so code that runs there makes no host sync."""
    sae = SparseAutoencoder(16, 64, TopK(4), aux_k=8, normalize=normalize, loss=loss, device="meta")
    sae.norm.calibrated = True
    x = torch.empty(32, 16, device="meta")
    out = sae(x)
    out.loss.backward()
    sae.project_gradients_()
    sae.normalize_decoder_()
    assert set(out.losses) == {loss, "aux"}
    metrics = FusedTrainStep(sae, schedule=Schedule(total=100, warmup=10, decay="cosine"))(x)
    assert all(value.device.type == "meta" and value.ndim == 0 for value in metrics.values())
    with pytest.raises(RuntimeError):
        bool(metrics["loss"] > 0)


@pytest.mark.parametrize("rule", [
    fastsae.BatchTopK(4), fastsae.Matryoshka(TopK(4), groups=(16, 48)), fastsae.HierarchicalTopK((2, 4)),
    fastsae.Matryoshka(fastsae.BatchTopK(4), sampled=3, shortest=8), fastsae.GroupMax(4),
], ids=lambda rule: rule.kind)  # fmt: skip
def test_other_rules_of_fixed_size_read_nothing_back_either(rule):
    sae = SparseAutoencoder(16, 64, rule, aux_k=8, device="meta")
    x = torch.empty(32, 16, device="meta")
    sae(x).loss.backward()
    metrics = FusedTrainStep(sae, clip_norm=1.0, clip_rows=1.0, optimizer="lion", moments="bf16")(x)
    assert all(value.device.type == "meta" and value.ndim == 0 for value in metrics.values())


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest output of any op: what Python and torch allocate around the fastsae ops."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


@pytest.mark.parametrize("fused", [False, True])
def test_no_tensor_of_tokens_by_latents_around_the_ops(fused):
    n, d, m = 96, 8, 128
    sae = sae_for_test(d_in=d, d_sae=m, k=4, aux_k=6, dead_after=100, dtype=torch.float32)
    sae.tokens_since_fired[::2] = 100
    x = tokens(n, d, dtype=torch.float32)
    step = FusedTrainStep(sae)
    with LargestTensor() as largest:
        if fused:
            step(x)
        else:
            sae(x).loss.backward()
    assert 0 < largest.elements < n * m


@pytest.mark.parametrize("rule", [
    fastsae.ReLU(1.0), fastsae.JumpReLU(1e-3, 1e-3, 1e-3), fastsae.Gated(1.0), fastsae.BatchTopK(4),
    fastsae.Matryoshka(TopK(4), groups=(32, 96)), fastsae.HierarchicalTopK((2, 4)),
], ids=lambda rule: rule.kind)  # fmt: skip
def test_memory_of_the_other_rules_follows_their_codes(rule):
    """Few latents fire: the largest tensor around the ops is no larger than x or a dictionary."""
    n, d, m = 96, 8, 128
    sae = SparseAutoencoder(d, m, rule, decoder_norm="free", seed=0)
    with torch.no_grad():
        sae.b_enc.fill_(-3.0)
    x = tokens(n, d, dtype=torch.float32)
    step = FusedTrainStep(sae, clip_norm=1.0)
    step(x)
    with LargestTensor() as largest:
        step(x)
    assert 0 < largest.elements < n * m // 2


MEMORY = """
import resource, torch, fastsae
from fastsae.model.rules import TopK
from fastsae.training.step import FusedTrainStep
from fastsae.model.sae import SparseAutoencoder
torch.set_num_threads(2)
sae = SparseAutoencoder(16, 49152, TopK(8), aux_k=8, dead_after=10**6, seed=0)
sae.tokens_since_fired[::2] = 10**6
sae.backend = "cpu"
x = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
step = FusedTrainStep(sae, backend="cpu")
sae(x[:64]).loss.backward(); step(x[:64])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sae(x).loss.backward(); step(x)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend's extension is not built")
def test_no_tensor_of_tokens_by_latents_inside_the_cpu_backend():
    """Peak resident memory of a step with AuxK: (N, M) in bf16 would be 400 MB, the allowance is a fifth of that."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 4096 * 49152 * 2 // 5, f"a step took {int(run.stdout) / 1e6:.0f} MB"
