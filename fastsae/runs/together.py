"""What the processes of one run agree on: who writes its files, who reads which rows, when to stop, what went wrong."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastsae.data.source import (
    ActivationSource,
    EpochSource,
    TargetSource,
    held_out_targets,
    next_pair,
    origin_of,
    pair_of,
    target_width,
)
from fastsae.model.axis import bounds
from fastsae.parallel.shards import group_of


class ProcessError(RuntimeError):
    """Another process of the run has failed; the message says which one and why."""


class Team:
    """The processes of a mesh (see fastsae.parallel.mesh) that train one SAE. All of them call the same methods."""

    def __init__(self, mesh: DeviceMesh):
        self.mesh = mesh
        self.size = mesh.size()
        self.group = group_of(mesh)
        self.rank = dist.get_rank(self.group)
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
        dist.broadcast_object_list(given, group=self.group, group_src=0)
        return given[0]

    def every(self, value: Any) -> list[Any]:
        """Every process's value, by rank."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """If what is inside raises in some process, all raise: that one its own error, the others a ProcessError.

        What is inside must not communicate, since a process that has raised would not take part; but it may read a
        FromFirst, which raises in all processes or in none.
        """
        problem: Exception | None = None
        try:
            yield
        except (LookupError, MemoryError, OSError, RuntimeError, ValueError) as error:  # raised below, in every process
            problem = error
        if not self.most(problem is not None):  # far cheaper than sending words
            return
        said = self.every(None if problem is None else f"{type(problem).__name__}: {problem}")
        if problem is not None:
            raise problem
        if failed := [f"process {rank}: {what}" for rank, what in enumerate(said) if what is not None]:
            raise ProcessError("; ".join(failed))

    def check_alike(self, facts: Mapping[str, Any]) -> None:
        """Raises ValueError in every process, naming each fact in which one differs from the first process."""
        everyone = self.every(dict(facts))
        said = [
            f"{name} is {one.get(name)!r} in process {rank} and {everyone[0][name]!r} in process 0"
            for rank, one in enumerate(everyone)
            for name in everyone[0]
            if repr(one.get(name)) != repr(everyone[0][name])
        ]
        if said:
            raise ValueError(f"the processes of a run need the same settings and data: {'; '.join(said)}")

    def stop_of(self, mine: signal.Signals | None) -> signal.Signals | None:
        """The signal that any process was asked to stop with."""
        asked = self.most(0 if mine is None else int(mine))
        return signal.Signals(asked) if asked else None

    def most(self, value: int) -> int:
        """The largest of the processes' values."""
        largest = torch.tensor([value], dtype=torch.int64, device=self.mesh.device_type)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return int(largest)


class FromFirst:
    """A source that the first process alone has, such as a live model; it sends the others their rows.

    source: None in the others. Reading, of held-out rows too, is for all processes at once. The position and the
    statistics are the first one's: the others save nothing.
    """

    def __init__(self, source: ActivationSource | None, team: Team):
        self.source, self.team = source, team
        facts = None
        with team.agreed():
            if source is not None:
                facts = source.d_in, source.n_tokens, target_width(source)
        self.d_in, self.n_tokens, self.d_target = team.from_first(facts)
        self._shares = team.every(team.share)

    @property
    def stats(self) -> dict[str, Any]:
        return {} if self.source is None else self.source.stats

    def _read(self, n: int, ends: Sequence[int], shares: Sequence[int]) -> Tensor:
        """The rows [ends[i], ends[i + 1]) of the next n, with their targets beside them, for the process of share i.

        Raises what the source raises, and in the other processes a ProcessError.
        """
        rows: Tensor | None = None
        with self.team.agreed():
            if self.source is not None:
                x, target = next_pair(self.source, n)
                rows = x if target is None else torch.cat([x, target], 1)
        dtype = self.team.from_first(None if rows is None else rows.dtype)
        device = torch.device(self.team.mesh.device_type)
        if rows is None:
            share = shares[self.team.rank]
            width = self.d_in + (self.d_target or 0)
            mine = torch.empty(ends[share + 1] - ends[share], width, dtype=dtype, device=device)
            dist.recv(mine.view(torch.uint8), group=self.team.group, group_src=0)
            return mine
        parts = [rows[ends[share] : ends[share + 1]].contiguous().to(device) for share in shares]
        sent = [
            dist.isend(part.view(torch.uint8), group=self.team.group, group_dst=rank)
            for rank, part in enumerate(parts)
            if rank
        ]
        for one in sent:
            if one is not None:
                one.wait()
        return parts[0]

    def own(self, n: int) -> Tensor:
        """This process's rows of the next n, with their targets beside them."""
        return self._read(n, bounds(n, self.team.shares), self._shares)

    def _whole(self, n: int) -> Tensor:
        return self._read(n, [0, n], [0] * self.team.size)

    def next_batch(self, n: int) -> Tensor:
        return self._whole(n)[:, : self.d_in]

    def next_pair(self, n: int) -> tuple[Tensor, Tensor]:
        """See TargetSource."""
        return pair_of(self._whole(n), self.d_in)

    def held_out(self) -> Tensor:
        """The first process's rows, which it sends to the others once."""
        return self._held_out[0]

    def held_out_targets(self) -> Tensor:
        """See TargetSource."""
        targets = self._held_out[1]
        assert targets is not None
        return targets

    @functools.cached_property
    def _held_out(self) -> tuple[Tensor, Tensor | None]:
        rows = None
        with self.team.agreed():
            if self.source is not None:
                targets = held_out_targets(self.source)
                rows = self.source.held_out().cpu(), None if targets is None else targets.cpu()
        return self.team.from_first(rows)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.source is None else self.source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.source is not None:
            self.source.load_state_dict(state)


class OwnRows:
    """A source of the rows of each batch that are this process's: contiguous ones, in the order of one process.

    Its position is that of the whole source, so any number of processes can go on from it. Stored rows of the others
    are not read; of another source that every process has, all rows are made and these kept.
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
        if isinstance(self.source, FromFirst):
            return self.source.own(n)[:, : self.d_in]
        return self._own(n, self.source.next_batch)

    def next_pair(self, n: int) -> tuple[Tensor, Tensor]:
        """See TargetSource."""
        if isinstance(self.source, FromFirst):
            return pair_of(self.source.own(n), self.d_in)
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
