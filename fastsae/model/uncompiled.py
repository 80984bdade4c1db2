"""What a compiled forward pass runs outside its graph. Imported while compiling only: torch._dynamo takes a second."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastsae.model.sae import SparseAutoencoder


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="the rule's thresholds start from data; for a graph without a break, call sae.start_(x) on a batch before"
)
def start(sae: SparseAutoencoder, x: Tensor, target: Tensor | None) -> None:
    """sae.start_(x, target)"""
    sae.start_(x, target)
