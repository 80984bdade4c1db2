"""The fused step against the dense step in float64, and as a CUDA graph against itself."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

import fastsae
from bench.gpu.check_update import NAMES
from fastsae import reference

STEPS, LR = 4, 1e-3
SETTINGS: dict[str, dict[str, Any]] = {
    "unit norm, mse": {},
    "fvu": {"loss": "fvu"},
    "tied": {"tied": True},
    "free norm": {"decoder_norm": "free"},
    "no pre-bias": {"pre_bias": False},
    "auxk": {"aux_k": 8},
    "bf16 moments": {"moments": "bf16"},
}
LOSS_OFF, MOVE_OFF = 1e-5, 2e-3
"""Of the loss, and of the distance that a parameter moved: Adam turns rounding noise in tiny gradients into whole
steps, so entries are not compared."""
LOSS_OFF_BF16, MOVE_OFF_BF16 = 1e-3, 5e-2


def has_graphs() -> bool:
    return "cuda_graph" in inspect.signature(fastsae.FusedTrainStep).parameters


def sae(toy: bool, device: str, backend: str, **settings: Any) -> fastsae.SparseAutoencoder:
    d, m, k = (24, 96, 4) if toy else (96, 1024, 16)
    made = fastsae.SparseAutoencoder(
        d, m, fastsae.TopK(k), seed=1, dead_after=1000 if settings.get("aux_k") else 10**7, **settings
    )
    if settings.get("aux_k"):
        made.tokens_since_fired[::2] = 1000
    made.backend = backend
    with torch.no_grad():
        made.b_dec.copy_(torch.linspace(-0.5, 0.5, d))
    return made.to(device)


def batches(toy: bool, device: str) -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    return [torch.randn(16 if toy else 192, 24 if toy else 96, generator=g).to(device) for _ in range(STEPS)]


def dense_loss(params: reference.Params, x: Tensor, module: fastsae.SparseAutoencoder, dead: Tensor) -> Tensor:
    """The loss of `module` with these parameters, by `reference.forward`, and AuxK's where the module has it."""
    rule: Any = module.activation
    out = reference.forward(params, x, rule, loss=module.loss, pre_bias=module.pre_bias)
    if module.aux_k is None:
        return out.losses["loss"]
    inputs = x - params["b_dec"] if module.pre_bias else x
    pre = reference.pre_acts(inputs, params.get("W_enc", params["W_dec"]), params["b_enc"])
    A = reference.keep_top_k(torch.where(dead, pre, 0), module.aux_k)
    unit = len(x) if module.loss == "mse" else (x - x.mean(0)).square().sum()
    missed = (reference.decode(A, params["W_dec"]) - (x - out.recon).detach()).square().sum() / unit
    return out.losses["loss"] + module.aux_coef * min(int(dead.sum()) / module.aux_k, 1.0) * missed


def fused_step(name: str, toy: bool, device: str, backend: str) -> float:
    """A few steps; losses and moves against dense steps through autograd, in float64 on the CPU."""
    settings = dict(SETTINGS[name])
    narrow = settings.pop("moments", "fp32")
    module = sae(toy, device, backend, **settings)
    start = {name: p.detach().cpu().double() for name, p in module.named_parameters()}
    params: reference.Params = {key: start[key].clone() for key in NAMES if key in start}
    moments: reference.Moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in params.items()}
    step = fastsae.FusedTrainStep(module, lr=LR, moments=narrow, backend=backend)
    loss_off, move_off = (LOSS_OFF, MOVE_OFF) if narrow == "fp32" else (LOSS_OFF_BF16, MOVE_OFF_BF16)
    lr, unit_norm, adam = torch.tensor(LR, dtype=torch.float64), module.decoder_norm == "unit", reference.Optimizer()
    worst = 0.0
    for i, x in enumerate(batches(toy, device)):
        metrics = step(x)
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        loss = dense_loss(leaves, x.cpu().double(), module, module.dead.cpu())
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        shaped = reference.shape_gradients(params, grads, unit_norm)
        params, moments = reference.update(params, shaped, moments, lr, torch.tensor(i + 1), adam, unit_norm)
        expected = float(loss.detach())
        off = abs(float(metrics["loss"]) / expected - 1) / loss_off
        worst = max(worst, off)
        if not off <= 1:
            raise AssertionError(f"step {i + 1}: loss {float(metrics['loss'])!r}, expected {expected!r}")
    for key, p in params.items():
        got = getattr(module, key).detach().cpu().double()
        off = float((got - p).norm() / (p - start[key]).norm()) / move_off
        worst = max(worst, off)
        if not off <= 1:
            raise AssertionError(f"{key} moved otherwise than in the dense steps, by {off * move_off:.2e} of the move")
    return worst


def run(toy: bool, device: str, backend: str, graph: bool, **settings: Any) -> list[Tensor]:
    """Every metric of every step, then every parameter, moment and counter. The rate changes on the way."""
    narrow = settings.pop("moments", "fp32")
    module = sae(toy, device, backend, **settings)
    more: dict[str, Any] = {"cuda_graph": True} if graph else {}
    step = fastsae.FusedTrainStep(module, lr=LR, moments=narrow, backend=backend, **more)
    seen: list[Tensor] = []
    for i, x in enumerate(2 * batches(toy, device)):
        if i == STEPS:
            step.lr.fill_(LR / 2)
        seen += [value.clone() for value in step(x).values()]
    moments = [t for state in step.optimizer.state.values() for t in state.values()]
    return [*seen, *(p.detach() for p in module.parameters()), *module.buffers(), *moments]


def graph_is_the_step(name: str, toy: bool, device: str, backend: str) -> float:
    """The same bits with and without cuda_graph, over a change of the learning rate."""
    plain, graphed = (run(toy, device, backend, graph, **SETTINGS[name]) for graph in (False, True))
    off = [i for i, (a, b) in enumerate(zip(plain, graphed, strict=True)) if not torch.equal(a, b)]
    if off:
        raise AssertionError(
            f"{len(off)} of {len(plain)} tensors differ between a step and its CUDA graph, first {off[0]}"
        )
    return 0.0
