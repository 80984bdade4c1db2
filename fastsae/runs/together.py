"""What the processes of one run agree on: who writes its files, who reads which rows, when to stop, what went wrong."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastsae.data.source import ActivationSource, EpochSource, TargetSource, origin_of, target_width
from fastsae.model.axis import bounds


class ProcessError(RuntimeError):
    """Another process of the run has failed; the message says which one and why."""


class Team:
    """The processes of a mesh (see fastsae.parallel.mesh) that train one SAE. All of them call the same methods."""

    def __init__(self, mesh: DeviceMesh):
        self.mesh = mesh
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.shares = mesh["data"].size() if "data" in (mesh.mesh_dim_names or ()) else 1
        self.share = mesh["data"].get_local_rank() if self.shares > 1 else 0

    @property
    def writes(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def describe(self) -> dict[str, int]:
        return {name: self.mesh[name].size() for name in self.mesh.mesh_dim_names or ()}

    def from_first(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        given = [value]
        dist.broadcast_object_list(given, src=0)
        return given[0]

    def every(self, value: Any) -> list[Any]:
        """Every process's value, by rank."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """If what is inside raises in some process, all raise: that one its own error, the others a ProcessError.

        What is inside must not communicate: a process that has raised would not take part.
        """
        problem: Exception | None = None
        try:
            yield
        except (LookupError, MemoryError, OSError, RuntimeError, ValueError) as error:  # raised below, in every process
            problem = error
        said = self.every(None if problem is None else f"{type(problem).__name__}: {problem}")
        if problem is not None:
            raise problem
        if failed := [f"process {rank}: {what}" for rank, what in enumerate(said) if what is not None]:
            raise ProcessError("; ".join(failed))

    def stop_of(self, mine: signal.Signals | None) -> signal.Signals | None:
        """The signal that any process was asked to stop with."""
        asked = torch.tensor([0 if mine is None else int(mine)], dtype=torch.int64)
        if self.mesh.device_type != "cpu":
            asked = asked.to(self.mesh.device_type)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return signal.Signals(int(asked)) if int(asked) else None


class OwnRows:
    """A source of the rows of each batch that are this process's: contiguous ones, in the order of one process.

    Its position is that of the whole source, so any number of processes can go on from it. Stored rows of the others
    are not read; other sources make all rows and keep these.
    """

    def __init__(self, source: ActivationSource, share: int, shares: int):
        self.source, self.share, self.shares = source, share, shares
        self.d_in, self.n_tokens, self.d_target = source.d_in, source.n_tokens, target_width(source)
        self._first = 0

    @property
    def stats(self) -> dict[str, Any]:
        return self.source.stats

    def _own(self, n: int, read: Callable[[int], Any]) -> Any:
        ends = bounds(n, self.shares)
        first, last = ends[self.share], ends[self.share + 1]
        if isinstance(self.source, EpochSource):
            self.source.skip(first)
            rows = read(last - first)
            self.source.skip(n - last)
            self._first = 0
            return rows
        self._first, rows = first, read(n)
        return tuple(one[first:last] for one in rows) if isinstance(rows, tuple) else rows[first:last]

    def next_batch(self, n: int) -> Tensor:
        """This process's rows of the next n. Raises ValueError where n rows are fewer than the processes."""
        return self._own(n, self.source.next_batch)

    def next_pair(self, n: int) -> tuple[Tensor, Tensor]:
        """See TargetSource."""
        assert isinstance(self.source, TargetSource)
        return self._own(n, self.source.next_pair)

    def held_out(self) -> Tensor:
        return self.source.held_out()

    def held_out_targets(self) -> Tensor:
        """See TargetSource."""
        assert isinstance(self.source, TargetSource)
        return self.source.held_out_targets()

    def origin(self) -> Callable[[Sequence[int]], list[str]]:
        """See NamesRows."""
        places, first = origin_of(self.source), self._first
        if places is None:
            return lambda rows: [f"row {row} of this process" for row in rows]
        return lambda rows: places([first + row for row in rows])

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.source.load_state_dict(state)


class NoLogs:
    """The logs of a process that writes none."""

    def metrics(self, record: Mapping[str, Any]) -> None: ...

    def evaluation(self, record: Mapping[str, Any]) -> None: ...

    def advance(self) -> None: ...

    def say(self, line: str) -> None: ...

    def sync(self) -> None: ...
