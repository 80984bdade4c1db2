"""A safetensors file whose tensors come in pieces, one after the other: none has to be whole in memory.

It has the bytes that the format's own library writes for the same tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

CODES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
"""The format's names of dtypes, in the order in which its library puts tensors."""

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def order_of(shapes: Shapes) -> list[str]:
    """The names of tensors in the order of their data: by dtype, then by name."""
    places = list(CODES)
    return sorted(shapes, key=lambda name: (places.index(shapes[name][0]), name))


def header_of(shapes: Shapes, metadata: Mapping[str, str] | None = None) -> bytes:
    """The beginning of a file of these tensors, up to their data."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for name in order_of(shapes):
        dtype, shape = shapes[name]
        end = at + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-len(text) % 8 + len(text))
    return len(text).to_bytes(8, "little") + text


class TensorWriter:
    """Writes a file of tensors of these shapes. Then `add` all their numbers, in the order of `order_of`."""

    def __init__(self, path: Path, shapes: Shapes, metadata: Mapping[str, str] | None = None):
        self.file = open(path, "wb")  # noqa: SIM115 (closed by `close`)
        self.file.write(header_of(shapes, metadata))

    def add(self, t: Tensor) -> None:
        """The next numbers."""
        self.file.write(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Raises OSError where the last numbers do not fit on the disk."""
        self.file.close()
