"""Hostile calls in a process of their own: `outcome` of one, `work` through many, and `hunt`, which starts and watches
the process that works. The worker notes each call's number before it makes it, so that a crash names its call.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.hostile import spoil, structs, truth
from bench.hostile.calls import Call
from bench.hostile.spoil import readable
from fastsae.backends import BackendError
from fastsae.backends.contract import WRITTEN

ROOT = Path(__file__).resolve().parents[2]
REFUSALS = (ValueError, TypeError, IndexError, BackendError)
"""What a raw op raises for what it does not take. BackendError: no backend can."""
UNEXPECTED = (RuntimeError, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, BufferError)
"""What it must not raise. An error that is neither ends the worker, which is seen too."""
OF_TORCH = (
    "fastsae::",  # torch found that an argument is not of the schema's type
    "Could not run 'fastsae::",  # ... or that no op takes tensors of this layout
    "can't allocate memory",
    "Inference tensors cannot be saved for backward",
    "a leaf Variable that requires grad",
    "Inplace update to inference tensor outside InferenceMode",
    ".tolist() is not supported for tensor subclasses",  # one stands where a list is expected
    "bad alloc",
    "std::bad_alloc",
)
"""Beginnings or parts of the RuntimeErrors that torch raises itself, before or after our code."""
SLOW = 20.0
"""Seconds for one call, which takes a millisecond."""
STRUCTS = "structs"
"""In place of a raw op: the C++ extension by itself (structs.py)."""


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, (list, tuple)) else []


def _copied(value: Any) -> Any:
    if isinstance(value, spoil.Wrapped):
        return _copied(value.inner)
    if isinstance(value, Tensor):
        return value.detach().clone() if readable(value) else value
    return [_copied(v) for v in value] if isinstance(value, list) else value


def _bits(value: Any) -> list[bytes]:
    with torch.inference_mode(False):
        return [
            bytes(t.detach().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy())
            for t in _tensors(_copied(value))
            if readable(t) and t.layout == torch.strided and t.numel()
        ]


def outcome(call: Call) -> tuple[str, str]:
    """("right" | "refused" | "wrong", what): one call, judged. Changes no setting of torch for long."""
    given = call.arguments
    before, bits = {name: _copied(value) for name, value in given.items()}, {n: _bits(v) for n, v in given.items()}
    # A backend that does not screen does not look at a screen.
    whole = all(map(readable, _tensors([value for name, value in given.items() if name != "screen"])))
    error: BaseException | None = None
    result: Any = None
    try:
        with spoil.under(call.setting):
            result = getattr(torch.ops.fastsae, call.op)(**given)
    except (*REFUSALS, *UNEXPECTED) as raised:
        error = raised
    written = () if error is not None or call.op != "update_latents_" else WRITTEN
    changed = [name for name in given if name not in written and _bits(given[name]) != bits[name]]
    if changed:
        return "wrong", f"changed {', '.join(changed)}; then {type(error).__name__}: {error}"
    if error is not None:
        return _judge_error(error)
    if not whole:
        return "wrong", "returned, and an argument has no memory to read"
    try:
        with torch.inference_mode(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if _is_stale(call) or _spreads(before):
                pass
            elif call.op == "update_latents_":
                truth.update_latents_(before, result, given)
            else:
                as_called = truth.as_cast(Call(call.op, before, [], call.setting))
                truth.JUDGES[call.op](as_called, result)
    except truth.Wrong as wrong:
        return "wrong", str(wrong)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as raised:
        return "wrong", f"returned something for arguments that have no meaning: {type(raised).__name__}: {raised}"
    return "right", ""


def _is_stale(call: Call) -> bool:
    """Whether a screen may be of another W: then results follow the screen, as ops.prepare_screen says."""
    return bool(call.arguments.get("screen")) and any("W" in said or "screen" in said for said in call.spoiled)


def _spreads(given: dict[str, Any]) -> bool:
    """Whether numbers that are not finite spread to others: the reference multiplies all of A and W; 0 · inf is NaN."""
    if given["backend"] == "cpu":
        return False
    return not all(truth.is_finite(t) for t in _tensors(list(given.values())))


def _judge_error(error: BaseException) -> tuple[str, str]:
    said = str(error).strip()
    documented = isinstance(error, REFUSALS) or any(part in said for part in OF_TORCH)
    if isinstance(error, MemoryError) or (documented and len(said) > 10):
        return "refused", type(error).__name__
    return "wrong", f"raised {type(error).__name__} without a refusal's words: {said[:300]!r}"


# -- many calls --------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    calls: int = 0
    right: int = 0
    refused: int = 0
    wrong: list[tuple[int, str]] = field(default_factory=list)  # numbers and what is wrong with their calls

    def count(self, kind: str, number: int, what: str) -> None:
        self.calls += 1
        self.right += kind == "right"
        self.refused += kind == "refused"
        if kind == "wrong":
            self.wrong.append((number, what))

    def add(self, other: Tally) -> None:
        self.calls, self.right, self.refused = (
            self.calls + other.calls,
            self.right + other.right,
            self.refused + other.refused,
        )
        self.wrong += other.wrong


@dataclass
class Plan:
    """The calls first .. end of each op."""

    seed: int
    calls: dict[str, tuple[int, int]]
    backend: str | None = None

    def to_json(self) -> str:
        return json.dumps(vars(self))


def work(plan: Plan, note: Path) -> None:
    """Makes the calls and prints the tally of each op, a line of JSON. Notes each call before it: op and number."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    place = os.open(note, os.O_WRONLY)
    for op, (first, end) in plan.calls.items():
        tally = Tally()
        for number in range(first, end):
            os.pwrite(place, f"{op:>20} {number:20d} {'while it was made':1000}".encode(), 0)
            start = time.process_time()  # not that of a busy machine
            if op == STRUCTS:
                said, (kind, what) = op, structs.outcome(plan.seed, number)
            else:
                call = spoil.make(op, plan.seed, number, plan.backend)
                said = str(call)
                os.pwrite(place, f"{said:1000.1000}".encode(), 42)
                kind, what = outcome(call)
            if (seconds := time.process_time() - start) > SLOW:
                kind, what = "wrong", f"took {seconds:.0f} s"
            tally.count(kind, number, f"{said}: {what}")
        print(json.dumps({op: vars(tally)}), flush=True)


