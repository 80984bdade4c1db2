"""SparseCodes: which latents are active for each token, and how strongly; the one data type that ops exchange.

A is the dense (N, M) view of a code: N tokens, M = d_sae latents. Two layouts:

- fixed K: acts (*batch, K), indices (*batch, K). Occupied slots (act != 0; NaN counts as occupied) come first, their
  indices strictly ascending; empty slots (act 0) come last and carry the index d_sae - 1.
- ragged (CSR): acts (capacity,), indices (capacity,), offsets (N+1,). Token n owns the slots offsets[n] to
  offsets[n+1], indices strictly ascending; occupancy is what the offsets say, and slots past offsets[N] are ignored.

`LatentOrder`, `Screen` and `UpdateTerm` are the three small arguments that some ops take besides codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


# Not frozen, because Lightning Fabric refuses a module whose output holds a frozen dataclass; treat it as if it were.
@dataclass(eq=False)
class SparseCodes:
    """The active latents of each token. A pytree, so it passes through torch.compile and torch.func.

    acts (*batch, K) floating, or (capacity,) when ragged; indices int32, same shape, in [0, d_sae);
    offsets int64 (N+1,) when ragged, else None; batch_shape: the leading dimensions, N = their product, never ();
    redone: 0-d int64, the number of tokens that the encoder had to encode again (a metric), or None.
    made_by: the encoder's record and the acts that it made; `encoded` checks that the acts are still the same.
    """

    acts: Tensor
    indices: Tensor
    d_sae: int
    offsets: Tensor | None = None
    batch_shape: tuple[int, ...] = ()
    redone: Tensor | None = None
    made_by: tuple[Any, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.batch_shape:
            shape = tuple(self.acts.shape[:-1]) if self.offsets is None else (self.offsets.shape[0] - 1,)
            if not shape:
                raise ValueError(
                    f"acts has shape {tuple(self.acts.shape)}, expected (*batch, K) with at least one batch dimension; "
                    "for one token use acts[None]"
                )
            self.batch_shape = shape

    # -- sizes ------------------------------------------------------------------------------------------------------

    @property
    def is_ragged(self) -> bool:
        return self.offsets is not None

    @property
    def n_tokens(self) -> int:
        n = 1
        for size in self.batch_shape:
            n *= size
        return n

    @property
    def k(self) -> int:
        """Slots per token. Raises ValueError on a ragged code, which has no fixed number."""
        if self.is_ragged:
            raise ValueError("a ragged code has no k; use .l0 for the active latents of each token")
        return self.acts.shape[-1]

    @property
    def l0(self) -> Tensor:
        """Active latents of each token: int64, shape batch_shape."""
        if self.offsets is None:
            return (self.acts != 0).sum(-1)
        return self.offsets.diff().view(self.batch_shape)

    @property
    def nnz(self) -> Tensor:
        """The total number of stored activations: 0-d int64, on the device."""
        return self.l0.sum()

    # -- shapes and devices -----------------------------------------------------------------------------------------

    def flatten(self) -> SparseCodes:
        """The same code with one batch dimension: acts (N, K), or ragged with batch_shape (N,)."""
        return self.with_batch((self.n_tokens,))

    def with_batch(self, batch_shape: tuple[int, ...]) -> SparseCodes:
        """The same tokens with other leading dimensions; their product must be the same."""
        batch_shape = tuple(batch_shape)
        if batch_shape == self.batch_shape:
            return self
        if self.is_ragged:
            return replace(self, batch_shape=batch_shape)
        shape = (*batch_shape, self.k)
        indices = self.indices.reshape(shape)
        acts = self.acts.reshape(shape)
        return self.with_same_acts(replace(self, acts=acts, indices=indices, batch_shape=batch_shape))

    @property
    def encoded(self) -> Any:
        """The record of the encoder that made these acts, or None if acts or slots have changed since."""
        if self.made_by is None:
            return None
        record, acts, version, indices, offsets = self.made_by
        same = acts is self.acts and indices is self.indices and offsets is self.offsets
        return record if same and acts._version == version else None

    def note_made_by(self, record: Any) -> None:
        """Records that an encoder with this record made the code as it is now."""
        self.made_by = (record, self.acts, self.acts._version, self.indices, self.offsets)

    def with_same_acts(self, other: SparseCodes) -> SparseCodes:
        """`other`, with this code's record: its acts are a selection of this code's, each of the same token."""
        record, other.made_by = self.encoded, None
        if record is not None:
            other.note_made_by(record)
        return other

    def to(
        self,
        target: torch.device | torch.dtype | str | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> SparseCodes:
        """A copy on another device and/or with acts of another dtype (indices and offsets keep theirs)."""
        if isinstance(target, torch.dtype):
            dtype = target
        elif target is not None:
            device = target
        return replace(
            self,
            acts=self.acts.to(device=device, dtype=dtype),
            indices=self.indices.to(device=device),
            offsets=None if self.offsets is None else self.offsets.to(device=device),
            redone=None if self.redone is None else self.redone.to(device=device),
        )

    def detach(self) -> SparseCodes:
        """The same code without its graph, and without the record of its encoder."""
        return replace(self, acts=self.acts.detach(), made_by=None)

    def __getitem__(self, key: Any) -> SparseCodes:
        """A selection of tokens: any index into the batch dimensions (codes[3:7], codes[mask], codes[0]).

        For a ragged code the result has capacity nnz, which costs a host sync.
        """
        if self.offsets is None:
            acts, indices = self.acts[key], self.indices[key]
            if acts.shape[-1:] != self.acts.shape[-1:]:
                raise IndexError(f"got the index {key}, expected at most {len(self.batch_shape)} dimensions, of tokens")
            if acts.ndim == 1:
                acts, indices = acts[None], indices[None]
            return replace(self, acts=acts, indices=indices, batch_shape=tuple(acts.shape[:-1]))
        tokens = torch.arange(self.n_tokens, dtype=torch.int64, device=self.acts.device).view(self.batch_shape)[key]
        lengths = self.offsets.diff()[tokens.flatten()]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        starts = torch.repeat_interleave(self.offsets[:-1][tokens.flatten()] - offsets[:-1], lengths)
        slots = starts + torch.arange(starts.numel(), dtype=torch.int64, device=starts.device)
        return replace(
            self,
            acts=self.acts[slots],
            indices=self.indices[slots],
            offsets=offsets,
            batch_shape=tuple(tokens.shape) or (1,),
        )

    def trimmed(self) -> SparseCodes:
        """A ragged code without the slots that no token owns (capacity nnz, a host sync); a fixed code unchanged."""
        if self.offsets is None:
            return self
        nnz = int(self.offsets[-1])
        return replace(self, acts=self.acts[:nnz], indices=self.indices[:nnz])

    def masked(self, act: float) -> SparseCodes:
        """A ragged code whose slots that no token owns hold `act`."""
        return replace(self, acts=torch.where(self.occupied(), self.acts, act))

    def keep(self, kept: Tensor) -> SparseCodes:
        """The slots where `kept` (bool, shape of acts) is True and occupied, as a ragged code; differentiable in acts.

        On a GPU its capacity stays that of this code, so that nothing is read back; on a CPU it is nnz.
        """
        kept = (kept & self.occupied()).flatten()
        before = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])
        if self.offsets is None:
            offsets = before[:: self.k].contiguous() if self.k else before.new_zeros(self.n_tokens + 1)
        else:
            offsets = before[self.offsets]
        if reads_are_free(kept):
            slots = kept.nonzero().squeeze(1)
            acts, indices = self.acts.flatten().index_select(0, slots), self.indices.flatten().index_select(0, slots)
        else:
            size = kept.numel()
            place = torch.where(kept, before[:-1], size)  # the other slots go to one place that is cut off
            acts = self.acts.new_zeros(size + 1).scatter(0, place, self.acts.flatten())[:size]
            indices = self.indices.new_zeros(size + 1).scatter(0, place, self.indices.flatten())[:size]
        return self.with_same_acts(SparseCodes(acts, indices, self.d_sae, offsets, self.batch_shape, self.redone))

    def only(self, latents: Tensor) -> SparseCodes:
        """The activations of some latents only, as a ragged code in which latent i is latents[i].

        latents (n,): distinct integers in [0, d_sae), in any order. `.only(latents).to_dense()` is (*batch, n), a
        column for each. Differentiable in acts. Raises as `check_latents`. Costs a host sync.
        """
        check_latents(latents, self.d_sae)
        n = latents.shape[0]
        place = torch.full((self.d_sae,), n, dtype=torch.int32, device=self.acts.device)
        place[latents.long()] = torch.arange(n, dtype=torch.int32, device=self.acts.device)
        # Slots that no token owns may hold any index.
        kept = self.keep(place[torch.where(self.occupied(), self.indices, 0).long()] < n).trimmed()
        columns = place[kept.indices.long()]
        order = (kept.token_ids() * n + columns).argsort()
        return replace(kept, acts=kept.acts[order], indices=columns[order], d_sae=n, made_by=None)

    # -- views of the same code -------------------------------------------------------------------------------------

    def token_ids(self) -> Tensor:
        """The token that owns each slot: int64, shape of the flattened acts; N for slots that no token owns."""
        slots = torch.arange(self.acts.numel(), dtype=torch.int64, device=self.acts.device)
        if self.offsets is None:
            return slots // max(self.k, 1)
        return torch.searchsorted(self.offsets, slots, right=True) - 1

    def occupied(self) -> Tensor:
        """Which slots hold an activation: bool, shape of acts. Fixed K: act != 0. Ragged: slot < offsets[N]."""
        if self.offsets is None:
            return self.acts != 0
        return torch.arange(self.acts.numel(), dtype=torch.int64, device=self.acts.device) < self.offsets[-1]

    def to_dense(self) -> Tensor:
        """A (*batch, d_sae), dtype of acts. A latent stored twice for one token counts twice."""
        acts = torch.where(self.occupied(), self.acts, 0).flatten()
        tokens = self.token_ids().clamp(max=max(self.n_tokens - 1, 0))
        # Slots past the end may hold any index; they add 0 at latent 0.
        indices = torch.where(self.occupied(), self.indices, 0).flatten()
        flat = acts.new_zeros(self.n_tokens * self.d_sae)
        if self.n_tokens == 0:
            return flat.view(*self.batch_shape, self.d_sae)
        return flat.index_add(0, tokens * self.d_sae + indices, acts).view(*self.batch_shape, self.d_sae)

    @staticmethod
    def from_dense(A: Tensor, k: int | None = None) -> SparseCodes:
        """The code of A (*batch, M): fixed with k slots a token, or ragged of capacity nnz when k is None.

        Raises ValueError where a token has more than k non-zeros. Costs a host sync.
        """
        d_sae, flat = A.shape[-1], A.reshape(-1, A.shape[-1])
        occupied, batch_shape = flat != 0, tuple(A.shape[:-1]) or (1,)
        counts = occupied.sum(-1)
        if k is None:
            tokens, indices = occupied.nonzero(as_tuple=True)
            offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            return SparseCodes(flat[tokens, indices], indices.int(), d_sae, offsets, batch_shape)
        if not 1 <= k <= d_sae:
            raise ValueError(f"k is {k}, expected 1 <= k <= {d_sae}, the width of A")
        if counts.numel() and (most := int(counts.max())) > k:
            raise ValueError(f"a token of A has {most} non-zeros, expected at most k = {k}; raise k or pass k=None")
        slots = torch.sort(occupied, dim=-1, descending=True, stable=True).indices[:, :k]
        acts = flat.gather(-1, slots)
        indices = torch.where(acts != 0, slots, d_sae - 1).int()
        return SparseCodes(acts, indices, d_sae).with_batch(batch_shape)

    def to_torch_sparse_csr(self) -> Tensor:
        """A (N, d_sae) as a torch.sparse_csr tensor with int64 indices. Costs a host sync."""
        occupied = self.occupied().flatten()
        crow = torch.cat([self.nnz.new_zeros(1), self.l0.flatten().cumsum(0)])
        return torch.sparse_csr_tensor(
            crow,
            self.indices.flatten()[occupied].long(),
            self.acts.flatten()[occupied],
            size=(self.n_tokens, self.d_sae),
            check_invariants=False,
        )

    def rank_order(self) -> Tensor:
        """Slots of each token from the largest act to the smallest, (*batch, K) int64; ties keep the lower index first.

        Fixed K only: a rule that needs ranks (HierarchicalTopK) gathers with it.
        """
        _ = self.k
        return torch.sort(self.acts, dim=-1, descending=True, stable=True).indices

    def check(self) -> SparseCodes:
        """Returns the code itself if it keeps the invariant of this module. Raises ValueError if not. Host sync."""
        if self.indices.dtype != torch.int32:
            raise ValueError(f"indices have dtype {self.indices.dtype}, expected torch.int32")
        if self.indices.shape != self.acts.shape:
            raise ValueError(
                f"indices have shape {tuple(self.indices.shape)}, expected that of acts, {tuple(self.acts.shape)}"
            )
        if self.offsets is not None:
            self._check_offsets(self.offsets)
        occupied, tokens = self.occupied().flatten(), self.token_ids()
        indices = self.indices.flatten()
        inside = indices[occupied]
        if inside.numel() and (int(inside.min()) < 0 or int(inside.max()) >= self.d_sae):
            low, high = int(inside.min()), int(inside.max())
            raise ValueError(f"indices lie in [{low}, {high}], expected [0, {self.d_sae}); is d_sae right?")
        if self.offsets is None:
            rising = self.acts.flatten(0, -2) != 0 if self.acts.ndim > 1 else self.acts != 0
            if bool((rising[..., 1:] & ~rising[..., :-1]).any()):
                raise ValueError("an empty slot (act 0) comes before an occupied one, expected empty slots last")
            if bool((indices[~occupied] != self.d_sae - 1).any()):
                raise ValueError(f"an empty slot has an index other than d_sae - 1 = {self.d_sae - 1}")
        pair = occupied[1:] & occupied[:-1] & (tokens[1:] == tokens[:-1])
        if bool((pair & (indices[1:] <= indices[:-1])).any()):
            raise ValueError("indices are not strictly ascending within a token; sort them and merge repeated latents")
        return self

    def _check_offsets(self, offsets: Tensor) -> None:
        if offsets.dtype != torch.int64 or offsets.ndim != 1 or offsets.shape[0] != self.n_tokens + 1:
            raise ValueError(
                f"offsets are {offsets.dtype} of shape {tuple(offsets.shape)}, "
                f"expected torch.int64 of shape ({self.n_tokens + 1},)"
            )
        if int(offsets[0]) != 0 or bool((offsets.diff() < 0).any()) or int(offsets[-1]) > self.acts.numel():
            raise ValueError(f"offsets must rise from 0 to at most the capacity {self.acts.numel()}")


def reads_are_free(t: Tensor) -> bool:
    """Whether the host may read values of t: not on a GPU, which it would wait for, nor in a compiled graph."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()


