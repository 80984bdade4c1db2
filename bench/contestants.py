"""Every contestant by name, made from the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from bench import peers
from bench.cases import Inputs
from bench.dense import Dense, SparseEager
from bench.ours import Fused
from bench.timing import Mark


class Contestant(Protocol):
    """One way to train the SAE of a case. step() is a whole training step and returns its loss."""

    name: str

    def step(self, x: Tensor, mark: Mark = ...) -> Tensor: ...

    def encode(self, x: Tensor) -> object: ...

    def reconstruct(self, x: Tensor) -> Tensor: ...

    def state_bytes(self) -> int: ...


OWN: dict[str, Callable[[Inputs, int], Contestant]] = {
    "fastsae": Fused,
    "dense fp32": Dense,
    "dense bf16": lambda inputs, k: Dense(inputs, k, autocast=True),
    "sparse eager": SparseEager,
    "sparse eager bf16": lambda inputs, k: SparseEager(inputs, k, autocast=True),
}
NAMES = (*OWN, *peers.PEERS)


def make(name: str, inputs: Inputs, k: int) -> Contestant:
    """The contestant of that name. Raises KeyError for an unknown one."""
    if name in OWN:
        return OWN[name](inputs, k)
    return peers.PEERS[name][1](inputs, k)


def unavailable(name: str) -> str | None:
    """The reason why a contestant cannot take part, or None."""
    return None if name in OWN else peers.unavailable(name)
