"""What is run, in which order, and at which sizes: jobs of items, most important first.

A job is a child process, an item what is measured, recorded and resumed on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from bench.cases import Case

SMALL = Case("small", N=8192, D=768, M=24576, K=32)
BIG = Case("big", N=8192, D=4096, M=131072, K=64)
AXES = {"K": (256, 8, 64, 128, 512), "N": (1024, 16384, 2048, 4096), "M": (6144, 98304, 12288, 49152),
        "D": (384, 4096, 1536)}  # fmt: skip
TOY = Case("small", N=16, D=24, M=96, K=4)


def _cases(small: Case, big: Case, axes: dict[str, tuple[int, ...]]) -> dict[str, Case]:
    cases = [small, big, *(replace(small, name=kind, distribution=kind) for kind in ("zipf", "hot"))]
    cases.append(replace(small, name="sweep-base"))
    for axis, sizes in axes.items():
        cases += [Case(**asdict(small) | {"name": f"sweep-{axis}-{size}", axis: size}) for size in sizes]
    return {case.name: case for case in cases}


CASES = {
    "full": _cases(SMALL, BIG, AXES),
    "toy": _cases(TOY, replace(TOY, name="big", D=40, M=160), {"K": (2,), "N": (8,)}),
}

OPS = ("encode_topk", "decode", "decode_error", "active_dot", "by_latent", "active_outer", "update_latents_",
       "encode_batch_topk", "encode_above", "encode_topk rows")  # fmt: skip
LAYOUTS = ("fixed", "ragged", "heavy", "hot")
SPARSE = ("decode", "active_dot", "active_outer")
"""What torch.sparse can do too."""
CODES = tuple(f"{op} {layout}" for op in (*SPARSE, "decode_error", "by_latent") for layout in LAYOUTS)
SPARSE_CODES = tuple(f"{op} {layout}" for op in SPARSE for layout in LAYOUTS)
CEILINGS = ("copy", "fp16 8192", "bf16 8192", "fp32 8192", "fp16 encoder", "fp32 encoder")
OURS = ("fastsae graph", "fastsae")
DENSE = ("dense bf16", "dense bf16 compiled")
MORE_DENSE = ("dense tf32", "dense tf32 compiled", "dense fp32", "sparse eager", "sparse eager bf16")
MORE_PEERS = ("sae-lens", "sae-lens bf16", "sae-lens sparse", "dictionary-learning")


class NotThere(RuntimeError):
    """What was to be measured does not exist here; the message says why."""


@dataclass(frozen=True)
class Settings:
    """What parent and children share. everything: what is of less weight too."""

    device: str = "cuda"
    size: str = "full"
    backends: tuple[str, ...] = ("cuda", "triton")
    everything: bool = False

    @property
    def cases(self) -> dict[str, Case]:
        return CASES[self.size]

    @property
    def is_toy(self) -> bool:
        return self.size == "toy"


@dataclass(frozen=True)
class Job:
    """kind: what runs it, see child.KINDS; limit: seconds after which an item is given up and its process killed.

    file: the file that the results depend on, with the device and torch, where they are not of our sources.
    """

    name: str
    kind: str
    items: tuple[str, ...]
    case: str | None = None
    backend: str | None = None
    limit: float = 60.0
    file: str | None = None


def jobs(settings: Settings) -> list[Job]:
    """Every job of a run, most important first. Names: <kind>-<case>-<backend>; without a backend it is not ours."""

    def first(backend: str) -> list[Job]:
        """The tests, without which nothing of a backend is timed."""
        items = ("accumulation", "tests") if backend != "cpu" else ("tests",)
        return [Job(f"check-{backend}", "check", items, backend=backend, limit=240)]

    def ours(kind: str, backend: str, case: str, items: tuple[str, ...], limit: float = 60.0) -> Job:
        return Job(f"{kind}-{case}-{backend}", kind, items, case, backend, limit)

    def steps(backend: str) -> list[Job]:
        return [
            *(ours("profile", backend, case, ("kernels",), 120) for case in ("small", "big")),
            *(ours("steps", backend, case, (*OURS, "graph is step"), 120) for case in ("small", "big")),
        ]

    def theirs(case: str, dense: tuple[str, ...], peers: tuple[str, ...], start: str = "") -> list[Job]:
        dense = tuple(name for name in dense if not (settings.is_toy and "compiled" in name))  # a compiler's minute
        return [
            Job(f"{start}dense-{case}", "steps", dense, case, limit=120, file="bench/dense.py"),
            Job(f"{start}peers-{case}", "steps", peers, case, limit=120, file="bench/peers.py"),
        ]

    one, others = settings.backends[:1], settings.backends[1:]
    found = [job for backend in one for job in first(backend)]
    found.append(Job("ceilings", "ceilings", CEILINGS, file="bench/gpu/ceilings.py"))
    found += [job for backend in one for job in steps(backend)]
    found += [job for case in ("small", "big") for job in theirs(case, DENSE, ("sparsify",))]
    found += [ours("ops", backend, "big", OPS) for backend in one]
    found += [job for backend in others for job in (*first(backend), *steps(backend))]
    if not settings.everything:
        return found
    for backend in settings.backends:
        found += [Job(f"sanitizer-{backend}", "check", ("memcheck", "racecheck"), backend=backend, limit=300)]
        found += [ours("ops", backend, case, OPS) for case in ("small", "big") if (backend, case) != (one[0], "big")]
        found += [ours("codes", backend, "big", CODES)]
        found += [ours("steps", backend, case, OURS) for case in settings.cases if case not in ("small", "big")]
    found.append(Job("codes-big", "codes", SPARSE_CODES, "big", file="bench/gpu/op_times.py"))
    return [*found, *(job for case in ("small", "big") for job in theirs(case, MORE_DENSE, MORE_PEERS, "more-"))]


def chosen(plan: Sequence[Job], only: Sequence[str]) -> list[Job]:
    """The jobs whose name starts with one of `only`, and the checks of their backends; nothing given: all.

    Raises ValueError where nothing is left.
    """
    kept = [job for job in plan if not only or any(job.name.startswith(start) for start in only)]
    if not kept:
        raise ValueError(f"no job is left: --only {' '.join(only)}; the jobs are {', '.join(job.name for job in plan)}")
    checked = {job.backend for job in kept}
    return [job for job in plan if job in kept or (job.name == f"check-{job.backend}" and job.backend in checked)]
