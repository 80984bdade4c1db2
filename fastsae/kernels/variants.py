"""What each kernel is compiled for: the list for the compile checks, and how a kernel file states its part of it.

A kernel file that holds kernels has `variants() -> list[Variant]`: every kernel × every class of shapes that its
`choose` tells apart, with the configuration that `choose` gives. The checks compile them all without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64",
    torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1", torch.float8_e4m3fn: "*u8",
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One compilation of one kernel.

    name: unique, "<kernel>/<dtype>/<what tells the shape class apart>".
    signature: Triton's type of every argument that is not a constant, by name: "*bf16", "i32", "i64", "fp32", ...
    constants: the value of every constexpr argument, and of every argument that is None.
    aligned: integer arguments that are divisible by 16 in this class; pointers always are.
    product: whether tensor-core instructions are meant.
    maxnreg: the most registers a thread may have on NVIDIA GPUs, if the launcher sets a limit.
    """

    kernel: Any
    name: str
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 2
    aligned: tuple[str, ...] = ()
    product: bool = False
    maxnreg: int | None = None
