"""Public SAE libraries doing the same training step, each as its own trainer does it, started from the same weights.

A library that is not installed, or does not import, is listed with the reason and left out; `make bench` installs them
into an environment of their own. What differs from the dense reference is said in each `describe`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cases import Inputs
from bench.dense import LR, bytes_of, optimizer_tensors
from bench.timing import Mark, unmarked


def bar(k: int, M: int) -> float:
    """The threshold that k of M standard normal numbers exceed, on average."""
    return float(torch.special.ndtri(torch.tensor(1 - k / M, dtype=torch.float64)))


@torch.no_grad()
def fill(sae: Any, inputs: Inputs, above: float) -> None:
    """Gives an SAE of SAELens the inputs' weights, and its latents the bar `above`, by threshold or by bias."""
    sae.W_enc.copy_(inputs.W_enc.T)
    sae.W_dec.copy_(inputs.W_dec)
    sae.b_dec.copy_(inputs.b_dec)
    biases = [sae.b_gate, sae.b_mag] if hasattr(sae, "b_gate") else [sae.b_enc]
    for bias in biases:
        bias.copy_(inputs.b_enc)
    if hasattr(sae, "threshold"):
        sae.threshold.fill_(above)
    else:
        for bias in biases:
            bias.sub_(above)


class SAELens:
    """SAELens: SAETrainer.step on a TopKTrainingSAE. No projection or renormalization; clips the gradient's norm.

    rule: another one with a threshold, "Standard", "Gated" or "JumpReLU", whose threshold is at `bar`: on the random
    inputs, about k latents of a token are above it.
    """

    distribution, module = "sae-lens", "sae_lens"

    def __init__(
        self, inputs: Inputs, k: int, *, rule: str = "TopK", autocast: bool = False, sparse: bool = False
    ) -> None:
        lens = importlib.import_module(self.module)
        trainer = importlib.import_module("sae_lens.training.sae_trainer")
        config = importlib.import_module("sae_lens.config")
        said = f" {rule}" if rule != "TopK" else ""
        self.name = "sae-lens" + said + (" bf16" if autocast else "") + (" sparse" if sparse else "")
        M, D = inputs.W_enc.shape
        device = str(inputs.W_enc.device)
        of_topk = {"k": k, "use_sparse_activations": sparse, "rescale_acts_by_decoder_norm": False}
        settings = getattr(lens, f"{rule}TrainingSAEConfig")(
            d_in=D, d_sae=M, apply_b_dec_to_input=True, normalize_activations="none", device=device,
            **(of_topk if rule == "TopK" else {}),
        )  # fmt: skip
        self.sae = getattr(lens, f"{rule}TrainingSAE")(settings)
        fill(self.sae, inputs, 0.0 if rule == "TopK" else bar(k, M))
        n = len(inputs.x)
        run = config.SAETrainerConfig(
            total_training_samples=10**9, train_batch_size_samples=n, lr=LR, lr_end=LR, autocast=autocast,
            device=device,
        )  # fmt: skip
        self.trainer = trainer.SAETrainer(run, self.sae, data_provider=iter(()))

    def step(self, x: Tensor, mark: Mark = unmarked) -> Tensor:
        return self.trainer.step(x).loss.detach()

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        with self.trainer.autocast_if_enabled:
            return self.sae.encode(x)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        with self.trainer.autocast_if_enabled:
            return self.sae(x).float()

    def state_bytes(self) -> int:
        return bytes_of([*self.sae.parameters(), *optimizer_tensors(self.trainer.optimizer)])


