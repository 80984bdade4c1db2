"""Rules whose parts reconstruct on their own: prefixes of the dictionary, or the k strongest latents for several k."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import ClassVar

import torch
from torch import Tensor

from fastsae import reference
from fastsae.codes import SparseCodes
from fastsae.model.rules.base import (
    Activation,
    EncodeOptions,
    RuleState,
    Selected,
    fits,
    number,
    select_topk,
    whole_number,
)
from fastsae.model.rules.topk import BatchTopK, TopK


def _placed(numbers: Iterable[int], device: torch.device) -> Tensor:
    """Whole numbers as int64 (n,), written on the device: a CUDA graph cannot capture a copy from the host."""
    return torch.stack([torch.full((), number, dtype=torch.int64, device=device) for number in numbers])


def _check_weights(rule: str, weights: tuple[float, ...] | None, count: int) -> None:
    """Raises ValueError unless they are numbers of at least 0, one for each reconstruction."""
    for weight in weights or ():
        number(rule, "weights", weight)
    if weights is not None and len(weights) != count:
        raise ValueError(f"{rule} has {len(weights)} weights, expected one for each of its {count} reconstructions")


@dataclass(frozen=True)
class Matryoshka(Activation):
    """Nested prefixes of the dictionary, each of which must reconstruct: L = Σ_g weight_g · error of m_g latents.

    A prefix ends after each of `groups`. Alternatively there are `sampled` prefixes of log-uniform length, drawn from
    the batch count and `seed`; the last one is the whole dictionary.
    Source: Bussmann et al. 2025 (arXiv 2503.17547), eq. 3; sampled prefixes: Nabeshima 2024.
    """

    inner: TopK | BatchTopK
    """Which latents are active."""
    groups: tuple[int, ...] = ()
    """Sizes of the groups, with sum d_sae."""
    sampled: int | None = None
    """Instead of groups: the number of prefixes, drawn anew for every batch."""
    weights: tuple[float, ...] | None = None
    """Weight of each prefix's error. Left out: all equal, with sum 1."""
    shortest: int = 64
    """Latents of the shortest prefix that can be drawn."""
    seed: int = 0
    """Seed of the sampled prefixes."""
    kind: ClassVar[str] = "matryoshka"

    @classmethod
    def variants(cls) -> dict[str, dict[str, type[Activation]]]:
        return {"matryoshka": {"inner": TopK}, "matryoshka_batch": {"inner": BatchTopK}}

    def __post_init__(self) -> None:
        if not isinstance(self.inner, (TopK, BatchTopK)):
            raise ValueError(f"Matryoshka has inner = {self.inner!r}, expected TopK or BatchTopK")
        for name in ("groups", "weights"):  # lists are accepted too
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if bool(self.groups) == (self.sampled is not None):
            neither, both = "neither groups nor sampled", f"both groups = {self.groups} and sampled = {self.sampled}"
            raise ValueError(
                f"Matryoshka has {both if self.groups else neither}; give groups, sizes that sum to d_sae, such as "
                "(512, 1536, 2048), or sampled, the number of prefixes drawn for each batch"
            )
        for size in self.groups:
            whole_number("Matryoshka", "groups", size)
        if self.sampled is not None:
            whole_number("Matryoshka", "sampled", self.sampled)
        whole_number("Matryoshka", "shortest", self.shortest)
        _check_weights("Matryoshka", self.weights, self.count)

    @property
    def count(self) -> int:
        """The number of prefixes."""
        return len(self.groups) or self.sampled or 0

    @property
    def each_weight(self) -> tuple[float, ...]:
        """The weight of every reconstruction: equal ones with sum 1 where none are given."""
        return self.weights or (1 / self.count,) * self.count

    @property
    def screen_k(self) -> int | None:
        return self.inner.screen_k

    @property
    def selects_by_norm(self) -> bool:
        return self.inner.selects_by_norm

    @property
    def mean_k(self) -> int | None:
        return self.inner.mean_k

    @property
    def asked_l0(self) -> float | None:
        return self.inner.asked_l0

    def with_k(self, k: int) -> Matryoshka:
        return replace(self, inner=self.inner.with_k(k))

    def check(self, d_sae: int) -> None:
        self.inner.check(d_sae)
        if self.groups and sum(self.groups) != d_sae:
            raise ValueError(f"Matryoshka has groups that sum to {sum(self.groups)}, expected d_sae = {d_sae}")
        if self.sampled is not None and self.shortest > d_sae:
            raise ValueError(f"Matryoshka has shortest = {self.shortest}, expected at most d_sae = {d_sae}; lower it")

    def new_buffers(self) -> dict[str, Tensor]:
        drawn = {} if self.groups else {"batches": torch.zeros((), dtype=torch.int64, device="cpu")}
        return self.inner.new_buffers() | drawn

    def select(
        self,
        x: Tensor,
        W: Tensor,
        b: Tensor,
        rule_state: RuleState,
        training: bool,
        options: EncodeOptions,
        capacity: int | None = None,
    ) -> Selected:
        return self.inner.select(x, W, b, rule_state, training, options, capacity)

    def apart(self, rule_state: RuleState, training: bool) -> bool:
        return self.inner.apart(rule_state, training)

    def ends(self, d_sae: int, rule_state: RuleState, device: torch.device) -> Tensor:
        """Where each prefix ends: int64 (count,), ascending, the last d_sae."""
        if self.sampled is None:
            return _placed(accumulate(self.groups), device)
        draws = torch.arange(self.sampled - 1, dtype=torch.int64, device=device) + rule_state["batches"] * self.sampled
        uniform = reference.mixed(draws, self.seed).double() / 2**32
        lengths = (self.shortest * (d_sae / self.shortest) ** uniform).long().clamp(max=d_sae).sort().values
        return torch.cat([lengths, _placed([d_sae], device)])

    def parts(self, codes: SparseCodes, rule_state: RuleState) -> list[tuple[SparseCodes, float]]:
        part = torch.searchsorted(
            self.ends(codes.d_sae, rule_state, codes.acts.device), codes.indices.long(), right=True
        )
        return [(codes.keep(part == g), weight) for g, weight in enumerate(self.each_weight)]

    def measure(self, codes: SparseCodes) -> Tensor | None:
        return self.inner.measure(codes)

    @torch.no_grad()
    def observe(self, measured: Tensor | None, rule_state: RuleState, made: Tensor) -> None:
        self.inner.observe(measured, rule_state, made)
        if self.sampled is not None:
            rule_state["batches"].add_(made)

    def dense(self, pre: Tensor, rows: RuleState, rule_state: RuleState, training: bool) -> Tensor:
        return self.inner.dense(pre, rows, rule_state, training)

    def dense_parts(self, A: Tensor, rule_state: RuleState) -> list[tuple[Tensor, float]]:
        latents = torch.arange(A.shape[-1], dtype=torch.int64, device=A.device)
        part = torch.searchsorted(self.ends(A.shape[-1], rule_state, A.device), latents, right=True)
        return [(torch.where(part == g, A, 0), weight) for g, weight in enumerate(self.each_weight)]


