"""Cases in a process of their own: `work` runs many and names each one before it begins; `hunt` starts and watches that
process. So a crash has the name of its case, and another process continues after it.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import linecache
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

import fastsae
from fastsae.backends import BackendError

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = str(Path(fastsae.__file__).parent)
PARTS = {"calls": "ops", "modules": "modules", "files": "files", "interruptions": "interruptions"}
"""The parts, and the file of each here."""
REFUSALS = (ValueError, TypeError, IndexError, BackendError)
"""What refuses arguments. BackendError: no backend can."""
ERRORS = (
    *REFUSALS, RuntimeError, OSError, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError,
    BufferError,
)  # fmt: skip
"""What a case looks at. An error that is none of these ends the worker, which is seen too."""
OF_TORCH = (
    "fastsae::",  # torch found that an argument is not of the schema's type
    "Could not run 'fastsae::",  # ... or that no op takes tensors of this layout
    "can't allocate memory",
    "Inference tensors cannot be saved for backward",
    "does not require grad and does not have a grad_fn",  # backward() under no_grad
    "got an unexpected keyword argument",
    "device type at start of device string",
    "a leaf Variable that requires grad",
    "Inplace update to inference tensor outside InferenceMode",
    ".tolist() is not supported for tensor subclasses",  # one stands where a list is expected
    "bad alloc",
    "std::bad_alloc",
)
"""Beginnings or parts of the RuntimeErrors that torch raises itself, before or after our code."""
SLOW = 20.0
"""Seconds of work for one case, which takes some milliseconds."""
LONG = 300.0
"""Seconds after which a case has no end."""


class Found(NamedTuple):
    """How a case ended: "right", "refused" or "wrong", and what was wrong; kills: processes killed in it."""

    verdict: str
    what: str = ""
    kills: int = 0


class Part(Protocol):
    """A file of cases. A case depends on its kind, seed and number alone."""

    KINDS: tuple[str, ...]

    def case(self, kind: str, seed: int, number: int, backend: str | None) -> tuple[str, Callable[[], Found]]:
        """The case in words, and what runs and judges it."""


def part(name: str) -> Part:
    found: Any = importlib.import_module(f"bench.hostile.{PARTS[name]}")
    return found


# -- errors ------------------------------------------------------------------------------------------------------------


def judge_error(error: BaseException) -> Found:
    """Of a raw op: refused where the error is of a refusal's type, or torch's own, and has words."""
    said = str(error).strip()
    documented = isinstance(error, REFUSALS) or any(words in said for words in OF_TORCH)
    if isinstance(error, MemoryError) or (documented and len(said) > 10):
        return Found("refused", type(error).__name__)
    return Found("wrong", f"raised {type(error).__name__} without a refusal's words: {said[:300]!r}")


def judge_raised(error: BaseException) -> Found:
    """Of everything above the raw ops, more strictly: a line of fastsae must have raised the error, in words."""
    said, trace = str(error).strip(), error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    assert trace is not None
    place = trace.tb_frame.f_code.co_filename, trace.tb_lineno
    ours = place[0].startswith(PACKAGE) and linecache.getline(*place).strip().startswith("raise ")
    if len(said) > 10 and (ours or any(words in said for words in OF_TORCH)):
        return Found("refused", type(error).__name__)
    return Found("wrong", f"{place[0]}:{place[1]} raised {type(error).__name__}, no refusal's words: {said[:300]!r}")


# -- many cases --------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What came of the cases of a kind. wrong, crashed: numbers, and what is wrong with their cases."""

    right: int = 0
    refused: int = 0
    wrong: list[tuple[int, str]] = field(default_factory=list)
    crashed: list[tuple[int, str]] = field(default_factory=list)
    kills: int = 0
    seconds: float = 0.0

    @property
    def cases(self) -> int:
        return self.right + self.refused + len(self.wrong) + len(self.crashed)

    def count(self, number: int, found: Found) -> None:
        self.right += found.verdict == "right"
        self.refused += found.verdict == "refused"
        self.kills += found.kills
        if found.verdict == "wrong":
            self.wrong.append((number, found.what))

    def add(self, other: Tally) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Plan:
    """The cases first .. end of each kind, as "part/kind"."""

    seed: int
    cases: dict[str, tuple[int, int]]
    backend: str | None = None

    def to_json(self) -> str:
        return json.dumps(vars(self))


