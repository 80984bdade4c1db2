"""What a training step exchanges and keeps, by formula: TopK, loss mse, no AuxK, float32 weights.

Bytes received by one process. The data sheets' rates below turn them into lower bounds for machines that nothing has
run on yet.
"""

from __future__ import annotations

from dataclasses import dataclass

NUMBER, ACT, INDEX, COUNT = 4, 4, 4, 8
"""Bytes of a weight or activation, of an act, of a latent's number and of a counter."""


@dataclass(frozen=True)
class Shape:
    """N tokens a step, D wide, M latents, K active; on data x latents processes."""

    N: int
    D: int
    M: int
    K: int
    data: int = 1
    latents: int = 1

    @property
    def processes(self) -> int:
        return self.data * self.latents


def received(s: Shape) -> dict[str, float]:
    """Bytes that one process receives in a step, by what they are."""
    n, m, peers, others = s.N / s.data, s.M / s.latents, s.latents - 1, s.data - 1
    found: dict[str, float] = {}
    if peers:
        found["candidates"] = peers * n * min(s.K, m) * ACT
        found["partial reconstructions"] = 2 * peers / s.latents * (n + 1) * s.D * NUMBER
    if others:
        found["inputs and gradients"] = others * n * 2 * s.D * NUMBER
        found["codes"] = others * n * (s.K / s.latents * (ACT + INDEX) + (COUNT if peers else 0))
        found["counts"] = 2 * others / s.data * m * COUNT
    return found


def ddp(s: Shape) -> float:
    """Bytes that one process receives if dense gradients are all-reduced (DistributedDataParallel)."""
    p = s.processes
    return 2 * (p - 1) / p * 2 * s.M * s.D * NUMBER


def fsdp(s: Shape) -> float:
    """The same if weights are gathered for forward and backward, and gradients reduced and scattered (FSDP2)."""
    p = s.processes
    return 3 * (p - 1) / p * 2 * s.M * s.D * NUMBER


def kept(s: Shape, moments: str = "fp32") -> float:
    """Bytes of weights, Adam's moments, the low-precision copy of the encoder and the counters of one process."""
    each = {"fp32": 8.0, "bf16": 4.0, "8bit": 2.0}[moments]
    m = s.M / s.latents
    return m * s.D * (2 * (NUMBER + each) + 2) + 2 * m * COUNT


def kept_by_ddp(s: Shape) -> float:
    """Bytes of weights, gradients, fp32 moments and dense float32 pre-acts of one process: DDP of dense PyTorch."""
    return s.M * s.D * 2 * 4 * NUMBER + s.N / s.processes * s.M * NUMBER


def kept_by_fsdp(s: Shape) -> float:
    """The same with FSDP2: shards of the first three, both dictionaries gathered, and the dense pre-acts."""
    return s.M * s.D * 2 * NUMBER * (4 / s.processes + 1) + s.N / s.processes * s.M * NUMBER


@dataclass(frozen=True)
class Machine:
    """Rates of one GPU, from its data sheet: bytes and operations per second, and bytes of memory."""

    name: str
    memory: float
    copy: float
    bf16: float
    inside: float
    """Received from other GPUs of the same machine."""
    between: float
    """Received from GPUs of other machines."""
    gpus: int = 8


H200 = Machine("H200", 141e9, 4.8e12, 989e12, 450e9, 50e9)


def seconds(s: Shape, machine: Machine = H200) -> dict[str, float]:
    """A lower bound of a step by its parts: product, update and exchange, none of which overlap."""
    m, n = s.M / s.latents, s.N / s.data
    # Both dictionaries and their moments are read and written once.
    update = m * s.D * 2 * 3 * NUMBER * 2 / machine.copy
    parts = received(s)
    shards = sum(value for name, value in parts.items() if name in ("candidates", "partial reconstructions"))
    rate = machine.inside if s.processes <= machine.gpus else machine.between
    exchange = shards / (machine.inside if s.latents <= machine.gpus else machine.between)
    exchange += (sum(parts.values()) - shards) / rate
    return {"product": 2 * n * s.D * m / machine.bf16, "update": update, "exchange": exchange}
