"""What a compiled forward pass runs outside its graph. Imported only for compiling: torch._dynamo takes a second."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae.model import counting


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="the rule's thresholds start from data; for a graph without a break, call sae.start_(x) on a batch before"
)
def start(sae: Any, x: Tensor, target: Tensor | None) -> None:
    """`start_` of a SparseAutoencoder, which this module cannot import: it is imported by its forward pass."""
    sae.start_(x, target)


_several = "DistributedDataParallel runs this forward pass, which reads the other processes' counts"
over_processes = torch.compiler.disable(counting.over_processes, reason=_several)
in_all_processes = torch.compiler.disable(counting.in_all_processes, reason=_several)
