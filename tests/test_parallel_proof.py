"""Many steps of every rule, tied and not, with moments of fp32 and bf16, on several processes against one.

20 steps; 200, which take a quarter of an hour on two processes, with FASTSAE_TEST_PROOF=some or all.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import parallel_proof_worker as worker
from tests.test_parallel import launch

WHICH = os.environ.get("FASTSAE_TEST_PROOF", "few")
"""few, some: on two processes every rule in one way. all: on two processes in every way, on three and four in one way,
another on each mesh.
"""
MESHES = worker.MESHES if WHICH == "all" else worker.MESHES[:2]
CLOSE = 1e-8
"""Of the largest number of a tensor, in float64."""
LOOSE = 1e-4
"""In float32 on shards, whose reconstructions are added in another order."""
SUMS = 1e-12
"""Of losses, which are added in float64, where everything else has the same bits."""


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference, of the largest number."""
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found, expected) else float("inf")
    found, expected = found.double(), expected.double()
    if torch.equal(found, expected) or not expected.numel():
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max())


def worst(found: dict[str, Any], expected: dict[str, Any], *, metrics: bool) -> tuple[float, str]:
    """Of the metrics, or of all else."""
    assert found.keys() == expected.keys()
    return max((apart(found[name], t), name) for name, t in expected.items() if name.startswith("metrics.") == metrics)


def allowed(case: worker.Case, latents: int) -> tuple[float, float]:
    """How far apart metrics, and all else, may be."""
    if case[-1] == "float64":
        return CLOSE, CLOSE
    return (SUMS, 0.0) if latents == 1 else (LOOSE, LOOSE)


@pytest.mark.long
@pytest.mark.parametrize(("data", "latents"), MESHES)
def test_many_steps_of_every_rule(data: int, latents: int, tmp_path: Path) -> None:
    """In float64 within rounding; in float32 a shared batch has one process's bits."""
    world, since, far = data * latents, time.monotonic(), []
    which = WHICH if world == 2 else "some"
    launch(
        world, str(tmp_path / "store"), str(tmp_path), str(data), str(latents), which,
        module="tests.parallel_proof_worker", limit=7200,
    )  # fmt: skip
    took = time.monotonic() - since
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    cases = worker.cases(data, latents, which)
    for case in cases:
        first, expected = ranks[0][case], worker.alone(case)
        for metrics, most in zip((True, False), allowed(case, latents), strict=True):
            assert all(worst(other[case], first, metrics=metrics)[0] == 0 for other in ranks[1:]), case
            by, where = worst(first, expected, metrics=metrics)
            print(f"{data}x{latents} {' '.join(case)}: {by:.1e} {where if by else ''}")  # for LOG.md, by pytest -s
            if not by <= most:
                far.append(f"{case}: {where} differs by {by:.1e} of the largest")
    print(f"{data}x{latents}: {len(cases)} cases, {took:.0f} s")
    assert not far, "; ".join(far)
