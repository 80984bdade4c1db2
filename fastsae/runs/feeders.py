"""Processes of a run that only run its language model: the first process asks for passes, and feeders answer.

Messages are torch.distributed's point to point. The first process deals the windows of the text to the feeders in turn
and takes the answers in the order of the text: rows, their shuffling and their position are those of one process,
whatever the number of feeders. A feeder keeps an answer until it is taken, and is asked for a bounded number of passes
more than were taken from it; then it waits.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from queue import SimpleQueue
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastsae.data.passes import Activations, ModelPasses
from fastsae.runs.stopping import StopSignals, TrainingInterrupted
from fastsae.runs.together import ProcessError, Team
from fastsae.warn import warn

IDLE = timedelta(days=365)
"""How long a feeder waits for work: an evaluation may take any time, and a lost connection is noticed at once."""
FAREWELL = timedelta(minutes=1)
"""How long the first process waits for a feeder to hear that the run has ended."""
CUT_SHORT = timedelta(seconds=5)
"""And where it ends with an error."""
FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip
"""What loading or running somebody's model may raise: told to the first process. Anything else ends the feeder."""

PASS, END = 0, 1  # what a feeder is told
DONE, READY, FAILED = 0, 1, 2  # what it answers
HEAD = 5  # numbers before every message
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Line:
    """The first process of a run and its feeders: the processes after those of the mesh. All processes make one.

    wait: how long the processes of the mesh wait for each other. The first one waits half as long for one pass of a
    feeder, or for its model to be loaded: meanwhile the others wait for the first.
    """

    def __init__(self, mesh: DeviceMesh, wait: timedelta = timedelta(minutes=30)):
        self.patience = wait / 2
        self.ranks = list(range(mesh.size(), dist.get_world_size()))
        self.device = torch.device(mesh.device_type)
        backend = "gloo" if self.device.type == "cpu" else f"cpu:gloo,{self.device.type}:{dist.get_backend()}"
        # One each: a connection that times out takes the others of its group with it.
        self._groups = {rank: dist.new_group([0, rank], timeout=IDLE, backend=backend) for rank in self.ranks}

    @property
    def feeds(self) -> bool:
        """Whether this process is a feeder."""
        return dist.get_rank() in self.ranks

    def _with(self, rank: int) -> Any:
        """The group with the process at the other end."""
        return self._groups[rank or dist.get_rank()]

    def send(self, rank: int, *tensors: Tensor) -> Sent:
        """Begins to send them, in this order."""
        found = []
        for t in tensors:
            work = dist.isend(t.view(torch.uint8), dst=rank, group=self._with(rank))
            assert work is not None
            found.append((work, t))
        return found

    def receive(self, rank: int, t: Tensor) -> Tensor:
        """Fills t. Raises RuntimeError if the process has ended, or if it is a feeder that does not answer in time."""
        work = dist.irecv(t.view(torch.uint8), src=rank, group=self._with(rank))
        assert work is not None
        work.wait(self.patience if rank else IDLE)
        return t

    def numbers(self, rank: int, count: int = HEAD) -> list[int]:
        return self.receive(rank, torch.empty(count, dtype=torch.int64, device="cpu")).tolist()

    def words(self, rank: int, length: int) -> str:
        if not length:
            return ""
        return bytes(self.receive(rank, torch.empty(length, dtype=torch.uint8, device="cpu")).tolist()).decode()


Sent = list[tuple[Any, Tensor]]
"""Messages on their way: their tensors have to live until they have arrived."""


def _head(*numbers: int) -> Tensor:
    return torch.tensor([*numbers, *[0] * (HEAD - len(numbers))], dtype=torch.int64, device="cpu")


def _words(text: str) -> tuple[Tensor, ...]:
    data = text.encode()
    return (torch.tensor(list(data), dtype=torch.uint8, device="cpu"),) if data else ()


# -- the first process ------------------------------------------------------------------------------------------------


@dataclass
class _Asked:
    """A pass that a feeder was asked for, and its activations once they are taken."""

    sent: Sent
    windows: int
    activations: Activations | None = None


