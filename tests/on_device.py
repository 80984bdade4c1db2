"""New tensors on a device, for tests of a GPU backend: the same test makes CPU tensors for a CPU backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

MAKERS = frozenset(
    {
        torch.arange, torch.as_tensor, torch.empty, torch.empty_strided, torch.eye, torch.full,
        torch.linspace, torch.ones, torch.rand, torch.randint, torch.randn, torch.randperm, torch.scalar_tensor,
        torch.sparse_coo_tensor, torch.sparse_csr_tensor, torch.tensor, torch.zeros,
    }
)  # fmt: skip


class OnDevice(TorchFunctionMode):
    """Inside, a tensor made without device= is made on the CPU, drawn by a CPU generator where there is one, and moved.

    So its numbers are those of a test on the CPU. torch.set_default_device refuses such a generator.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func not in MAKERS or given.get("device") is not None:
            return func(*args, **given)
        if any(isinstance(one, Tensor) and one.device.type != "cpu" for one in args):
            return func(*args, **given)
        made = func(*args, **{**given, "device": "cpu"})
        return made.detach().to(self.device).requires_grad_(made.requires_grad)
