"""fastsae as a contestant: the fused step as a user calls it, and the same step op by op, to time its parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastsae
from bench.cases import Inputs
from bench.dense import LR, bytes_of
from bench.timing import Mark, unmarked
from fastsae import Screen, SparseCodes, UpdateTerm, ops
from fastsae.training.screen import SCREEN_LIFE


class Fused:
    """fastsae.FusedTrainStep on a fastsae.SparseAutoencoder, nothing else."""

    name = "fastsae"

    def __init__(
        self, inputs: Inputs, k: int, *, lr: float = LR, backend: str | None = None, cuda_graph: bool = False
    ) -> None:
        M, D = inputs.W_enc.shape
        self.sae = fastsae.SparseAutoencoder(D, M, fastsae.TopK(k), device=inputs.W_enc.device)
        self.sae.backend = backend
        assert self.sae.W_enc is not None
        with torch.no_grad():
            self.sae.W_enc.copy_(inputs.W_enc)
            self.sae.b_enc.copy_(inputs.b_enc)
            self.sae.W_dec.copy_(inputs.W_dec)
            self.sae.b_dec.copy_(inputs.b_dec)
        graph: dict[str, Any] = {"cuda_graph": True} if cuda_graph else {}
        self.train_step = fastsae.FusedTrainStep(self.sae, lr=lr, backend=backend, **graph)
        self.metrics: dict[str, Tensor] = {}
        self._redone: list[Tensor] = []

    def step(self, x: Tensor, mark: Mark = unmarked) -> Tensor:
        self.metrics = self.train_step(x)
        if "redone" in self.metrics:
            self._redone.append(self.metrics["redone"].double() / len(x))
        return self.metrics["mse"]

    @torch.no_grad()
    def encode(self, x: Tensor) -> SparseCodes:
        return self.sae.encode(x)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae.decode(self.sae.encode(x))

    def redone(self) -> tuple[float, float] | None:
        """Mean and largest share of tokens that had to be encoded again, over all steps; None for no screen."""
        if not self._redone:
            return None
        shares = torch.stack(self._redone)
        return float(shares.mean()), float(shares.max())

    def state_bytes(self) -> int:
        """Weights and moments; the screening copy belongs to the step and is not counted."""
        states = self.train_step.optimizer.state.values()
        moments = [t for state in states for key, t in state.items() if key != "step"]
        return bytes_of([*self.sae.parameters(), *moments])


class FusedByPart:
    """The same step through fastsae.ops, with the screen and the moments held here: mark() after each part."""

    name = "fastsae by part"

    def __init__(self, inputs: Inputs, k: int, *, lr: float = LR, backend: str | None = None) -> None:
        self.k, self.backend = k, backend
        tensors = (inputs.W_enc, inputs.b_enc, inputs.W_dec, inputs.b_dec)
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = (t.clone() for t in tensors)
        both = [self.W_enc, self.W_dec, self.b_enc, self.b_dec]
        self.moments = [torch.zeros_like(t) for t in both for _ in range(2)]
        self.screen = self._prepare(inputs.x - self.b_dec)
        device = self.W_enc.device
        self.lr = torch.tensor(lr, dtype=torch.float64, device=device)
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        self._age = 0

    def _prepare(self, centred: Tensor) -> Screen | None:
        return ops.prepare_screen(self.W_enc, self.b_enc, x=centred, k=self.k, backend=self.backend)

    @torch.no_grad()
    def step(self, x: Tensor, mark: Mark = unmarked) -> Tensor:
        centred = x - self.b_dec
        # Chosen again as often as in FusedTrainStep, so that the parts and the whole step use one format; never on a
        # GPU.
        if self._age == SCREEN_LIFE and x.device.type == "cpu":
            self.screen = self._prepare(centred)
            self._age = 0
        self._age += 1
        codes = ops.encode_topk(centred, self.W_enc, self.b_enc, self.k, screen=self.screen, backend=self.backend)
        mark("encode")
        recon = ops.decode(codes, self.W_dec, backend=self.backend).add_(self.b_dec)
        mark("decode")
        error = recon.sub_(x)
        loss = error.square().sum(-1).mean()
        grad = error.mul_(2 / x.shape[0])
        mark("loss")
        self.steps += 1
        ops.update_latents_(
            self.W_enc, self.W_dec, self.b_enc, self.b_dec, self.moments,
            [UpdateTerm(codes, centred, grad, has_bias=True)],
            lr=self.lr, step=self.steps, betas=(0.9, 0.999), eps=1e-8, unit_norm=True, pre_bias=True,
            screen=self.screen, backend=self.backend,
        )  # fmt: skip
        mark("update")
        return loss

    def state_bytes(self) -> int:
        screen = [] if self.screen is None else self.screen.tensors
        return bytes_of([self.W_enc, self.b_enc, self.W_dec, self.b_dec, *self.moments, *screen])
