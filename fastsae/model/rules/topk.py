"""Rules that fix how many latents are active: per token, per batch, one per group."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastsae import ops, reference
from fastsae.codes import SparseCodes
from fastsae.model.rules.base import (
    Activation,
    EncodeOptions,
    RuleState,
    Selected,
    fits,
    number,
    select_above,
    select_topk,
    whole_number,
)
from fastsae.ops.encode import encode_topk_weighted
from fastsae.ops.register import without_autocast


@dataclass(frozen=True)
class TopK(Activation):
    """acts = relu(x Wᵀ + b) at its k largest entries, 0 elsewhere. Ties go to the lower index.

    weighted: at the k entries where relu(x Wᵀ + b) · ‖W_dec‖ is largest, the size of each one's contribution to the
    reconstruction. The acts themselves are not scaled, so it makes no difference with a unit-norm decoder. The
    selection has no gradient.
    Source: Makhzani & Frey 2013 (arXiv 1312.5663); Gao et al. 2024 (arXiv 2406.04093), eq. 3.
    """

    k: int = 32
    """Active latents per token."""
    weighted: bool = False
    """Whether latents compete by act times the norm of their decoder's row."""
    kind: ClassVar[str] = "topk"

    def __post_init__(self) -> None:
        whole_number("TopK", "k", self.k)

    @property
    def screen_k(self) -> int:
        return self.k

    @property
    def selects_by_norm(self) -> bool:
        return self.weighted

    def with_k(self, k: int) -> TopK:
        return replace(self, k=k)

    def check(self, d_sae: int) -> None:
        fits("TopK", "k", self.k, d_sae)

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
        if not self.weighted:
            return Selected(select_topk(x, W, b, self.k, options))
        placement, k = options.placement, self.k
        if placement is None:
            return Selected(encode_topk_weighted(x, W, b, k, rule_state["norms"], **options.arguments()))
        most, merge = placement.local_k(k), partial(placement.topk, k=k)
        return Selected(encode_topk_weighted(x, W, b, most, rule_state["norms"], merge=merge, **options.arguments()))

    def dense(self, pre: Tensor, rows: RuleState, rule_state: RuleState, training: bool) -> Tensor:
        if not self.weighted:
            return reference.keep_top_k(pre, self.k)
        # Written with zeros, so that NaN, which is kept, stays.
        kept = reference.keep_top_k(pre.detach() * rule_state["norms"].unsqueeze(-2).to(pre.dtype), self.k) != 0
        return torch.where(kept, pre, 0)


