"""Which of the two GPU backends serves a call that both can serve: a table, choices.json, and how it is read.

`python -m bench.gpu.choices` writes the table: from the timings of bench.gpu where there are some, else from the bytes
that each backend's kernels move; "source" says which. A line is one kind of call of an op and its cost on each backend,
in the table's "unit" or in its own. The cheaper backend goes first. At equal cost cuda does: its launches should cost
the host less, which bench.gpu also measures.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

_TABLE = json.loads(Path(__file__).with_name("choices.json").read_text())
SOURCE: str = _TABLE["source"]
COSTS: dict[tuple[str, str], dict[str, float]] = {(line["op"], line["kind"]): line["cost"] for line in _TABLE["lines"]}
UNIT: str = _TABLE["unit"]


def kind_of(op: str, tensors: tuple[Tensor, ...]) -> str:
    """What distinguishes calls of an op in the table: "rows" (a subset of latents), "ragged" codes, or "fixed"."""
    if op == "encode_topk":
        return "rows" if any(t.ndim == 1 and not t.is_floating_point() for t in tensors[3:]) else "fixed"
    if op in ("decode", "decode_error", "active_outer", "by_latent"):
        return "ragged" if tensors[0].ndim == 1 else "fixed"
    if op == "active_dot":
        return "ragged" if tensors[1].ndim == 1 else "fixed"
    return "fixed"


def first(op: str, tensors: tuple[Tensor, ...]) -> str:
    """The GPU backend to try first, "cuda" or "triton"."""
    cost = COSTS.get((op, kind_of(op, tensors)))
    return "triton" if cost is not None and cost["triton"] < cost["cuda"] else "cuda"