def work(plan: Plan) -> None:
    """Runs the cases; prints, in JSON lines, each one's place, words and verdict."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for place, (first, end) in plan.cases.items():
        name, kind = place.split("/")
        for number in range(first, end):
            _say([place, number])
            faulthandler.dump_traceback_later(LONG, exit=True)
            start, clock = time.process_time(), time.perf_counter()  # the first is not that of a busy machine
            said, run = part(name).case(kind, plan.seed, number, plan.backend)
            _say(said)
            found = run()
            if (seconds := time.process_time() - start) > SLOW:
                found = Found("wrong", f"took {seconds:.0f} s", found.kills)
            if found.verdict == "wrong":
                found = found._replace(what=f"{said}: {found.what}")
            _say({"found": found, "seconds": time.perf_counter() - clock})
            faulthandler.cancel_dump_traceback_later()


def _say(value: Any) -> None:
    os.write(1, json.dumps(value).encode() + b"\n")  # at once: nothing is lost where the process ends


def hunt(plan: Plan) -> dict[str, Tally]:
    """The tallies of these cases by "part/kind", run in another process. A process that ends early is a crash of the
    case that it was at, and another process runs the cases after it.
    """
    found = {place: Tally() for place in plan.cases}
    left = dict(plan.cases)
    while left:
        # glibc fills freed and fresh memory with a pattern, so that a read of either gives another answer. One thread
        # from the start: interruptions fork, and a fork must not leave an OpenMP team behind.
        command = ["env", "MALLOC_PERTURB_=165", "OMP_NUM_THREADS=1", sys.executable, "-m", "bench.hostile"]
        command += ["--work", Plan(plan.seed, left, plan.backend).to_json()]
        with tempfile.TemporaryFile("w+") as errors:
            done = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace"
            )
            at, said = _listen(done, found)
            code = done.wait()
            errors.seek(0)
            ended = f"the process ended with {code}:\n{_end(errors.read())}"
        if code == 0:
            break
        if at is None:
            raise RuntimeError(f"the worker made no case: {ended}")
        place, number = at
        found[place].crashed.append((number, f"{said}: {ended}"))
        for earlier in list(left):
            end = left.pop(earlier)[1]
            if earlier == place:
                left = {**({place: (number + 1, end)} if number + 1 < end else {}), **left}
                break
    return found


def _listen(worker: subprocess.Popen[str], found: dict[str, Tally]) -> tuple[tuple[str, int] | None, str]:
    """Counts what the worker says, to its end; the case that it was at, and its words."""
    at: tuple[str, int] | None = None
    said = "while it was made"
    assert worker.stdout is not None
    for line in worker.stdout:
        try:
            value = json.loads(line)
        except ValueError:
            continue  # not ours
        if isinstance(value, list):
            at, said = (value[0], value[1]), "while it was made"
        elif isinstance(value, str):
            said = value
        elif isinstance(value, dict) and at is not None:
            found[at[0]].count(at[1], Found(*value["found"]))
            found[at[0]].seconds += value["seconds"]
    return at, said


def _end(text: str) -> str:
    lines = text.splitlines()
    signs = ("ERROR: AddressSanitizer", "runtime error", "Timeout (")
    start = next((i for i, line in enumerate(lines) if any(sign in line for sign in signs)), None)
    return "\n".join(lines[start : start + 25] if start is not None else lines[-15:])


def again(place: str, seed: int, number: int, backend: str | None) -> str:
    """The command that runs one case again."""
    named = f" --backend {backend}" if backend else ""
    return f"python -m bench.hostile --parts {place} --seed {seed} --first {number} --cases 1{named}"