@dataclass(frozen=True)
class BatchTopK(Activation):
    """In training relu(x Wᵀ + b) at the N·k largest entries of the batch; at inference where it is above `threshold`.

    The threshold t is a running mean of each batch's smallest act, whose weights decay by `decay` per batch and are
    divided by their sum: w = decay·w + 1 - decay, t += (1 - decay)/w · (min - t), from w = 0. So it starts as the first
    batch's smallest act and lags by some 1/(1 - decay) batches at most; the smallest act needs a few hundred to halve.
    Both are float32 and saved with the module (`threshold`, `threshold_weight`). Before any training t is -1, and
    inference selects by batch. `sae.calibrate_threshold_(x)` sets t from rows, as a run does at its end.
    Under DistributedDataParallel each process selects among its own tokens, and every process updates t with the mean
    of the processes' smallest acts.
    Source: Bussmann, Leask & Nanda 2024 (arXiv 2412.06410), eq. 4 and 5; the division: Kingma & Ba 2015, section 3.
    """

    k: int = 32
    """Active latents per token, on average over a batch."""
    decay: float = 0.9
    """Decay of the running threshold for inference, per update: its mean is over some 1 / (1 - decay) batches."""
    kind: ClassVar[str] = "batch_topk"

    def __post_init__(self) -> None:
        whole_number("BatchTopK", "k", self.k)
        number("BatchTopK", "decay", self.decay)
        if self.decay >= 1:
            raise ValueError(f"BatchTopK has decay = {self.decay}, expected less than 1; at 1 it would never change")

    @property
    def screen_k(self) -> int:
        return self.k

    def with_k(self, k: int) -> BatchTopK:
        return replace(self, k=k)

    def check(self, d_sae: int) -> None:
        fits("BatchTopK", "k", self.k, d_sae)

    def new_buffers(self) -> dict[str, Tensor]:
        start = {"threshold": -1.0, "threshold_weight": 0.0}
        return {name: torch.tensor(value, dtype=torch.float32, device="cpu") for name, value in start.items()}

    def apart(self, rule_state: RuleState, training: bool) -> bool:
        return not training and float(rule_state["threshold"]) >= 0  # under torch.compile a graph break

    @property
    def mean_k(self) -> int:
        return self.k

    @property
    def asked_l0(self) -> float:
        return float(self.k)

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
        if not self.apart(rule_state, training):
            placement, k = options.placement, self.k
            if placement is None:
                return Selected(ops.encode_batch_topk(x, W, b, k, **options.arguments()))
            most, own = placement.batch_k(k, x.shape[0]), {**options.arguments(), "pre_bias": None}

            def chosen(x: Tensor, W: Tensor, b: Tensor) -> SparseCodes:
                return placement.batch_topk(ops.encode_batch_topk(x, W, b, most, **own), k)

            return Selected(ops.encode_by(chosen, x, W, b, pre_bias=options.pre_bias, backend=options.backend))
        return select_above(x, W, b, rule_state["threshold"], options, capacity)

    @torch.no_grad()
    def measure(self, codes: SparseCodes) -> Tensor:
        """The smallest act."""
        acts = torch.where(codes.occupied() & (codes.acts > 0), codes.acts, torch.inf).float()
        return acts.amin() if acts.numel() else acts.new_full((), torch.inf)

    @torch.no_grad()
    def observe(self, measured: Tensor | None, rule_state: RuleState, made: Tensor) -> None:
        """Moves the running threshold by the smallest act of a batch."""
        assert measured is not None
        threshold, weight = rule_state["threshold"], rule_state["threshold_weight"]
        some = made & torch.isfinite(measured)
        heavier = self.decay * weight + (1 - self.decay)
        # The first share is exactly 1, so the first mean is exactly the first batch's value.
        share = torch.where(weight == 0, 1.0, (1 - self.decay) / heavier)
        threshold.copy_(torch.where(some, torch.lerp(threshold, measured, share), threshold))
        weight.copy_(torch.where(some, heavier, weight))

    def dense(self, pre: Tensor, rows: RuleState, rule_state: RuleState, training: bool) -> Tensor:
        threshold = rule_state.get("threshold")
        if training or threshold is None or bool((threshold < 0).any()):
            return reference.batch_top_k(pre, self.k)
        return torch.where(reference.is_above(pre, threshold[..., None, None].to(pre.dtype)), pre, 0)


@dataclass(frozen=True)
class GroupMax(Activation):
    """acts = relu(x Wᵀ + b) at the largest entry of each of k equal groups of consecutive latents.

    Ties go to the lower index. Source: the "groupmax" activation of EleutherAI's sparsify.
    """

    k: int = 32
    """Number of groups; one latent of each is active."""
    kind: ClassVar[str] = "group_max"

    def __post_init__(self) -> None:
        whole_number("GroupMax", "k", self.k)

    @property
    def screened(self) -> bool:
        return False

    def check(self, d_sae: int) -> None:
        fits("GroupMax", "k", self.k, d_sae)
        if d_sae % self.k:
            raise ValueError(f"GroupMax has k = {self.k} groups, expected a divisor of d_sae = {d_sae}")

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
        def chosen(x: Tensor, W: Tensor, b: Tensor) -> SparseCodes:
            # Each group is encoded as a separate shard of the dictionary, with its own low-precision copy.
            size = (W.shape[0] if options.placement is None else options.placement.d_sae) // self.k
            own: dict[str, Any] = {"precision": options.precision, "backend": options.backend}
            found = [
                ops.encode_topk(x, rows, bias, 1, index_offset=i * size, **own)
                for i, (rows, bias) in enumerate(zip(W.split(size), b.split(size), strict=True))
            ]
            with without_autocast(x.device.type):  # on a CPU it has no float16 for cat
                acts, indices = torch.cat([c.acts for c in found], -1), torch.cat([c.indices for c in found], -1)
            indices = torch.where(acts != 0, indices, W.shape[0] - 1)
            order = (acts == 0).int().argsort(dim=-1, stable=True)  # empty slots last
            redone = [c.redone for c in found if c.redone is not None]
            return SparseCodes(
                acts.gather(-1, order),
                indices.gather(-1, order).int(),
                W.shape[0],
                redone=torch.stack(redone).amax() if redone else None,
            )

        return Selected(ops.encode_by(chosen, x, W, b, pre_bias=options.pre_bias, backend=options.backend))

    def dense(self, pre: Tensor, rows: RuleState, rule_state: RuleState, training: bool) -> Tensor:
        return reference.keep_group_max(pre, self.k)