def hunt(plan: Plan, timeout: float = 1800) -> dict[str, Tally]:
    """The tallies of these calls by op, made in another process. A process that ends early is a wrong call, and another
    process makes the calls after it."""
    found = {op: Tally() for op in plan.calls}
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "call"
        while plan.calls:
            note.write_text(" " * 42)
            # glibc fills freed and fresh memory with a pattern, so that a read of either gives another answer.
            command = ["env", "MALLOC_PERTURB_=165", sys.executable, "-m", "bench.hostile"]
            command += ["--work", str(note), plan.to_json()]
            try:
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
                out, ended = done.stdout, f"the process ended with {done.returncode}:\n{_end(done.stderr)}"
            except subprocess.TimeoutExpired as late:
                out, ended = (late.stdout or b"").decode(), f"no end after {timeout:.0f} s"
            for line in out.splitlines():
                if line.startswith("{"):
                    for op, tally in json.loads(line).items():
                        found[op].add(Tally(**tally))
                        del plan.calls[op]
            if not plan.calls:
                break
            op, number, what = (*note.read_text(errors="replace").split(maxsplit=2), "", "", "")[:3]
            if not op:
                raise RuntimeError(f"the worker made no call: {ended}")
            # Counted again without the call that ended the process.
            first, end = plan.calls[op]
            at = int(number)
            found[op].count("wrong", at, f"{what.strip()}: {ended}")
            done_before = Plan(plan.seed, {op: (first, at)}, plan.backend)
            if at > first:
                found[op].add(hunt(done_before, timeout)[op])
            plan.calls[op] = (at + 1, end)
    return found


def _end(text: str) -> str:
    lines = text.splitlines()
    start = next(
        (i for i, line in enumerate(lines) if "ERROR: AddressSanitizer" in line or "runtime error" in line), None
    )
    return "\n".join(lines[start : start + 25] if start is not None else lines[-15:])


def again(op: str, seed: int, number: int, backend: str | None) -> str:
    """The command that makes one call again."""
    named = f" --backend {backend}" if backend else ""
    return f"python -m bench.hostile --ops {op} --seed {seed} --first {number} --calls 1{named}"
