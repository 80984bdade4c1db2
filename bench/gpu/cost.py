"""The bytes and operations that each op needs at least; all GB/s, TFLOP/s and per cent of a ceiling come from here.

Weights, inputs, acts and Adam's moments are fp32 (w = 4 bytes), indices int32 (4), the screening copy 2 bytes an entry.
nnz stored activations; a code is nnz (w + 4) bytes, its latent order nnz (4 + 8) + 8 M. A row of D that an activation
points to is counted each time it is gathered, as if no cache held it: where one does, more than 100 % are possible.

  encode_topk, encode_batch_topk, encode_above
                  bytes  N D w + 2 M D + nnz D w + nnz (w + 4): x, the screening copy, one row for the exact score of
                         each activation that is returned, and the code
                  flops  2 N M D on the tensor cores
  decode          bytes  nnz D w + nnz (w + 4) + N D w: gathered rows, code, output;     flops 2 nnz D
  decode_error    decode, and N D w + 8 N: the target, and the sums of squares
  active_dot      bytes  nnz D w + N D w + nnz (4 + w): gathered rows, x, code, output;  flops 2 nnz D
  by_latent       bytes  nnz (w + 4) + nnz 12 + 8 M: code in, order out
  active_outer    bytes  nnz D w + nnz (w + 12) + M D w: gathered rows of x, code and order, output;  flops 2 nnz D
  update_latents_ bytes  2 nnz D w + nnz (w + 12) + M D (2 · 24 + 2): rows of x and of the output's gradient, code and
                         order, then weight, m and v of both dictionaries read and written, the copy written
                  flops  6 nnz D + 2 · 12 M D: acts' gradients and both dictionaries', then Adam
  step            encode_topk + decode + by_latent + update_latents_, and 3 N D w for the loss: x, error, gradient
  dense step      flops  10 N M D: five products;  bytes M D (2 · 24 + 2 · 2 w) + 6 N M w: Adam and the gradients, and
                         pre-acts, acts and their gradients written and read (fused or not, they do not fit a cache)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.cases import Case

W = 4


@dataclass(frozen=True)
class Cost:
    """bytes; flops; and the ceiling that the flops are held against: "narrow" is the tensor cores' in 16 bits."""

    bytes: float
    flops: float
    unit: str = "fp32"


def of(what: str, case: Case, nnz: int | None = None) -> Cost | None:
    """The cost of an op or of a contestant's whole step at these sizes; None for one that is not counted."""
    N, D, M = case.N, case.D, case.M
    n = case.N * case.K if nnz is None else nnz
    gather, adam = n * D * W, M * D * 2 * 24
    encode = Cost(N * D * W + 2 * M * D + gather + n * (W + 4), 2 * N * M * D, "narrow")
    ops = {
        **dict.fromkeys(("encode_topk", "encode_batch_topk", "encode_above"), encode),
        "decode": Cost(gather + n * (W + 4) + N * D * W, 2 * n * D),
        "decode_error": Cost(gather + n * (W + 4) + 2 * N * D * W + 8 * N, 2 * n * D + 4 * N * D),
        "active_dot": Cost(gather + N * D * W + n * (4 + W), 2 * n * D),
        "by_latent": Cost(n * (W + 4) + n * 12 + 8 * M, 0),
        "active_outer": Cost(gather + n * (W + 12) + M * D * W, 2 * n * D),
        "update_latents_": Cost(2 * gather + n * (W + 12) + adam + 2 * M * D, 6 * n * D + 24 * M * D),
    }
    if what.startswith("fastsae"):
        parts = [ops[op] for op in ("encode_topk", "decode", "by_latent", "update_latents_")]
        return Cost(3 * N * D * W + sum(p.bytes for p in parts), sum(p.flops for p in parts), "narrow")
    if what.startswith("dense"):
        unit = "narrow" if "bf16" in what else "tf32" if "tf32" in what else "fp32"
        return Cost(adam + 4 * M * D * W + 6 * N * M * W, 10 * N * M * D, unit)
    return ops.get(what)


@dataclass(frozen=True)
class Ceilings:
    """Measured rates, in bytes (read and written) and operations per second; 0 for one that was not measured."""

    copy: float
    narrow: float
    fp32: float

    @classmethod
    def of(cls, items: Mapping[str, Mapping[str, Any]]) -> Ceilings:
        """From the items of the job "ceilings"."""

        def best(*starts: str) -> float:
            return max((e["rate"] for name, e in items.items() if name.startswith(starts) and "rate" in e), default=0.0)

        return cls(best("copy"), best("bf16", "fp16"), best("fp32"))

    def seconds(self, cost: Cost) -> float:
        """The least time: bytes at the copy's rate or operations at the product's, the slower of both; 0: unknown."""
        rate = {"narrow": self.narrow, "fp32": self.fp32}.get(cost.unit, 0.0)
        return max(cost.bytes / self.copy if self.copy else 0.0, cost.flops / rate if rate else 0.0)


def figures(what: str, case: Case, ms: float, ceilings: Ceilings, nnz: int | None = None) -> dict[str, float | None]:
    """tokens/s, GB/s, TFLOP/s, the floor in ms and its share of the time, for one measured time."""
    cost = of(what, case, nnz)
    floor = ceilings.seconds(cost) * 1e3 if cost else 0.0
    return {
        "tokens_per_s": case.N / ms * 1e3,
        "gbs": cost.bytes / ms / 1e6 if cost else None,
        "tflops": cost.flops / ms / 1e9 if cost and cost.flops else None,
        "floor_ms": floor or None,
        "share_of_floor": floor / ms if floor else None,
    }