class DictionaryLearning:
    """dictionary_learning: TopKTrainer.update. Clips the gradient's norm; keeps a running threshold."""

    distribution, module = "dictionary-learning", "dictionary_learning"

    def __init__(self, inputs: Inputs, k: int) -> None:
        self.name = "dictionary-learning"
        M, D = inputs.W_enc.shape
        trainers = importlib.import_module("dictionary_learning.trainers.top_k")
        self.trainer = trainers.TopKTrainer(
            steps=10**6, activation_dim=D, dict_size=M, k=k, layer=0, lm_name="", lr=LR, warmup_steps=1,
            device=str(inputs.W_enc.device),
        )  # fmt: skip
        sae = self.sae = self.trainer.ae
        with torch.no_grad():
            sae.encoder.weight.copy_(inputs.W_enc)
            sae.encoder.bias.copy_(inputs.b_enc)
            sae.decoder.weight.copy_(inputs.W_dec.T)
            sae.b_dec.copy_(inputs.b_dec)
        self.steps = 0

    def step(self, x: Tensor, mark: Mark = unmarked) -> Tensor:
        self.steps += 1  # from 1: step 0 also sets b_dec to a geometric median
        return torch.tensor(self.trainer.update(self.steps, x))

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        return self.sae.encode(x)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae(x)

    def state_bytes(self) -> int:
        return bytes_of([*self.sae.parameters(), *optimizer_tensors(self.trainer.optimizer)])


class Sparsify:
    """EleutherAI/sparsify: its SparseCoder, with the calls of its Trainer in the Trainer's order and its Adam."""

    distribution, module = "eai-sparsify", "sparsify"

    def __init__(self, inputs: Inputs, k: int) -> None:
        self.name = "sparsify"
        M, D = inputs.W_enc.shape
        library = importlib.import_module(self.module)
        if inputs.W_enc.device.type == "cpu":
            # Where Triton is installed it decodes with its GPU kernel on every device; this is its own CPU path.
            coder: Any = importlib.import_module(f"{self.module}.sparse_coder")
            coder.decoder_impl = importlib.import_module(f"{self.module}.utils").eager_decode
        config = library.SparseCoderConfig(num_latents=M, k=k, normalize_decoder=True)
        sae = self.sae = library.SparseCoder(D, config, device=inputs.W_enc.device)
        with torch.no_grad():
            sae.encoder.weight.copy_(inputs.W_enc)
            sae.encoder.bias.copy_(inputs.b_enc)
            sae.W_dec.copy_(inputs.W_dec)
            sae.b_dec.copy_(inputs.b_dec)
        self.optimizer = torch.optim.Adam(sae.parameters(), lr=LR)
        self.since_fired = torch.zeros(M, dtype=torch.long, device=inputs.W_enc.device)

    def step(self, x: Tensor, mark: Mark = unmarked) -> Tensor:
        self.sae.set_decoder_norm_to_unit_norm()
        out = self.sae(x)
        out.fvu.backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.since_fired += len(x)
        self.since_fired[out.latent_indices.flatten()] = 0
        return out.fvu.detach()

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        top = self.sae.encode(x)
        return top.top_acts, top.top_indices

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae(x).sae_out

    def state_bytes(self) -> int:
        return bytes_of([*self.sae.parameters(), *optimizer_tensors(self.optimizer)])


PEERS: dict[str, tuple[Any, Callable[[Inputs, int], Any]]] = {
    "sae-lens": (SAELens, SAELens),
    "sae-lens bf16": (SAELens, lambda inputs, k: SAELens(inputs, k, autocast=True)),
    "sae-lens sparse": (SAELens, lambda inputs, k: SAELens(inputs, k, sparse=True)),
    "dictionary-learning": (DictionaryLearning, DictionaryLearning),
    "sparsify": (Sparsify, Sparsify),
}


def unavailable(name: str) -> str | None:
    """Why a peer cannot take part, or None. Imports it, so that a broken installation is reported here."""
    peer = PEERS[name][0]
    try:
        importlib.import_module(peer.module)
    except ImportError as error:
        return f"{peer.distribution} does not import ({error}); `make bench` installs the peers"
    return None


def version(name: str) -> str:
    """What is compared with: the distribution and its installed version."""
    distribution = PEERS[name][0].distribution
    return f"{distribution} {importlib.metadata.version(distribution)}"