def check_latents(latents: Tensor, d_sae: int) -> None:
    """Raises TypeError or ValueError unless latents are distinct integers in [0, d_sae), of shape (n,). Host sync."""
    if latents.is_floating_point() or latents.is_complex() or latents.dtype == torch.bool:
        raise TypeError(f"latents have dtype {latents.dtype}, expected integers; for a mask, mask.nonzero()[:, 0]")
    if latents.ndim != 1:
        raise ValueError(f"latents have shape {tuple(latents.shape)}, expected (n,)")
    if not latents.numel():
        return
    low, high = (int(value) for value in latents.aminmax())
    if low < 0 or high >= d_sae:
        raise ValueError(f"latents lie in [{low}, {high}], expected [0, {d_sae})")
    values, counts = latents.unique(return_counts=True)
    if bool((counts > 1).any()):
        raise ValueError(f"latent {int(values[counts > 1][0])} is given more than once; pass each latent once")


def _flatten_codes(codes: SparseCodes) -> tuple[list[Any], Any]:
    optional = [name for name in ("offsets", "redone") if getattr(codes, name) is not None]
    leaves = [codes.acts, codes.indices, *(getattr(codes, name) for name in optional)]
    return leaves, (codes.d_sae, codes.batch_shape, tuple(optional))


def _unflatten_codes(leaves: Any, context: Any) -> SparseCodes:
    acts, indices, *rest = leaves
    d_sae, batch_shape, optional = context
    return SparseCodes(acts, indices, d_sae, batch_shape=batch_shape, **dict(zip(optional, rest, strict=True)))


