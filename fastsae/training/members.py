"""One SAE of an optimizer: its parameters, the ledger of its gradients, the low-precision copy of its encoder."""

from __future__ import annotations

from torch import Tensor, nn

from fastsae.model.placement import Placement
from fastsae.model.sae import SparseAutoencoder
from fastsae.ops import checks
from fastsae.ops.ledger import Ledger
from fastsae.ops.sums import sum_of_squares
from fastsae.training.dictionaries import Dictionaries, HasDictionaries
from fastsae.training.screen import KeptScreen, shared_backend


class Member:
    """One SAE of an optimizer: its parameters, its ledger, its screen."""

    def __init__(
        self, given: SparseAutoencoder | HasDictionaries | Dictionaries, backend: str | None, term_bytes: int | None
    ):  # fmt: skip
        self.sae = given if isinstance(given, SparseAutoencoder) else None
        self.module = given if isinstance(given, nn.Module) else None
        self.dictionaries = d = Dictionaries.of(given)
        checks.not_fully_sharded(self.parameters())
        frozen = [name for name, p in self.parameters().items() if not p.requires_grad]
        if frozen:
            raise ValueError(
                f"{', '.join(frozen)} do not require a gradient, but a fused update steps every parameter of an SAE; "
                "call .requires_grad_(), or use a torch optimizer on the others"
            )
        self.ledger = Ledger(d.W_enc, d.W_dec, d.b_enc, d.b_dec, d.pre_bias, d.transposed)
        sae = self.sae  # a closure over self would keep a dropped optimizer, and its ledger, alive
        self.screen = KeptScreen(
            d.encoder_rows, d.b_enc, lambda: d.screen_k if sae is None else sae.rule.screen_k, d.screened,
            lambda: backend if sae is None else shared_backend(sae.backend, backend),
        )  # fmt: skip
        self.ledger.kept, self.ledger.processes, self.ledger.term_bytes = self.screen, self.placement, term_bytes
        self.agreed = False  # whether the other processes' optimizers have the same settings

    def parameters(self) -> dict[str, Tensor]:
        return {**self.dictionaries.main, **self.dictionaries.others}

    @property
    def placement(self) -> Placement | None:
        return None if self.sae is None else self.sae.placement

    @property
    def shares_latents(self) -> bool:
        return self.placement is not None and self.placement.latents.size > 1

    def squares_of(self, others: dict[str, Tensor]) -> Tensor | float:
        """The sum of squares of the gradients of `others`; a rule's have a part in each shard of the dictionary."""
        squares = {name: sum_of_squares(grad.reshape(1, -1)) for name, grad in others.items()}
        if self.placement is not None:
            for name in self.dictionaries.undecayed:
                if name in squares:
                    squares[name] = self.placement.latents.sum(squares[name])
        return sum(squares.values())

    def squared_norm(self, stats: Tensor) -> Tensor:
        """The squared norm of all gradients from the sums of squares (4,) that an update returns."""
        return stats.sum() if self.placement is None else self.placement.squared_norm(stats)

    def current(self) -> dict[str, Tensor]:
        """The module's current parameters by the same names."""
        if self.sae is not None:
            return {name: getattr(self.sae, name) for name in self.parameters()}
        if self.module is not None and not isinstance(self.module, HasDictionaries):
            raise RuntimeError(
                f"this optimizer's {type(self.module).__name__} is not accelerated any more (fastsae.unaccelerate); "
                "make a new optimizer for it"
            )
        now = self.dictionaries if self.module is None else Dictionaries.of(self.module)
        return {**now.main, **now.others}
