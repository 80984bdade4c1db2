"""Where an SAE's latents and a batch's tokens lie among processes, and what a forward pass exchanges because of it.

Along the axis `latents` each process has some consecutive rows of both dictionaries, and sees the same tokens. It finds
its own candidates, the processes agree on which of them are active, and the sum of their reconstructions is the
reconstruction. From there on all of them compute the same, so a gradient needs no exchange. Along the axis `tokens`
each process has its own tokens of the batch: it computes its part of the loss, divided by the numbers of the whole
batch. What an update needs of the others' tokens, the optimizer gathers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastsae.codes import SparseCodes
from fastsae.model.axis import Axis
from fastsae.model.counting import Counted
from fastsae.ops.reconstruction import SquaredErrors


@dataclass(eq=False)
class Placement:
    """The latents [first, first + own) of `d_sae` are this process's; tokens, latents: the axes of the mesh.

    n: the tokens of the running batch in all processes, set by `begin`.
    """

    tokens: Axis
    latents: Axis
    first: int
    own: int
    d_sae: int
    mesh: DeviceMesh
    n: int = 0

    # -- a batch ------------------------------------------------------------------------------------------------------

    def begin(self, x: Tensor) -> None:
        """Notes the number of tokens of a batch x (n, D). Raises ValueError if processes that share a dictionary got
        other numbers of tokens, or other first and last ones.
        """
        self._counts = counts = self.tokens.rows(x)
        self.n, self._before = sum(counts), sum(counts[: self.tokens.rank])
        if self.latents.size == 1:
            return
        ends = _ends(x)
        alike = self.latents.stack(torch.cat([ends, ends.new_tensor([self.n, x.requires_grad])]))
        if bool((alike != alike[0]).any()):
            raise ValueError(
                f"the processes along the mesh's axis of latents got {alike[:, 0].tolist()} tokens, other rows, "
                "or x requires a gradient in some of them; expected the same batch in all of them, since only along "
                "the axis of data has each process its own rows"
            )

    def check_same(self, x: Tensor) -> None:
        """Raises ValueError unless all processes got as many rows x, with the same first and last one: what is found
        from them is for all.
        """
        self._check_ends(_ends(x))

    def _check_ends(self, ends: Tensor) -> None:
        everyone = self.of_all_processes(ends)
        if bool((everyone != everyone[0]).any()):
            raise ValueError(
                f"the processes of this SAE got {everyone[:, 0].tolist()} rows, or other rows, expected the same in "
                "all, since what is found from them is for all. Give the rows of the whole batch to each of them"
            )

    def same_blocks(self, blocks: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
        """The blocks of rows, on the device. Raises ValueError in every process as soon as one has another block than
        the others, or one fewer: none waits for it.
        """
        given = iter(blocks)
        while True:
            block = next(given, None)
            if block is None:
                self._check_ends(torch.tensor([-1, 0, 0], dtype=torch.int64, device=device))
                return
            block = block.to(device)
            self.check_same(block)
            yield block

    def check_numbers(self, **numbers: float) -> None:
        """Raises ValueError in every process unless all gave the same numbers."""
        device = torch.device(self.mesh.device_type)
        everyone = self.of_all_processes(torch.tensor(list(numbers.values()), dtype=torch.float64, device=device))
        if bool((everyone != everyone[0]).any()):
            raise ValueError(
                f"the processes of this SAE got {', '.join(numbers)} of {everyone.tolist()}; give all of them the same"
            )

    def check(self, gradients_are_added: bool, wrapped_by: Any) -> None:
        """Raises RuntimeError where a forward pass could not be trained on."""
        if wrapped_by is not None:
            raise RuntimeError(
                "this SAE is on several processes by parallelize, and DistributedDataParallel or fully_shard has it "
                "too; leave one of them out"
            )
        if self.tokens.size > 1 and torch.is_grad_enabled() and not gradients_are_added:
            raise RuntimeError(
                "this SAE shares each batch with other processes, whose gradients only an optimizer of fastsae.optim "
                "adds; make one for it, or leave parallelize out and use DistributedDataParallel"
            )

    def over_tokens(self, errors: SquaredErrors) -> SquaredErrors:
        """The sums of squares of the whole batch, beside this process's error. Each passes its gradient on as it is."""
        if self.tokens.size == 1:
            return errors
        weighted, last = self.tokens.summed(torch.stack([errors.weighted, errors.last])).unbind()
        return SquaredErrors(weighted, last, errors.error)

    def mean(self, total: Tensor) -> Tensor:
        """The mean over all tokens of a sum over this process's tokens and latents."""
        return self.tokens.summed(self.latents.summed(total)) / max(self.n, 1)

    def counted(self, batch: Counted) -> Counted:
        """The counts of this process's latents over all tokens; measured: the least of all."""
        counts, _, measured = batch
        if measured is not None:
            measured = self.tokens.stack(self.latents.stack(measured).amin(0)).amin(0)
        return Counted(self.tokens.sum(counts), self.n, measured)

    def of_all_processes(self, t: Tensor) -> Tensor:
        """Every process's t, of one shape in all of them: (processes, *shape), in the order of the mesh."""
        return self.tokens.stack(self.latents.stack(t)).flatten(0, 1)

    def over_shards(self, t: Tensor) -> Tensor:
        """The sum of t over the shards of the dictionary."""
        return self.latents.sum(t)

    @property
    def sums_shards(self) -> Callable[[Tensor], Tensor] | None:
        """Adds what the shards of the dictionary give; None if there is one."""
        return None if self.latents.size == 1 else self.over_shards

    def everywhere(self, good: Tensor) -> Tensor:
        """Whether `good` is true in every process: bool, elementwise."""
        return self.tokens.all(self.latents.all(good))

    # -- selection ----------------------------------------------------------------------------------------------------

    def local_k(self, k: int) -> int:
        """How many of the k strongest latents of a token can be of this process."""
        return min(k, self.own)

    def topk(self, codes: SparseCodes, k: int) -> SparseCodes:
        """Of a flat fixed code of this process's strongest latents, what belongs to the k strongest of all.

        By the size of the acts; ties go to the lower latent, and NaN counts as the largest.
        """
        if self.latents.size == 1:
            return codes
        size = codes.acts.detach().abs()
        size = torch.where(size.isnan(), torch.inf, size)
        shards = self.latents.gather(size.mT.contiguous())
        everyone = torch.cat(shards)  # (slots of all shards, N), in the order of the latents
        bar = everyone.topk(k, dim=0).values[-1]
        above, level = everyone > bar, everyone == bar
        kept = above | (level & (level.cumsum(0) <= k - above.sum(0)))
        return codes.keep(kept.split([len(shard) for shard in shards])[self.latents.rank].mT)

    def ranks(self, codes: SparseCodes, k: int) -> Tensor:
        """The rank of each slot of a flat ragged code, of at most k acts a token, among the acts of its token in all
        shards: int64, shape of acts; 0 for the largest, and of equal ones for the lower latent.
        """
        assert codes.offsets is not None
        token = codes.token_ids()
        place = torch.arange(token.numel(), dtype=torch.int64, device=token.device) - codes.offsets[token]
        size = codes.acts.new_full((k, codes.n_tokens), -torch.inf)
        size[place, token] = torch.where(codes.acts.isnan(), torch.inf, codes.acts.detach())
        order = self.latents.stack(size).flatten(0, 1).sort(dim=0, descending=True, stable=True).indices
        return order.argsort(dim=0)[place + k * self.latents.rank, token]

    def batch_k(self, k: int, n: int) -> int:
        """The k of a local BatchTopK that cannot miss any of the N·k largest acts of the whole batch."""
        return min(self.own, -(-self.n * k // max(n, 1)))

    def batch_topk(self, codes: SparseCodes, k: int) -> SparseCodes:
        """Of a flat ragged code of this process's largest acts, what belongs to the N·k largest of all processes.

        Ties go to the lower token, then to the lower latent. A token of NaN keeps its acts and takes no one's place.
        """
        if self.latents.size == self.tokens.size == 1:
            return codes
        acts, occupied = codes.acts.detach(), codes.occupied()
        blank = occupied & acts.isnan()
        blanks = torch.zeros(codes.n_tokens, dtype=torch.uint8, device=acts.device)
        blanks[codes.token_ids()[blank]] = 1
        wanted = k * (self.n - int(self.tokens.sum(self.latents.stack(blanks).amax(0).sum().long())))
        competing = occupied & ~blank
        size = torch.where(competing, acts, 0)
        everyone = torch.cat(self._gathered(size[competing]))
        if everyone.numel() <= wanted:
            return codes.keep(competing | blank)
        if wanted == 0:
            return codes.keep(blank)
        bar = everyone.topk(wanted).values[-1]
        above, level = size > bar, competing & (size == bar)
        free = wanted - int((everyone > bar).sum())
        place = (codes.token_ids() + self._before) * self.d_sae + codes.indices + self.first
        last = torch.cat(self._gathered(place[level])).sort().values[free - 1]
        return codes.keep(above | (level & (place <= last)) | blank)

    def _gathered(self, t: Tensor) -> list[Tensor]:
        return self.tokens.gather(torch.cat(self.latents.gather(t)))

    def in_whole(self, codes: SparseCodes) -> SparseCodes:
        """The same code with the latents' numbers in the whole dictionary."""
        return codes.with_same_acts(replace(codes, indices=codes.indices + self.first, d_sae=self.d_sae))

    def in_shard(self, codes: SparseCodes) -> SparseCodes:
        """The opposite of `in_whole`."""
        return codes.with_same_acts(replace(codes, indices=codes.indices - self.first, d_sae=self.own))

    # -- what an update needs of the others' tokens -------------------------------------------------------------------

    def send_ahead(self, x: Tensor) -> Callable[[], Tensor] | None:
        """Begins to send an encoder's input x (n, D) of the running batch, which an update will need of all processes,
        while this one encodes. Returns what waits for the rows of all; None where exchanges do not overlap.
        """
        if not self.tokens.overlaps or len(x) != self._counts[self.tokens.rank]:
            return None
        finish = self.tokens.begin_gather(x, self._counts)
        return lambda: torch.cat(finish())

    def squared_norm(self, stats: Tensor) -> Tensor:
        """The squared norm of all gradients from those (4,) of W_enc, W_dec, b_enc of this shard, and of b_dec."""
        return self.latents.sum(stats[:3]).sum() + stats[3]

    def __deepcopy__(self, memo: Any) -> Placement:
        return self  # process groups cannot be copied


def axes_of(placement: Placement | None) -> tuple[Axis, Axis]:
    """The axes of tokens and of latents, also of an SAE of one process."""
    return (Axis(), Axis()) if placement is None else (placement.tokens, placement.latents)


def _ends(x: Tensor) -> Tensor:
    """The number of rows of x (n, D), and the bits of the sums of the first and the last one: int64 (3,)."""
    flat = x.detach().flatten(0, -2)
    sums = flat[:: max(1, len(flat) - 1)][:2].double().sum(1).view(torch.int64)
    return torch.cat([sums.new_tensor([len(flat)]), sums, sums.new_zeros(2)])[:3]