pytree.register_pytree_node(SparseCodes, _flatten_codes, _unflatten_codes, serialized_type_name="fastsae.SparseCodes")


@dataclass(frozen=True, eq=False)
class LatentOrder:
    """A code regrouped latent by latent (CSC): latent i owns the entries offsets[i] to offsets[i+1].

    offsets int64 (M+1,); tokens int32 (capacity,), ascending within a latent; slots int64 (capacity,), positions in the
    flattened acts. Entries past offsets[M] are ignored.
    """

    offsets: Tensor
    tokens: Tensor
    slots: Tensor


@dataclass(frozen=True, eq=False)
class Screen:
    """A backend's own low-precision copy of an encoder; opaque. format is '<backend>/<what>'."""

    tensors: list[Tensor]
    format: str


@dataclass(frozen=True, eq=False)
class Held:
    """What a backend remembers of an encoder whose weights rest: a digest of W, its low-precision copy, or how many
    tokens have done without one."""

    digest: tuple[int, int, torch.dtype]
    screen: Screen | None = None
    waited: int = 0


@dataclass(frozen=True, eq=False)
class UpdateTerm:
    """One reconstruction whose gradient trains the dictionaries: recon = A W_dec (+ b_dec if has_bias).

    codes: flattened, N tokens; x (N, D): the encoder's input after pre-bias and normalization;
    grad (N, D_out): dLoss/d recon. dacts, shape of codes.acts: dLoss/d pre-act at the slots; None: it comes from grad
    alone, ⟨grad_n, W_dec_i⟩ where the act is not 0. In a ragged code a slot whose act is 0 may have a gradient. In a
    fixed-K code such a slot is empty, and dacts is ignored there. ahead: what waits for the x of all processes, if x
    was sent to the others before the update.
    """

    codes: SparseCodes
    x: Tensor
    grad: Tensor
    has_bias: bool = True
    dacts: Tensor | None = None
    ahead: Callable[[], Tensor] | None = None
