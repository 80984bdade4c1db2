"""One axis of a mesh of processes: sums and concatenations over it whose bits are the same in every process.

torch.distributed's own all_reduce adds in an order that depends on the number of processes and on the backend. Here
every element is added in the order of the ranks, by one process, which sends the sum to the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PIECE = 1 << 24
"""Bytes of a piece of rows that goes to the first process."""


class Axis:
    """The processes that differ from this one along one axis of a mesh; of a single process without a group.

    received: bytes that other processes of the axis have sent to this one so far.
    overlaps: whether an exchange may go on while the process computes. With gloo a step takes longer so: its threads
    need the cores that compute.
    """

    def __init__(self, group: Any = None):
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.received = 0
        self.overlaps = self.size > 1 and dist.get_backend(group) != "gloo"

    def sum(self, t: Tensor) -> Tensor:
        """Σ t over the processes, in the order of their ranks; t has the same shape in all of them."""
        if self.size == 1:
            return t
        flat = t.detach().reshape(-1)
        if not flat.numel():
            return t.detach()
        each = -(-flat.numel() // self.size)
        padded = flat.new_zeros(self.size * each)
        padded[: flat.numel()] = flat
        pieces = torch.empty_like(padded)
        dist.all_to_all_single(_bits(pieces), _bits(padded), group=self.group)
        total = pieces.view(self.size, each)[0].clone()
        for piece in pieces.view(self.size, each)[1:]:
            total += piece
        dist.all_gather(list(_bits(padded).chunk(self.size)), _bits(total), group=self.group)
        self.received += 2 * (self.size - 1) * each * t.itemsize
        return padded[: flat.numel()].view(t.shape)

    def gather(self, t: Tensor) -> list[Tensor]:
        """Every process's t, by rank; they may differ in their number of rows, which costs a host sync."""
        return [t] if self.size == 1 else self.begin_gather(t, self.rows(t))()

    def begin_gather(self, t: Tensor, counts: list[int]) -> Callable[[], list[Tensor]]:
        """Begins to send t's rows, of which the processes, several of them, have `counts`, and returns what waits for
        those of all.

        Meanwhile t may be read, and other exchanges begun, in the same order in all processes.
        """
        most, width = max(counts), t.shape[1:].numel()
        padded = t.detach().new_zeros(most, width)
        padded[: t.shape[0]] = t.detach().reshape(t.shape[0], width)
        whole, work = padded.new_empty(self.size, most, width), None
        if most and width:
            parts = list(_bits(whole.view(self.size, -1)))
            work = dist.all_gather(parts, _bits(padded.view(-1)), group=self.group, async_op=True)
        self.received += (self.size - 1) * padded.nbytes

        def finish() -> list[Tensor]:
            if work is not None:
                work.wait()
            return [one[:n].reshape(n, *t.shape[1:]) for one, n in zip(whole, counts, strict=True)]

        return finish

    def rows(self, t: Tensor) -> list[int]:
        """The rows of every process's t. A host sync."""
        return self.stack(t.new_tensor([t.shape[0]], dtype=torch.int64))[:, 0].tolist()

    def collect(self, t: Tensor) -> Tensor | None:
        """`gather` for the first process alone, concatenated on its CPU, one shard at a time; None in the others."""
        counts = self.rows(t)
        own, first = t.detach().contiguous(), 0 if self.group is None else dist.get_global_rank(self.group, 0)
        if self.rank:
            if own.numel():
                dist.send(_bits(own.view(-1)), dst=first, group=self.group)
            return None
        whole = torch.empty(sum(counts), *t.shape[1:], dtype=t.dtype, device="cpu")
        for rank, part in enumerate(whole.split(counts)):
            shard = own
            if rank and part.numel():
                shard = torch.empty(part.shape, dtype=t.dtype, device=t.device)
                dist.recv(_bits(shard.view(-1)), src=dist.get_global_rank(self.group, rank), group=self.group)
                self.received += shard.nbytes
            part.copy_(shard)
        return whole

    def pass_to_first(self, t: Tensor, take: Callable[[Tensor], object]) -> None:
        """Calls `take` in the first process with the rows of every process's t, in the order of the ranks, some at a
        time. `take` must not raise: the others go on sending.
        """
        counts, own = self.rows(t), t.detach()
        each = max(1, PIECE // max(1, t.itemsize * t.shape[1:].numel()))
        ranks = [0] if self.group is None else dist.get_process_group_ranks(self.group)
        for rank, count in enumerate(counts):
            for start in range(0, count, each):
                n = min(each, count - start)
                if self.rank == rank:
                    piece = own[start : start + n].contiguous()
                    take(piece) if rank == 0 else dist.send(_bits(piece.view(-1)), dst=ranks[0], group=self.group)
                elif self.rank == 0:
                    piece = torch.empty(n, *t.shape[1:], dtype=t.dtype, device=t.device)
                    dist.recv(_bits(piece.view(-1)), src=ranks[rank], group=self.group)
                    self.received += piece.nbytes
                    take(piece)

    def stack(self, t: Tensor) -> Tensor:
        """Every process's t, of one shape in all of them: (size, *shape)."""
        if self.size == 1:
            return t[None]
        whole = t.new_empty(self.size, *t.shape)
        own = t.detach().contiguous()
        if t.numel():
            dist.all_gather(list(_bits(whole.view(self.size, -1))), _bits(own.view(-1)), group=self.group)
        self.received += (self.size - 1) * t.nbytes
        return whole

    def all(self, good: Tensor) -> Tensor:
        """Whether `good` is true in every process: bool, elementwise."""
        return good if self.size == 1 else self.stack(good.to(torch.uint8)).bool().all(0)

    def summed(self, t: Tensor) -> Tensor:
        """`sum`, whose gradient is each process's own: what follows is computed alike in all of them."""
        return t if self.size == 1 else _Summed.apply(t, self)

    def copied(self, t: Tensor) -> Tensor:
        """t, the same in all processes, each of which computes a part of what follows: its gradient is their sum."""
        return t if self.size == 1 else _Copied.apply(t, self)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, axis: Axis) -> Tensor:
        return axis.sum(t)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.axis.sum(grads[0]), None


def _bits(t: Tensor) -> Tensor:
    """The same memory as bytes, which every backend can send, whatever the dtype."""
    return t.view(torch.uint8)


def bounds(count: int, size: int) -> list[int]:
    """Where each of `size` nearly equal parts of `count` begins, and where the last ends; the first are the larger."""
    each, more = divmod(count, size)
    return [rank * each + min(rank, more) for rank in range(size + 1)]