class Feeders:
    """The feeders as the first process sees them: see fastsae.data.passes.Passes, after `ready`.

    Raises ProcessError, with the process's number and what it said, for a feeder that has failed or is lost.
    """

    tokenizer: Any
    names: tuple[str, ...]
    digest: str

    def __init__(self, line: Line):
        self.line = line
        self._waiting: dict[int, deque[_Asked]] = {rank: deque() for rank in line.ranks}
        self._taken = dict.fromkeys(line.ranks, 0)
        self._turn = 0
        self._each = 1  # a feeder's passes that are not taken yet
        self._failed: str | None = None
        self._lost: dict[int, ProcessError] = {}

    def ready(self, tokenizer: Any) -> Feeders:
        """Waits until the feeders have loaded their model; `tokenizer` is that model's."""
        said = {}
        for rank in self.line.ranks:
            with self._of(rank):
                _, length, *_ = self._heard(rank)
                said[rank] = json.loads(self.line.words(rank, length))
        first, found = next(iter(said.items()))
        if others := [rank for rank, one in said.items() if one != found]:
            raise ProcessError(f"the feeders, processes {first} and {others[0]}, have loaded different models")
        self.tokenizer, self.names, self.digest = tokenizer, tuple(found["names"]), found["digest"]
        return self

    def room(self, wanted: int) -> int:
        """See Passes: at least two passes a feeder, so that none waits for its next one."""
        self._each = max(2, -(-wanted // len(self.line.ranks)))
        return self._each * len(self.line.ranks)

    def begin(self, token_ids: Tensor) -> Callable[[], Activations]:
        """See Passes."""
        rank = self.line.ranks[self._turn % len(self.line.ranks)]
        self._turn += 1
        waiting = self._waiting[rank]
        while len(waiting) >= self._each:  # as after a step back in the text: nobody needs what was begun
            self._take(rank)
        head = _head(PASS, *token_ids.shape, torch.get_num_threads(), self._taken[rank])
        with self._of(rank):
            asked = _Asked(self.line.send(rank, head, token_ids.contiguous()), len(token_ids))
        waiting.append(asked)

        def result() -> Activations:
            while asked.activations is None:
                self._take(rank)
            return asked.activations

        return result

    def end(self, why: str = "", signum: int = 0, *, patience: timedelta = FAREWELL) -> None:
        """Tells all feeders that the run has ended: well, or why not. Raises ProcessError for one that is lost."""
        words = _words(why)
        for rank in self.line.ranks:
            if rank not in self._lost:
                with contextlib.suppress(ProcessError), self._of(rank):  # raised below
                    for work, _ in self.line.send(rank, _head(END, sum(map(len, words)), signum), *words):
                        work.wait(patience)
        if self._lost:
            raise next(iter(self._lost.values()))

    def _take(self, rank: int) -> None:
        """Receives a feeder's oldest answer."""
        if self._failed is not None:
            raise ProcessError(self._failed)
        with self._of(rank):
            _, hooks, width, *_ = self._heard(rank)
            asked = self._waiting[rank].popleft()
            described = self.line.numbers(rank, 2 * hooks)
            asked.activations = tuple(
                self.line.receive(
                    rank, torch.empty(asked.windows, width, d, dtype=DTYPES[kind], device=self.line.device)
                )
                for kind, d in zip(described[::2], described[1::2], strict=True)
            )
            for work, _ in asked.sent:
                work.wait()
        asked.sent = []
        self._taken[rank] += 1

    def _heard(self, rank: int) -> list[int]:
        """The head of a feeder's answer."""
        head = self.line.numbers(rank)
        if head[0] == FAILED:
            self._failed = f"process {rank}, a feeder: {self.line.words(rank, head[1])}"
            raise ProcessError(self._failed)
        return head

    @contextlib.contextmanager
    def _of(self, rank: int) -> Iterator[None]:
        """Says of a broken connection which feeder is at its other end."""
        try:
            yield
        except ProcessError:
            raise
        except RuntimeError as error:
            self._lost[rank] = ProcessError(
                f"process {rank}, a feeder, has ended or does not answer ({_said(error)}). The checkpoints are intact; "
                "the same command with --resume continues the run"
            )
            raise self._lost[rank] from error


@contextlib.contextmanager
def fed(line: Line, team: Team) -> Iterator[Feeders | None]:
    """In the processes that train: the feeders, for the first one, until the block ends, however it does.

    If a feeder is lost when the run ends or is stopped, all processes of the team raise.
    """
    feeders = Feeders(line) if team.writes else None
    try:
        yield feeders
    except TrainingInterrupted as stop:  # in all of them: torchrun stops a run of which a feeder died
        with team.agreed():
            if feeders is not None:
                feeders.end(f"the run was stopped by {stop.signal.name}", int(stop.signal))
        raise
    except BaseException as error:
        if feeders is not None:
            with contextlib.suppress(ProcessError):
                feeders.end(f"process 0: {_said(error)}", patience=CUT_SHORT)
        raise
    with team.agreed():
        if feeders is not None:
            feeders.end()


# -- a feeder ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ask:
    token_ids: Tensor
    threads: int
    taken: int
    """How many of this feeder's answers have been taken."""


@dataclass(frozen=True)
class _End:
    why: str = ""
    signum: int = 0
    lost: bool = False


@dataclass
class Served:
    """What a feeder did: its passes, and the most that waited at one time for the first process to take them."""

    passes: int = 0
    most_waiting: int = 0
    _sent: deque[Sent] = field(default_factory=deque, repr=False)
    _released: int = field(default=0, repr=False)

    def release(self, taken: int) -> None:
        """Lets go of the answers that were taken."""
        while self._released < taken:
            for work, _ in self._sent.popleft():
                work.wait()
            self._released += 1

    def keep(self, sent: Sent) -> None:
        self._sent.append(sent)
        self.passes += 1
        self.most_waiting = max(self.most_waiting, len(self._sent))


def feed(line: Line, load: Callable[[], ModelPasses]) -> Served:
    """A feeder's whole work: `load` its model, then answer until the run ends.

    Raises what its model raised; ProcessError where another process failed; TrainingInterrupted where the run was
    stopped. A first signal is left to the first process, which gets it too: its step may need more rows.
    """
    inbox, ended = SimpleQueue[_Ask | None](), list[_End]()
    threading.Thread(target=_listen, args=(line, inbox, ended), name="fastsae-feeder", daemon=True).start()
    done, problem, told = Served(), None, []
    try:
        model = load()
    except FAILURES as error:
        problem = error
        told = _tell(line, FAILED, _said(error))
    else:
        told = _tell(line, READY, json.dumps({"names": model.names, "digest": model.digest}))
    with _Noted():
        while (ask := inbox.get()) is not None and not ended:
            if problem is not None:  # the first process will hear of it
                continue
            torch.set_num_threads(ask.threads)  # that of one process: other numbers of threads may round differently
            try:
                parts = [part.to(line.device).contiguous() for part in model.run(ask.token_ids)]
                kinds = [number for part in parts for number in (DTYPES.index(part.dtype), part.shape[2])]
            except FAILURES as error:
                problem = error
                told += _tell(line, FAILED, _said(error))
                continue
            with contextlib.suppress(RuntimeError):  # a lost connection, as `ended` will say
                done.release(ask.taken)
                head = _head(DONE, len(parts), parts[0].shape[1])
                about = torch.tensor(kinds, dtype=torch.int64, device="cpu")
                done.keep(line.send(0, head, about, *parts))
    _finish(ended[0], problem)
    return done


def _finish(end: _End, problem: BaseException | None) -> None:
    if problem is not None:
        if end.why or end.lost:
            raise problem
        warn(f"a pass ahead of the last step failed, which no step needed: {_said(problem)}", RuntimeWarning)
    if end.lost:
        raise ProcessError("process 0 of this run has ended or does not answer; torchrun's report names who failed")
    if end.signum:
        raise TrainingInterrupted(end.why, signal.Signals(end.signum))
    if end.why:
        raise ProcessError(end.why)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split(". This is typically")[0]  # without gloo's advice


def _tell(line: Line, what: int, text: str) -> Sent:
    with contextlib.suppress(RuntimeError):  # a lost connection, as _listen will say
        words = _words(text)
        return line.send(0, _head(what, sum(map(len, words))), *words)
    return []


def _listen(line: Line, inbox: SimpleQueue[_Ask | None], ended: list[_End]) -> None:
    """Receives on a thread, so that the end of the run overtakes passes that were asked for and are not needed."""
    try:
        with contextlib.suppress(RuntimeError):  # a lost connection
            while True:
                kind, *numbers = line.numbers(0)
                if kind == END:
                    ended.append(_End(line.words(0, numbers[0]), numbers[1]))
                    break
                windows, width, threads, taken = numbers
                token_ids = torch.empty(windows, width, dtype=torch.int64, device="cpu")
                inbox.put(_Ask(line.receive(0, token_ids), threads, taken))
    finally:  # whatever ends this thread: nobody else would wake the feeder
        if not ended:
            ended.append(_End(lost=True))
        inbox.put(None)


class _Noted(StopSignals):
    """Only notes the first signal, in silence: the first process says what becomes of the run."""

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            raise KeyboardInterrupt(f"second {signal.Signals(signum).name}: stopped at once")
        self.requested = signal.Signals(signum)