@dataclass(frozen=True)
class HierarchicalTopK(Activation):
    """One SAE for many k: the ks[j] strongest latents of a token must reconstruct, for every j, with weights[j].

    The code is that of TopK(ks[-1]), and any smaller k can be chosen afterwards.
    Source: Balagansky et al. 2025 (arXiv 2505.24473), eq. 4; multi-TopK of Gao et al. 2024 (arXiv 2406.04093), A.2.
    """

    ks: tuple[int, ...]
    """The numbers of latents that must reconstruct, ascending."""
    weights: tuple[float, ...] | None = None
    """Weight of each reconstruction's error. Left out: all equal, with sum 1."""
    kind: ClassVar[str] = "hierarchical_topk"

    def __post_init__(self) -> None:
        for name in ("ks", "weights"):  # lists are accepted too
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for k in self.ks:
            whole_number("HierarchicalTopK", "ks", k)
        if not self.ks or any(a >= b for a, b in pairwise(self.ks)):
            raise ValueError(f"HierarchicalTopK has ks = {self.ks}, expected at least one, ascending")
        _check_weights("HierarchicalTopK", self.weights, len(self.ks))

    @property
    def each_weight(self) -> tuple[float, ...]:
        """The weight of every reconstruction: equal ones with sum 1 where none are given."""
        return self.weights or (1 / len(self.ks),) * len(self.ks)

    @property
    def screen_k(self) -> int:
        return self.ks[-1]

    def check(self, d_sae: int) -> None:
        fits("HierarchicalTopK", "ks", self.ks[-1], d_sae)

    def select(
        self,
        x: Tensor,
        W: Tensor,
        b: Tensor,
        rule_state: RuleState,
        training: bool,
        options: EncodeOptions,
        capacity: int | None = None,
    ) -> Selected:
        return Selected(select_topk(x, W, b, self.ks[-1], options))

    def parts(self, codes: SparseCodes, rule_state: RuleState) -> list[tuple[SparseCodes, float]]:
        order = codes.rank_order()
        ranks = torch.arange(order.shape[-1], dtype=torch.int64, device=order.device).expand_as(order)
        return self.parts_by(torch.empty_like(order).scatter_(-1, order, ranks), codes)

    def parts_by(self, rank: Tensor, codes: SparseCodes) -> list[tuple[SparseCodes, float]]:
        """`parts`, given the place of each slot among its token's acts by size."""
        bounds = pairwise((0, *self.ks))
        return [(codes.keep((rank >= a) & (rank < b)), w) for (a, b), w in zip(bounds, self.each_weight, strict=True)]

    def dense(self, pre: Tensor, rows: RuleState, rule_state: RuleState, training: bool) -> Tensor:
        return reference.keep_top_k(pre, self.ks[-1])

    def dense_parts(self, A: Tensor, rule_state: RuleState) -> list[tuple[Tensor, float]]:
        prefixes = [torch.zeros_like(A), *(reference.keep_top_k(A, k) for k in self.ks)]
        return [(b - a, weight) for (a, b), weight in zip(pairwise(prefixes), self.each_weight, strict=True)]
