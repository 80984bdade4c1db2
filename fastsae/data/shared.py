"""One live stream for several trainers: a pass of the model feeds an SAE at each of its hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsae.data.live import LiveSource
from fastsae.data.source import check_state


class SharedSource:
    """A buffer of a LiveSource's rows: from the first that some reader still needs to the last that any has read.

    Every hook of the source gets a reader with its own position, in rows. Readers in step hold one batch in memory; if
    one runs ahead, the rows up to it stay in memory until the others have read them.
    """

    def __init__(self, source: LiveSource):
        if source.d_target is not None:
            raise ValueError("a stream shared by several SAEs cannot have targets: train transcoders one by one")
        self.source = source
        ends = [sum(source.widths[: number + 1]) for number in range(len(source.widths))]
        starts = [0, *ends[:-1]]
        self.readers = [HookReader(self, slice(*ends_of)) for ends_of in zip(starts, ends, strict=True)]
        self._begin = self._end = 0  # rows in memory: [begin, end) of the stream
        self._parts: list[Tensor] = []
        self._origins: list[Callable[[Sequence[int]], list[str]]] = []  # of each part
        self._mark: tuple[int, dict[str, Any]] = (0, source.state_dict())  # the newest recorded position

    def read(self, at: int, n: int) -> Tensor:
        """Rows [at, at + n) of the stream, of all hooks."""
        self._drop()
        if at < self._begin or min(reader.at for reader in self.readers) > self._end:
            # Before the rows in memory, or all readers are ahead of the stream: go to the last reader's saved position.
            self._go(min(self.readers, key=lambda reader: reader.at).base)
        if self._end < at + n:
            self._parts.append(self.source.next_batch(at + n - self._end))
            self._origins.append(self.source.origin())
            self._end = at + n
        found, start = [], self._begin
        for part in self._parts:
            found.append(part[max(at - start, 0) : max(at + n - start, 0)])
            start += len(part)
        return torch.cat(found)

    def mark(self, at: int) -> tuple[int, dict[str, Any]]:
        """The newest row up to `at` with a known source state, and that state; at the end, the source's own state."""
        if at == self._end:
            self._mark = (at, self.source.state_dict())
        known = [self._mark, *(reader.base for reader in self.readers)]
        return max((base for base in known if base[0] <= at), key=lambda base: base[0])

    def _drop(self) -> None:
        """Drops the rows that every reader has read."""
        low = min(reader.at for reader in self.readers)
        while self._parts and self._begin + len(self._parts[0]) <= low:
            self._begin += len(self._parts.pop(0))
            self._origins.pop(0)
        if not self._parts:
            self._begin = self._end

    def _go(self, base: tuple[int, dict[str, Any]]) -> None:
        row, state = base
        self.source.load_state_dict(state)
        self._begin = self._end = row
        self._parts, self._origins, self._mark = [], [], base

    def origin(self, at: int) -> Callable[[Sequence[int]], list[str]]:
        """Where the rows in memory from `at` on come from: see NamesRows."""
        begin, parts = (
            self._begin,
            [(len(part), origin) for part, origin in zip(self._parts, self._origins, strict=True)],
        )

        def place(row: int) -> str:
            left = at + row - begin
            for length, origin in parts:
                if left < length:
                    return origin([left])[0]
                left -= length
            raise IndexError(f"row {row} is not in the batch")

        return lambda rows: [place(row) for row in rows]


class HookReader:
    """The rows at one hook of a shared stream: an ActivationSource."""

    n_tokens: int | None = None

    def __init__(self, shared: SharedSource, columns: slice):
        self.shared, self.columns = shared, columns
        self.d_in = columns.stop - columns.start
        self.at = 0
        self._origin: Callable[[Sequence[int]], list[str]] = lambda rows: []
        self.base: tuple[int, dict[str, Any]] = (0, shared.source.state_dict())
        """A row before `at` from which the stream can be read again, and the source's state there."""

    @property
    def stats(self) -> dict[str, Any]:
        return self.shared.source.stats

    def next_batch(self, n: int) -> Tensor:
        if n < 1:
            raise ValueError(f"next_batch needs n >= 1 rows, got {n}")
        rows = self.shared.read(self.at, n)[:, self.columns].contiguous()
        self._origin = self.shared.origin(self.at)
        self.at += n
        return rows

    def origin(self) -> Callable[[Sequence[int]], list[str]]:
        """See NamesRows."""
        return self._origin

    def held_out(self) -> Tensor:
        return self.shared.source.held_out()[:, self.columns]

    def state_dict(self) -> dict[str, Any]:
        row, state = self.base = self.shared.mark(self.at)
        return {"source": "hook", "columns": self._columns(), "at": self.at, "row": row, "stream": state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state(state, {"source": "hook", "columns": self._columns()})
        self.at, self.base = state["at"], (state["row"], dict(state["stream"]))

    def _columns(self) -> list[int]:
        return [self.columns.start, self.columns.stop]
