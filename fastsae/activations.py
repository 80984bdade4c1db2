"""Activation rules: which latents of a token are active, as one object that a module owns and a file records.

A rule is a small frozen dataclass whose fields are its settings. It turns the encoder's input into `SparseCodes`; what
it costs and how exact it is is the op's affair (`fastsae.ops`). To add a rule, subclass `Activation` and list it in
`ACTIVATIONS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from fastsae import ops
from fastsae.codes import Screen, SparseCodes


class Activation(ABC):
    """The interface. `kind` is the name in saved files."""

    kind: ClassVar[str]

    @abstractmethod
    def check(self, d_sae: int) -> None:
        """Raises ValueError when the rule cannot serve `d_sae` latents."""

    @abstractmethod
    def encode(
        self,
        x: Tensor,
        W: Tensor,
        b: Tensor,
        *,
        screen: Screen | None = None,
        precision: str = "exact",
        backend: str | None = None,
        check: bool = False,
    ) -> SparseCodes:
        """The code of x (*batch, D) under the dictionary W (M, D) and bias b (M,); differentiable in all three."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The settings as JSON, with `kind`; `activation_from_config` reads it back."""


@dataclass(frozen=True)
class TopK(Activation):
    """acts = relu(x Wᵀ + b) at its k largest entries, 0 elsewhere. Ties go to the lower index.

    Source: Makhzani & Frey 2013 (arXiv 1312.5663); Gao et al. 2024 (arXiv 2406.04093), eq. 3.
    """

    k: int
    kind: ClassVar[str] = "topk"

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"TopK has k = {self.k!r}, expected a whole number of at least 1")

    def check(self, d_sae: int) -> None:
        if self.k > d_sae:
            raise ValueError(f"TopK has k = {self.k}, expected at most d_sae = {d_sae}; lower k or widen the SAE")

    def encode(
        self,
        x: Tensor,
        W: Tensor,
        b: Tensor,
        *,
        screen: Screen | None = None,
        precision: str = "exact",
        backend: str | None = None,
        check: bool = False,
    ) -> SparseCodes:
        return ops.encode_topk(x, W, b, self.k, screen=screen, precision=precision, backend=backend, check=check)

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


ACTIVATIONS: dict[str, type[Activation]] = {TopK.kind: TopK}


def activation_from_config(config: dict[str, Any]) -> Activation:
    """The rule that `config()` described. Raises ValueError for an unknown kind or unknown settings."""
    if not isinstance(config, dict) or config.get("kind") not in ACTIVATIONS:
        raise ValueError(f"activation is {config!r}, expected an object whose kind is one of {sorted(ACTIVATIONS)}")
    settings = {name: value for name, value in config.items() if name != "kind"}
    try:
        return ACTIVATIONS[config["kind"]](**settings)
    except TypeError as error:
        raise ValueError(f"activation {config['kind']} does not take the settings {settings}: {error}") from error
