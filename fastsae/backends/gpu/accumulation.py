"""How much a device's matrix units lose when they add up a product: measured once for each kind of device.

A tensor core adds k products to its sum at a time. All k + 1 numbers are cut at g bits below the last of a float32 of
the largest, are added, and the result is cut to a float32. So with S = Σ|xᵢwᵢ| a product of D columns loses at most

    (D/k) · ((k+1) · 2⁻²³⁻ᵍ + 2⁻²³) · S  =  worst(k, g) · D · 2⁻²⁴ · S,     worst(k, g) = 2·2⁻ᵍ·(k+1)/k + 2/k

No vendor says what k and g are. `measure` finds them with products whose exact value is known: a 1, then small numbers
δ² that the cut shortens, then a -1 in column p that leaves nothing but what was kept of them. δ² is just below 2⁻²³ and
just below 2⁻²⁴, so that each of g = 0, 1, 2, ... shows; with p = 1 nothing is cut but the numbers of one block, k - 2.

`python -m bench.gpu` measures first of all, and keeps the figure in accumulation.json here. A kind that is not in that
file uses the worst that is known, UNMEASURED.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from math import ceil, log2
from pathlib import Path

import torch
from torch import Tensor

from fastsae.backends import buffers

UNMEASURED = 2.25
"""worst(16, 0)."""
ROUNDED = 1.0
"""Of a product in float32 whose additions are rounded, in any order."""
LEAST_BLOCK = 8
"""k of the tensor cores since sm_80, at least: where it cannot be told."""
FILE = Path(__file__).with_name("accumulation.json")
SPREAD = 64
"""Columns of the product that shows k; no tensor core adds more at once."""
SCALE = 64.0
"""Keeps what is left after the -1 above float16's subnormal numbers."""
LEAST_LOSS = 2.0**-4


def worst(k: int, g: float) -> float:
    """The most that a product of D columns loses, in units of D · 2⁻²⁴ · Σ|xᵢwᵢ|."""
    return 2 * 2.0**-g * (k + 1) / k + 2 / k


def kind(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def measured() -> dict[str, float]:
    """The constant of every kind of device that was measured."""
    kinds: dict[str, float] = json.loads(FILE.read_text()) if FILE.exists() else {}
    return kinds


def constant(device: torch.device, dtype: torch.dtype) -> float:
    """What bounds the loss of a product of two matrices of this dtype there, in units of D · 2⁻²⁴ · Σ|xᵢwᵢ|."""
    if dtype == torch.float32:  # IEEE products, never TF32
        return ROUNDED
    return measured().get(kind(device), UNMEASURED)


def keep(device: torch.device, figure: float) -> None:
    """Writes the measured constant of a kind of device; processes that start later use it."""
    FILE.write_text(json.dumps(dict(sorted({**measured(), kind(device): figure}.items())), indent=1) + "\n")
    measured.cache_clear()


def probe(D: int, tokens: int, power: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, float]:
    """x, W (tokens, D) float16, p (tokens,) and δ²: ⟨x[t], W[t]⟩ = SCALE² · (1 + Σ δ² - 1), the -1 in column p[t].

    δ² is just below 2⁻ᵖᵒʷᵉʳ. Some tokens have p = 1 and δ after it, as far as SPREAD; the others have δ before p.
    """
    step = 2.0 ** -(power // 2 + 11)  # of float16 just below 2^(-power/2)
    delta = (ceil(2.0 ** (-power / 2) / step) - 1) * step
    ends = (1, D - 1, D // 2 - 1, D // 4 - 1)
    p = buffers.zeros((tokens,), torch.int64, device)
    for first, end in enumerate(ends):
        p[first :: len(ends)] = end
    column = buffers.arange(D, torch.int64, device)
    x = buffers.zeros((tokens, D), torch.float32, device)
    x.masked_fill_(column < torch.where(p == 1, SPREAD, p)[:, None], delta)
    x[:, 0] = 1
    x.scatter_(1, p[:, None], 1)
    W = x.scatter(1, p[:, None], -1)
    return (x * SCALE).half(), (W * SCALE).half(), p, delta * delta


def measure(product: Callable[[Tensor, Tensor], Tensor], D: int, tokens: int, device: torch.device) -> dict[str, float]:
    """{"constant", "loss", "block"} of a product(x, W) = x Wᵀ of float16 matrices (tokens, D), D 1024 or more.

    loss: the largest that was seen, in units of 2⁻²⁴ a column before p; block: k, or LEAST_BLOCK. The constant is
    `worst` of both, with the loss, rounded up to a power of two, as 2·2⁻ᵍ.
    """
    loss, block = 0.0, float(SPREAD)
    for power in (23, 24):
        x, W, p, square = probe(D, tokens, power, device)
        got = product(x, W).diagonal().double() / SCALE**2
        terms = torch.where(p == 1, SPREAD - 2, p - 1).double()
        lost = (terms * square - got) * 2.0**24
        of_each = float((lost / terms)[p > 1].abs().max())
        loss = max(loss, of_each)
        together = float(lost[p == 1].max()) / of_each + 2 if of_each > LEAST_LOSS else 0.0
        block = min(block, together)
    k = max(LEAST_BLOCK, round(block)) if block >= 4 else LEAST_BLOCK
    shown = LEAST_LOSS
    while shown < 0.95 * loss:  # the first block loses a little more
        shown *= 2
    return {"constant": worst(k, -log2(shown / 2)), "loss": loss, "block": float(k)}
