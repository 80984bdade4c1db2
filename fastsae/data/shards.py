"""A folder of stored activations as a source of training rows: shuffled across shards in bounded memory, resumable."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from fastsae.data.contexts import Context, context_of, read_vocabulary
from fastsae.data.files import ShardError
from fastsae.data.hooks import Hook, Hooks, hooks_of
from fastsae.data.manifest import HookFiles, Manifest
from fastsae.data.reader import ShardContext, ShardReader, Verify
from fastsae.data.source import EpochSource, permutation
from fastsae.progress import bar
from fastsae.warn import warn

CHUNK_ROWS = 256  # adjacent rows read together: about one window of text, 300 kB of bf16 at d_in 576
_CHUNKS, _ROWS = 0, 1  # which of an epoch's permutations a key belongs to


class ShardSource(EpochSource):
    """Rows of a folder that `harvest` or `save_rows` wrote, memory-mapped.

    An epoch's order: chunks of 256 adjacent rows are permuted over all shards and grouped into pools of `buffer_rows`;
    then the rows of each pool are permuted. Memory: one pool, in the stored dtype. A folder that fits into one pool is
    shuffled perfectly. The order depends only on the seed and `buffer_rows`, so a position is two integers.

    hook: the hook to read, by the name given to the harvest or by the module's name; with several, their rows stand
    side by side, as a crosscoder reads them. None: the only one. target: the hook, or hooks, of the same tokens that a
    transcoder learns to predict.
    holdout: None uses the folder's held-out rows, if any. A number uses that many of them, the first ones; a folder
    without any holds out that many of its last rows.
    rows: train only on this many first rows, in an order that does not depend on rows harvested later; None: on all.
    verify: "lazy" checks a shard's checksum when it is first read, "eager" checks all of them now, with a progress bar,
    "size" only checks the files' lengths, as the other two also do.
    dtype: of the returned rows; None leaves them as stored.
    Row ids: training rows 0 .. n_tokens - 1 in the order of the files, then the held-out rows.
    Raises: ShardError naming a file that is missing, truncated or altered; ValueError for wrong arguments.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        hook: Hooks | None = None,
        target: Hooks | None = None,
        holdout: int | None = None,
        rows: int | None = None,
        seed: int = 0,
        buffer_rows: int = 131_072,
        dtype: torch.dtype | None = torch.float32,
        verify: Verify = "lazy",
        progress: bool = True,
    ):
        if verify not in get_args(Verify):
            raise ValueError(f"verify must be one of {', '.join(get_args(Verify))}, got {verify!r}")
        if buffer_rows < 1:
            raise ValueError(f"buffer_rows must be at least 1, got {buffer_rows}")
        if rows is not None and rows < 1:
            raise ValueError(f"rows must be at least 1, or None for all, got {rows}")
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        if not self.manifest.complete:
            warn(
                f"{self.folder} holds {self.manifest.rows:,} rows of a harvest that has not ended, and these are read; "
                "the same harvest command continues it",
                UserWarning,
            )
        self.dtype = dtype
        self.buffer_rows = buffer_rows
        self._strings: list[str] | None = None
        wanted: tuple[Hook | None, ...] = (None,) if hook is None else hooks_of(hook)
        self._reads = [self.manifest.of_hook(one, self.folder) for one in wanted]
        self._targets = [] if target is None else [self.manifest.of_hook(one, self.folder) for one in hooks_of(target)]
        self._columns = [self._open(one, verify) for one in [*self._reads, *self._targets]]
        self._widths = [one.d_in for one in [*self._reads, *self._targets]]
        self._shards = self._columns[0]
        self._starts = [0]
        for shard in self._shards:
            self._starts.append(self._starts[-1] + shard.rows)
        if verify == "eager":
            self.verify(progress)
        n_train, self._held = self._split(holdout)
        n_train = n_train if rows is None else min(rows, n_train)
        d_in = sum(one.d_in for one in self._reads)
        super().__init__(n_train, d_in, seed, sum(one.d_in for one in self._targets) or None)
        self._chunks = self._chunk_table(n_train)
        self._epoch_chunks: tuple[int, Tensor, Tensor] | None = None
        self._pool: tuple[int, int, Tensor] | None = None

    @property
    def stats(self) -> dict[str, Any]:
        return {**self.manifest.stats, "epoch": self._epoch, "rows": self._rows_per_epoch}

    @property
    def hooks(self) -> list[HookFiles]:
        """The hooks of a row, as the manifest has them."""
        return list(self._reads)

    @property
    def target_hooks(self) -> list[HookFiles]:
        """The hooks of a target; empty if there are no targets."""
        return list(self._targets)

    def verify(self, progress: bool = True) -> None:
        """Compare every file's sha256 with the manifest's. Raises ShardError naming the first that differs."""
        files = [shard for column in self._columns for shard in column]
        with bar(len(files), "file", progress, what="checksums") as shown:
            for shard in files:
                shard.verify()
                shown.update()
        if self.manifest.vocabulary is not None:
            self.manifest.vocabulary.check_content(self.folder)

    def held_out(self) -> Tensor:
        return self.rows(self._held)

    def held_out_targets(self) -> Tensor:
        """See TargetSource. Raises ValueError where there are no targets."""
        return self.targets(self._held)

    def held_out_ids(self) -> range:
        """The ids of the held-out rows, for `rows` and `contexts`."""
        return self._held

    def rows(self, ids: Sequence[int] | Tensor) -> Tensor:
        """The rows (len(ids), d_in) with these ids, in this order. Raises IndexError for an unknown id."""
        return self._of(range(len(self._reads)), ids)

    def targets(self, ids: Sequence[int] | Tensor) -> Tensor:
        """The targets (len(ids), d_target) of these rows. Raises as `rows`; ValueError where there are none."""
        if self.d_target is None:
            raise ValueError("this source has no targets: open it with target=")
        return self._of(range(len(self._reads), len(self._columns)), ids)

    def _of(self, columns: range, ids: Sequence[int] | Tensor) -> Tensor:
        places = torch.as_tensor(ids, dtype=torch.int64, device="cpu")
        dtype, widths = self.dtype or getattr(torch, self.manifest.dtype), self._widths[columns.start : columns.stop]
        out = torch.empty(len(places), sum(widths), dtype=dtype, device="cpu")
        owner = self._owner(places)
        for number in owner.unique().tolist():
            mine = (owner == number).nonzero()[:, 0]
            local = places[mine] - self._starts[number]
            for column, part in zip(columns, out.split(widths, dim=1), strict=True):
                part[mine] = self._columns[column][number].activations[local].to(out.dtype)
        return out

    def iterate(self, batch_size: int, ids: range | None = None) -> Iterator[tuple[range, Tensor]]:
        """(ids, rows) in the order of the files, every training row once, or those of `ids`; unshuffled."""
        wanted = range(self._rows_per_epoch) if ids is None else ids
        for start in range(0, len(wanted), batch_size):
            piece = wanted[start : start + batch_size]
            yield piece, self.rows(piece)

    def token_ids(self, ids: Sequence[int] | Tensor) -> Tensor:
        """The token of each of these rows: (len(ids),) int64. Raises as `contexts`."""
        places = torch.as_tensor(ids, dtype=torch.int64, device="cpu")
        owner, out = self._owner(places), torch.empty_like(places)
        for number in owner.unique().tolist():
            mine = (owner == number).nonzero()[:, 0]
            text, local = self._shards[number].context(), places[mine] - self._starts[number]
            out[mine] = text.token_ids[text.window[local].long(), text.position[local].long()].long()
        return out

    def vocabulary(self) -> list[str] | None:
        """The text of every token id, or None if the folder was stored without. Raises ShardError if damaged."""
        if self._strings is None and self.manifest.vocabulary is not None:
            self.manifest.vocabulary.check_content(self.folder)
            self._strings = read_vocabulary(self.folder / self.manifest.vocabulary.file)
        return self._strings

    def contexts(self, ids: Sequence[int] | Tensor, width: int = 16) -> list[Context]:
        """The text around these rows, up to `width` tokens to either side, within the row's window.

        Raises: ValueError if the folder was stored without text; IndexError for an unknown id.
        """
        strings = self.vocabulary()
        places = torch.as_tensor(ids, dtype=torch.int64, device="cpu")
        opened: dict[int, ShardContext] = {}
        found = []
        for row, number in zip(places.tolist(), self._owner(places).tolist(), strict=True):
            if number not in opened:
                opened[number] = self._shards[number].context()
            first = self._starts[number]
            found.append(context_of(opened[number], row - first, first, width, strings))
        return found

    def _split(self, holdout: int | None) -> tuple[int, range]:
        """The number of training rows, and the ids of the held-out ones."""
        total = self.manifest.rows
        if total == 0:
            raise ShardError(f"{self.folder} holds no rows yet: its harvest stopped early; run it again to continue")
        stored = self.manifest.held_out
        if stored is None:
            kept = 0 if holdout is None else holdout
            if not 0 <= kept < total:
                raise ValueError(f"holdout must be 0 or more and leave rows to train on: got {kept} of {total:,} rows")
            return total - kept, range(total - kept, total)
        kept = stored.rows if holdout is None else holdout
        if not 0 <= kept <= stored.rows:
            raise ValueError(f"{self.folder} stores {stored.rows:,} held-out rows, holdout asks for {kept:,}")
        return total, range(total, total + kept)

    def _open(self, of: HookFiles, verify: Verify) -> list[ShardReader]:
        entries = [*of.shards, *([of.held_out] if of.held_out else [])]
        return [ShardReader(self.folder, entry, of.d_in, self.manifest.dtype, verify) for entry in entries]

    def _owner(self, places: Tensor) -> Tensor:
        """The number of each row id's file."""
        if len(places) and not 0 <= int(places.min()) <= int(places.max()) < self._starts[-1]:
            raise IndexError(f"row ids run from 0 to {self._starts[-1] - 1}, got {places.min()} to {places.max()}")
        ends = torch.tensor(self._starts[1:], dtype=torch.int64, device="cpu")
        return torch.searchsorted(ends, places, right=True)

    def _chunk_table(self, n_train: int) -> Tensor:
        """(chunks, 3) int64: file, first row in it, rows. No chunk crosses files or reaches the held-out rows."""
        table = []
        for number in range(len(self.manifest.shards)):
            rows = min(self._shards[number].rows, n_train - self._starts[number])
            table += [(number, start, min(CHUNK_ROWS, rows - start)) for start in range(0, rows, CHUNK_ROWS)]
        return torch.tensor(table, dtype=torch.int64, device="cpu")

    def _identity(self) -> dict[str, Any]:
        # The shards' checksums identify the rows, even if the folder was moved or has grown since.
        last = int(self._owner(torch.tensor([self._rows_per_epoch - 1], dtype=torch.int64, device="cpu")))
        columns = [*self._reads, *self._targets]
        more = [[one.shards[0].sha256, one.shards[last].sha256] for one in columns[1:]]
        return {
            "source": "shards",
            "seed": self.seed,
            "buffer_rows": self.buffer_rows,
            "rows": self._rows_per_epoch,
            "first_shard": columns[0].shards[0].sha256,
            "last_shard": columns[0].shards[last].sha256,
            **({"columns": more, "d_in": self.d_in} if more else {}),
        }

    def _place(self, epoch: int, index: int) -> str:
        pool, begin, chunks = self._pool_of(epoch, index)
        counts = chunks[:, 2]
        order = permutation(int(counts.sum()), self.seed, epoch, _ROWS, pool)
        at = int((order == begin).nonzero())  # before the pool was shuffled
        chunk = int(torch.searchsorted(counts.cumsum(0), at, right=True))
        number, start, _ = chunks[chunk].tolist()
        return f"row {start + at - int(counts[:chunk].sum()):,} of {self._shards[number].path}"

    def _pool_of(self, epoch: int, index: int) -> tuple[int, int, Tensor]:
        """The pool that holds this row of the epoch's order, the row's position in it, and the pool's chunks."""
        if self._epoch_chunks is None or self._epoch_chunks[0] != epoch:
            chunks = self._chunks[permutation(len(self._chunks), self.seed, epoch, _CHUNKS)]
            ends = chunks[:, 2].cumsum(0)
            # A pool ends before the chunk that would take the count past a multiple of buffer_rows.
            last = (ends // self.buffer_rows).diff(append=ends.new_tensor([-1])).nonzero()[:, 0]
            self._epoch_chunks = (epoch, chunks, last + 1)
        _, chunks, bounds = self._epoch_chunks
        ends = chunks[:, 2].cumsum(0)[bounds - 1]
        pool = int(torch.searchsorted(ends, index, right=True))
        first = int(bounds[pool - 1]) if pool else 0
        begin = index - (int(ends[pool - 1]) if pool else 0)
        return pool, begin, chunks[first : int(bounds[pool])]

    def _take(self, epoch: int, start: int, n: int) -> Tensor:
        pool, begin, chunks = self._pool_of(epoch, start)
        if self._pool is None or self._pool[:2] != (epoch, pool):
            self._pool = None  # free the old pool before allocating the new one
            self._pool = (epoch, pool, self._gather(epoch, pool, chunks))
        rows = self._pool[2][begin : begin + n]
        return rows.clone() if self.dtype in (None, rows.dtype) else rows.to(self.dtype)

    def _gather(self, epoch: int, pool: int, chunks: Tensor) -> Tensor:
        """The rows of these chunks, permuted."""
        n = int(chunks[:, 2].sum())
        place = permutation(n, self.seed, epoch, _ROWS, pool)
        rows = torch.empty(n, sum(self._widths), dtype=getattr(torch, self.manifest.dtype), device="cpu")
        parts, done = rows.split(self._widths, dim=1), 0
        for number, start, count in chunks.tolist():
            for part, column in zip(parts, self._columns, strict=True):
                part[place[done : done + count]] = column[number].activations[start : start + count]
            done += count
        return rows
