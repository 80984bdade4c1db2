"""Dictionaries: the parameters of one SAE, as a fused update needs them, whatever module holds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from fastsae.model.sae import SparseAutoencoder
from fastsae.ops.gradients import rows_of


@dataclass(eq=False)
class Dictionaries:
    """The parameters of one SAE that is not a SparseAutoencoder: what a fused update needs to know about it.

    W_enc (M, D_in; None where the encoder reads W_dec), W_dec (M, D_out), b_enc (M,), b_dec (D_out,): leaf tensors, one
    latent per row. decoder_norm: "unit" keeps the rows of W_dec at norm 1. pre_bias: encoders receive x - b_dec and are
    told so (`pre_bias=` of fastsae.ops). k: active latents per token, or a function that returns it, for a backend that
    chooses its screen by it.
    others: further parameters, stepped elementwise; those named in `undecayed` without weight decay.
    transposed: the names of those that are (D, M) instead, with a contiguous transpose; the ops get p.t() of them.
    """

    W_enc: Tensor | None
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    decoder_norm: str = "free"
    pre_bias: bool = False
    k: int | Callable[[], int | None] | None = None
    screened: bool = True
    others: dict[str, Tensor] = field(default_factory=dict)
    undecayed: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()

    @property
    def main(self) -> dict[str, Tensor]:
        """What `update_latents_` updates, in its order."""
        named = {"W_enc": self.W_enc, "W_dec": self.W_dec, "b_enc": self.b_enc, "b_dec": self.b_dec}
        return {name: p for name, p in named.items() if p is not None}

    def turned(self, name: str | None, t: Tensor) -> Tensor:
        """Converts a tensor between the shape of this parameter and that of its rows, in either direction."""
        return t.t() if name in self.transposed else t

    @staticmethod
    def turned_by(dictionaries: Dictionaries | None) -> Callable[[Any, Tensor], Tensor]:
        """`turned` of the dictionaries of these names; of none, the tensor itself."""
        return (lambda _, t: t) if dictionaries is None else dictionaries.turned

    @property
    def rows(self) -> dict[str, Tensor]:
        """`main` with one latent per row: views of the same memory."""
        return {name: rows_of(p, name in self.transposed) for name, p in self.main.items()}

    def encoder_rows(self) -> Tensor:
        """The encoder, (M, D_in)."""
        if self.W_enc is None:
            return rows_of(self.W_dec, "W_dec" in self.transposed)
        return rows_of(self.W_enc, "W_enc" in self.transposed)

    @property
    def screen_k(self) -> int | None:
        return self.k() if callable(self.k) else self.k

    @staticmethod
    def of(given: Any) -> Dictionaries:
        """The Dictionaries of a module, or the given ones.

        Of a SparseAutoencoder, whose rule's own parameters do not decay: a threshold of 1 is no resting place.
        """
        if isinstance(given, Dictionaries):
            return given
        if not isinstance(given, SparseAutoencoder):
            return given.dictionaries()
        others: dict[str, Tensor] = {} if given.W_skip is None else {"W_skip": given.W_skip}
        return Dictionaries(
            given.W_enc, given.W_dec, given.b_enc, given.b_dec, given.decoder_norm, given.pre_bias,
            given.rule.screen_k, given.rule.screened, {**others, **given.rule_parameters}, tuple(given.rule_parameters),
        )  # fmt: skip


@runtime_checkable
class HasDictionaries(Protocol):
    """A module that says which of its parameters a fused update steps, and how; `fastsae.accelerate` makes these."""

    def dictionaries(self) -> Dictionaries: ...
