"""Tensors of a test on another device: "meta" stands for a GPU."""

from __future__ import annotations

import torch

from tests.cases import CASES
from tests.on_device import OnDevice


def test_new_tensors_are_there() -> None:
    generator = torch.Generator().manual_seed(0)
    with OnDevice("meta"):
        made = [
            torch.zeros(2), torch.tensor([1.0]), torch.randn(2, generator=generator), torch.zeros(2, device=None),
            *CASES[0].inputs(torch.bfloat16),
        ]  # fmt: skip
        assert {t.device.type for t in made} == {"meta"}
        assert torch.zeros(2, device="cpu").device.type == "cpu"
        assert torch.empty_like(torch.zeros(2, device="cpu")).device.type == "cpu"
        leaf = torch.ones(2, requires_grad=True)
        assert leaf.is_leaf
        assert leaf.requires_grad
    assert torch.zeros(2).device.type == "cpu"


def test_the_numbers_are_those_of_the_cpu() -> None:
    drawn = torch.randn(5, generator=torch.Generator().manual_seed(3))
    with OnDevice("cpu"):
        assert torch.equal(torch.randn(5, generator=torch.Generator().manual_seed(3)), drawn)
