"""What a tensor core loses when it adds up a product: a model of it on the CPU, and the measurement that finds it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastsae.backends.gpu import accumulation, bounds, narrow
from fastsae.backends.gpu.product import fp32_sums

KINDS = {(16, 2): 0.66, (16, 1): 1.19, (16, 0): 2.25, (8, 1): 1.38}
"""k products at once, g bits kept below a float32's last: the worst loss of D columns in units of D · 2⁻²⁴."""


def cut(t: Tensor, exponent: Tensor, bits: int) -> Tensor:
    """t (float64) towards 0 to multiples of 2^(exponent - bits)."""
    unit = torch.ldexp(torch.ones_like(t), exponent - bits)
    return torch.trunc(t / unit) * unit


def added_up(products: Tensor, k: int, g: int) -> Tensor:
    """The sums of products (..., D), float64, by a unit that adds k at a time, cut and not rounded."""
    total = torch.zeros(products.shape[:-1], dtype=torch.float64)
    for block in products.split(k, dim=-1):
        terms = torch.cat([total[..., None], block], dim=-1)
        exponent = torch.frexp(terms.abs().amax(-1)).exponent - 1
        total = cut(terms, exponent[..., None].expand_as(terms), 23 + g).sum(-1)
        total = cut(total, torch.frexp(total).exponent - 1, 23)
    return total


def product(k: int, g: int) -> Callable[[Tensor, Tensor], Tensor]:
    def of(x: Tensor, W: Tensor) -> Tensor:
        sums = added_up(x.double() * W.double(), k, g)  # only the diagonal is looked at
        return torch.diag(sums.half())

    return of


def hard_products(D: int, g: int) -> Tensor:
    """A 1, and numbers that the unit cuts to nothing."""
    hard = torch.full((D,), (1 - 2.0**-10) * 2.0 ** (-23 - g), dtype=torch.float64)
    hard[0] = 1.0
    return hard


@pytest.mark.parametrize(("k", "g"), KINDS)
def test_the_worst_is_what_is_said_and_no_sum_loses_more(k: int, g: int) -> None:
    said = accumulation.worst(k, g)
    assert said == pytest.approx(KINDS[k, g], abs=0.006)
    D = 4096
    generator = torch.Generator().manual_seed(k + g)
    drawn = torch.rand(20, D, generator=generator, dtype=torch.float64)
    drawn[10:] *= 2.0 ** torch.randint(-30, 1, (10, D), generator=generator)
    drawn[5:15] *= torch.randn(10, D, generator=generator).sign()
    hard = hard_products(D, g)[None]
    for products in (drawn, hard):
        lost = (added_up(products, k, g) - products.sum(-1)).abs() / products.abs().sum(-1) / (D * 2.0**-24)
        assert float(lost.max()) <= said
    assert float(lost.max()) >= 0.85 * 2 * 2.0**-g, "the hard sum does not come near the bound"


@pytest.mark.parametrize(("k", "g"), KINDS)
def test_the_measurement_finds_the_unit(k: int, g: int) -> None:
    found = accumulation.measure(product(k, g), 2048, 16, torch.device("cpu"))
    assert found["block"] == k
    assert found["constant"] == pytest.approx(accumulation.worst(k, g))
    assert found["loss"] == pytest.approx(2 * 2.0**-g, rel=0.02)


def test_a_product_that_rounds_is_bounded_too() -> None:
    def rounds(x: Tensor, W: Tensor) -> Tensor:
        total = torch.zeros(len(x))
        for column in (x.float() * W.float()).unbind(1):
            total = total + column
        return torch.diag(total.half())

    assert accumulation.measure(rounds, 1024, 8, torch.device("cpu"))["constant"] >= accumulation.ROUNDED


def test_a_kind_that_was_not_measured_uses_the_worst(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(accumulation, "FILE", tmp_path / "accumulation.json")
    accumulation.measured.cache_clear()
    x = torch.ones(3, 64)
    copy = narrow.Narrow(x.half(), torch.ones(3), x.norm(dim=1), torch.zeros(3))
    cpu = torch.device("cpu")
    try:
        assert bounds.token_bounds(copy, 4096)[1].min() >= 8 * 2.25 * 4096 * 2.0**-24
        accumulation.keep(cpu, 0.75)
        assert json.loads(accumulation.FILE.read_text()) == {"cpu": 0.75}
        assert accumulation.constant(cpu, torch.float16) == 0.75
        assert bounds.token_bounds(copy, 4096)[1].max() < 8 * 1.0 * 4096 * 2.0**-24
        assert accumulation.constant(cpu, torch.float32) == accumulation.ROUNDED
    finally:
        accumulation.measured.cache_clear()


def test_the_bound_in_use_holds_for_the_worst_unit() -> None:
    D = 4096
    products = hard_products(D, 0)
    lost = float((added_up(products, 16, 0) - products.sum()).abs() / products.sum())
    assert lost > (1.25 * D + 64) * 2.0**-24, "the bound before it was known what tensor cores lose"
    assert lost <= bounds.bound_of_sums(D, accumulation.constant(torch.device("cpu"), torch.float16))


@pytest.mark.parametrize("given", [(True, True), (False, True), (False, False)])  # torch refuses (True, False)
@pytest.mark.parametrize("accumulated", [True, False])
def test_torchs_settings_of_sums_are_put_back(given: tuple[bool, bool], accumulated: bool) -> None:
    settings = torch.backends.cuda.matmul

    def held() -> tuple[bool, bool, bool]:
        return (
            settings.allow_fp16_accumulation, settings.allow_fp16_reduced_precision_reduction,
            settings.allow_fp16_reduced_precision_reduction_split_k,
        )  # fmt: skip

    before = held()
    settings.allow_fp16_accumulation, settings.allow_fp16_reduced_precision_reduction = accumulated, given
    try:
        with contextlib.suppress(ZeroDivisionError), fp32_sums():
            assert held() == (False, False, given[1])
            raise ZeroDivisionError
        assert held() == (accumulated, *given)
    finally:
        settings.allow_fp16_accumulation, settings.allow_fp16_reduced_precision_reduction = before[0], before[1:]
