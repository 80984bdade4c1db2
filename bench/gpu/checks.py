"""The checks of one backend, item by item: every op × hard case × dtype, and what holds over all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu import check_codes, check_steps, check_update
from bench.gpu.plan import Job, Settings
from bench.gpu.truth import DTYPES, Hard, Tally, hard_cases
from fastsae import env

UPDATE_CASES = ("random", "odd", "hot latent", "no tokens", "one token", "all negative", "equal tokens", "wide")
SETTINGS_CASES = ("odd", "random")
QUICK_CASES = ("random", "odd", "ties", "no tokens", "one token", "hot latent")
QUICK_SECONDS, SECONDS = 14.0, 45.0
"""Seconds after which an item begins no further check. The parent's limit is far longer: on a cold machine a single
check compiles a dozen kernels first."""


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def same_bits(one: list[Tensor], other: list[Tensor], what: str) -> None:
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        if not torch.equal(a.nan_to_num(), b.nan_to_num()):
            raise AssertionError(f"{what}: tensor {i} of {len(one)} differs")


class Checks:
    """The items of a job of kind "check"."""

    def __init__(self, job: Job, settings: Settings) -> None:
        assert job.backend is not None
        self.backend, self.device, self.toy = job.backend, settings.device, settings.is_toy
        self.quick = job.kind == "quick check"
        self.seconds = QUICK_SECONDS if self.quick else SECONDS
        self.cases = tuple(c for c in hard_cases(settings.is_toy) if not self.quick or c.name in QUICK_CASES)
        # Triton's interpreter truncates where it should round to bfloat16.
        interpreted = self.backend == "triton" and env.triton_is_interpreted()
        self.dtypes = tuple(dtype for dtype in DTYPES if not (interpreted and dtype == torch.bfloat16))

    def __call__(self, item: str) -> dict[str, Any]:
        tally = Tally(self.device, self.seconds)
        if item == "update_latents_":
            self.update(tally)
        elif item in ("run twice", "deterministic"):
            self.repeat(tally, under=deterministic if item == "deterministic" else contextlib.nullcontext)
        elif item == "fused step":
            for name in check_steps.SETTINGS:
                tally.check(name, partial(check_steps.fused_step, name, self.toy, self.device, self.backend))
        elif item == "fused step as a CUDA graph":
            return self.graph(tally)
        else:
            self.codes(tally, item)
        return tally.result()

    def each(self, call: Callable[[Hard, torch.dtype, str, str], Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
        """(label, check) for every case and dtype, fp32 of every case first; quick: the other dtypes of one case."""
        for dtype in self.dtypes:
            for case in self.cases:
                if not self.quick or dtype == torch.float32 or case.name == "odd":
                    yield f"{case.name} {short(dtype)}", partial(call, case, dtype, self.device, self.backend)

    def codes(self, tally: Tally, op: str) -> None:
        for label, call in self.each(check_codes.CHECKS[op]):
            tally.check(label, call)
        if op == "encode_topk":
            for label, call in self.each(check_codes.encode_topk_options):
                if not label.startswith(("ties", "k is all")):
                    tally.check(f"rows, scale, offset, screen: {label}", call)

    def update(self, tally: Tally) -> None:
        by_name = {case.name: case for case in self.cases}
        for dtype in self.dtypes:
            for name in SETTINGS_CASES[: 1 if self.quick else None]:
                for settings, given in check_update.SETTINGS.items():
                    problem = partial(check_update.make, by_name[name], dtype, **given)
                    tally.check(f"{name} {short(dtype)} {settings}", partial(self.one_update, problem))
            for name in UPDATE_CASES:
                if name in by_name and name not in SETTINGS_CASES and not self.quick:
                    problem = partial(check_update.make, by_name[name], dtype)
                    tally.check(f"{name} {short(dtype)}", partial(self.one_update, problem))
            screen = partial(check_update.refreshes_its_screen, by_name["random"], dtype, self.device, self.backend)
            tally.check(f"screen {short(dtype)}", screen)

    def one_update(self, make: Callable[[], check_update.Problem]) -> float:
        return check_update.check(make(), self.device, self.backend)

    def repeat(self, tally: Tally, under: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        """Two calls of everything give the same bits; the second one `under` a setting."""

        def twice(make: Callable[..., list[Tensor]], case: Hard, dtype: torch.dtype, device: str, backend: str) -> None:
            first = make(case, dtype, device, backend)
            with under():
                second = make(case, dtype, device, backend)
            same_bits(first, second, "two calls of the same")

        for what, make in (("ops", check_codes.everything), ("update", check_update.outputs)):
            for label, call in self.each(partial(twice, make)):
                if label.startswith(("random", "hot latent", "ties")):
                    tally.check(f"{what}: {label}", call)
        name = next(iter(check_steps.SETTINGS))

        def steps() -> None:
            first = check_steps.run(self.toy, self.device, self.backend, False, **check_steps.SETTINGS[name])
            with under():
                second = check_steps.run(self.toy, self.device, self.backend, False, **check_steps.SETTINGS[name])
            same_bits(first, second, "two runs of a few steps")

        tally.check("fused steps", steps)

    def graph(self, tally: Tally) -> dict[str, Any]:
        if not check_steps.has_graphs():
            return {"status": "missing", "error": "not there yet: FusedTrainStep takes no cuda_graph"}
        if self.device != "cuda":
            return {"status": "missing", "error": "a CUDA graph needs a CUDA device"}
        for name in check_steps.SETTINGS:
            tally.check(name, partial(check_steps.graph_is_the_step, name, self.toy, self.device, self.backend))
        return tally.result()
