"""What is run, in which order, and at which sizes: jobs of items, most important first.

A job is a child process, an item what is measured, recorded and resumed on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.cases import Case

SMALL = Case("small", N=8192, D=768, M=24576, K=32)
BIG = Case("big", N=8192, D=4096, M=131072, K=64)
ZIPF = replace(SMALL, name="zipf", distribution="zipf")
HOT = replace(SMALL, name="hot", distribution="hot")
SWEEP = (
    replace(SMALL, name="sweep-base"),
    *(replace(SMALL, name=f"sweep-K-{K}", K=K) for K in (256, 8, 64, 128, 512)),
    *(replace(SMALL, name=f"sweep-N-{N}", N=N) for N in (1024, 16384, 2048, 4096)),
    *(replace(SMALL, name=f"sweep-M-{M}", M=M) for M in (6144, 98304, 12288, 49152)),
    *(replace(SMALL, name=f"sweep-D-{D}", D=D) for D in (384, 4096, 1536)),
)
TOY = Case("small", N=16, D=24, M=96, K=4)
TOY_SWEEP = (
    replace(TOY, name="sweep-base"),
    replace(TOY, name="sweep-K-2", K=2),
    replace(TOY, name="sweep-N-8", N=8),
    replace(TOY, name="sweep-M-48", M=48),
    replace(TOY, name="sweep-D-12", D=12),
)
CASES = {
    "full": {case.name: case for case in (SMALL, BIG, ZIPF, HOT, *SWEEP)},
    "toy": {
        case.name: case
        for case in (
            TOY,
            replace(TOY, name="big", D=40, M=160),
            replace(TOY, name="zipf", distribution="zipf"),
            replace(TOY, name="hot", distribution="hot"),
            *TOY_SWEEP,
        )
    },
}

OPS = ("encode_topk", "encode_batch_topk", "encode_above", "decode", "decode_error", "active_dot", "by_latent",
       "active_outer", "update_latents_")  # fmt: skip
TIMED = (*OPS, "encode_topk rows")
LAYOUTS = ("fixed", "ragged", "heavy", "hot")
SPARSE = ("decode", "active_dot", "active_outer", "active_outer_regrouped")
"""What torch.sparse can do too; regrouped: the transposed code made inside the timing."""
CODES = tuple(f"{op} {layout}" for op in (*SPARSE, "decode_error", "by_latent") for layout in LAYOUTS)
SPARSE_CODES = tuple(f"{op} {layout}" for op in SPARSE for layout in LAYOUTS)
CALLS = ("decode", "decode bare", "active_dot", "active_outer", "by_latent", "encode_topk", "update_latents_",
         "fused step")  # fmt: skip
TORCH_CALLS = ("decode", "active_dot", "active_outer", "torch.mm")
CHECKS = (*OPS, "exact is fp32", "run twice", "deterministic", "fused step", "fused step as a CUDA graph")
CEILINGS = ("copy", "bf16 8192", "fp16 8192", "fp32 8192", "bf16 encoder", "fp16 encoder", "fp32 encoder")
OURS = ("fastsae", "fastsae graph", "fastsae by part")
"""The fused step, the same as a CUDA graph, and the same op by op, for the time of its parts."""
FIRST = ("dense bf16 compiled", "dense bf16", "sparsify")
"""The contestants that the targets name."""
LATER = ("dense tf32", "dense tf32 compiled", "dense fp32", "dense fp32 compiled", "sparse eager", "sparse eager bf16",
         "sae-lens", "sae-lens bf16", "sae-lens sparse", "dictionary-learning")  # fmt: skip
SLOW = ("compiled",)  # what needs g++ or the GPU's compiler, tens of seconds


@dataclass(frozen=True)
class Settings:
    """What parent and children share. backends: checked, and timed as `timed` says; plant: see faults.plant."""

    device: str = "cuda"
    size: str = "full"
    backends: tuple[str, ...] = ("cuda", "triton", "reference")
    plant: str | None = None

    @property
    def timed(self) -> tuple[str, ...]:
        """All but the reference, which is there to compare with; if it is the only one, the reference."""
        return tuple(name for name in self.backends if name != "reference") or self.backends

    @property
    def cases(self) -> dict[str, Case]:
        return CASES[self.size]

    @property
    def is_toy(self) -> bool:
        return self.size == "toy"


@dataclass(frozen=True)
class Job:
    """kind: what runs it, see child.KINDS; limit: seconds after which an item is given up and its process killed."""

    name: str
    kind: str
    items: tuple[str, ...]
    case: str | None = None
    backend: str | None = None
    limit: float = 60.0

    def identity(self) -> dict[str, Any]:
        """What a stored result must agree in: everything but how many items were asked for, and their limit."""
        return {key: value for key, value in asdict(self).items() if key not in ("items", "limit")}


def jobs(settings: Settings) -> list[Job]:
    """Every job of a run, most important first. Names: <kind>-<case>-<backend>; without a backend it is not ours."""
    toy, timed = settings.is_toy, settings.timed
    step_limit = 60.0 if toy else 120.0

    def each(make: Callable[[str], Job]) -> list[Job]:
        return [make(backend) for backend in timed]

    def check(backend: str) -> Job:
        # Two calls of the reference need not agree: it is made of torch's own ops.
        items = tuple(i for i in CHECKS if backend != "reference" or i not in ("run twice", "deterministic"))
        return Job(f"check-{backend}", "check", items, backend=backend, limit=100)

    def quick(backend: str) -> Job:
        return Job(f"quick-check-{backend}", "quick check", CHECKS, backend=backend, limit=100)

    def ops(case: str) -> list[Job]:
        more = ("torch.topk",)  # of no backend: timed beside the first one
        items = {backend: (*TIMED, *(more if backend == timed[0] else ())) for backend in timed}
        return each(lambda backend: Job(f"ops-{case}-{backend}", "ops", items[backend], case, backend))

    def codes(case: str) -> list[Job]:
        ours = each(lambda backend: Job(f"codes-{case}-{backend}", "codes", CODES, case, backend))
        return [*ours, Job(f"codes-{case}-cusparse", "sparse", SPARSE_CODES, case)]

    def ours(case: str) -> list[Job]:
        return each(lambda backend: Job(f"steps-{case}-{backend}", "step", OURS, case, backend, step_limit))

    def theirs(case: str, items: Sequence[str], name: str = "steps") -> Job:
        kept = tuple(item for item in items if not (toy and any(word in item for word in SLOW)))
        return Job(f"{name}-{case}", "step", kept, case, limit=step_limit)

    def sanitizer(backend: str) -> Job:
        return Job(f"sanitizer-{backend}", "sanitizer", ("memcheck", "racecheck"), backend=backend, limit=120)

    def sweep(backend: str) -> Job:
        points = tuple(name for name in settings.cases if name.startswith("sweep-"))
        return Job(f"sweep-{backend}", "sweep", points, backend=backend)

    overhead = [
        *each(lambda backend: Job(f"overhead-{backend}", "overhead", CALLS, backend=backend)),
        Job("overhead-torch", "overhead", TORCH_CALLS),
    ]
    ceilings = Job("ceilings", "ceilings", CEILINGS)
    untimed = [check(backend) for backend in settings.backends if backend not in timed]
    if toy:
        return [
            *each(check), ceilings, *ours("small"), theirs("small", FIRST), *ops("small"), *codes("small"), *overhead,
            *ours("big"), theirs("big", FIRST), *ours("zipf"), *ours("hot"), *each(sanitizer),
            theirs("small", LATER, "more-steps"), *each(sweep), *untimed,
        ]  # fmt: skip
    return [
        # On a cold machine every shape is compiled first, so the whole set of cases waits until the most wanted times
        # are there. An item stops on its own after some seconds and counts what it did not reach.
        *each(quick),
        ceilings,
        *ours("small"),
        theirs("small", FIRST),
        *ops("small"),
        *ours("big"),
        theirs("big", FIRST),
        *ops("big"),
        *overhead,
        *codes("big"),
        *ours("zipf"),
        *ours("hot"),
        *each(check),
        *each(sanitizer),
        *codes("small"),
        theirs("small", LATER, "more-steps"),
        *each(sweep),
        *ops("zipf"),
        *ops("hot"),
        theirs("big", LATER, "more-steps"),
        *untimed,
    ]


def chosen(plan: Sequence[Job], only: Sequence[str], items: Sequence[str]) -> list[Job]:
    """The jobs whose name starts with one of `only`, with those of their items that `items` names; nothing given: all.

    Raises ValueError where nothing is left.
    """
    kept = [job for job in plan if not only or any(job.name.startswith(start) for start in only)]
    kept = [replace(job, items=tuple(i for i in job.items if not items or i in items)) for job in kept]
    kept = [job for job in kept if job.items]
    if not kept:
        names = ", ".join(job.name for job in plan)
        raise ValueError(f"no job is left: --only {' '.join(only)} --items {' '.join(items)}; the jobs are {names}")
    return kept
