"""A rule whose acts have a sign: a latent stands for a direction and its opposite."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fastsae import ops, reference
from fastsae.codes import SparseCodes
from fastsae.model.rules.base import Activation, EncodeOptions, RuleState, Selected, fits, whole_number
from fastsae.ops.register import without_autocast


@dataclass(frozen=True)
class AbsTopK(Activation):
    """acts = x Wᵀ + b, of either sign, at its k entries of largest magnitude, 0 elsewhere. Ties go to the lower index.

    Each token is encoded twice, as x and as -x, so an encode takes twice the time of TopK's.
    Source: Zhu et al. 2025 (arXiv 2510.00404).
    """

    k: int = 32
    """Active latents per token, of either sign."""
    kind: ClassVar[str] = "abs_topk"

    def __post_init__(self) -> None:
        whole_number("AbsTopK", "k", self.k)

    @property
    def screened(self) -> bool:
        # A kept screen is of (W, b); the second encode is of (W, -b).
        return False

    def with_k(self, k: int) -> AbsTopK:
        return replace(self, k=k)

    def check(self, d_sae: int) -> None:
        fits("AbsTopK", "k", self.k, d_sae)

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
            k = self.k if options.placement is None else options.placement.local_k(self.k)
            above, below = (
                ops.encode_topk(sign * x, W, sign * b, k, precision=options.precision, backend=options.backend)
                for sign in (1, -1)
            )
            found = strongest(above, below, k)
            return found if options.placement is None else options.placement.topk(found, self.k)

        return Selected(ops.encode_by(chosen, x, W, b, pre_bias=options.pre_bias, backend=options.backend))

    def dense(self, pre: Tensor, rows: RuleState, rule_state: RuleState, training: bool) -> Tensor:
        return reference.keep_abs_top_k(pre, self.k)


def strongest(above: SparseCodes, below: SparseCodes, k: int) -> SparseCodes:
    """The k largest of two flat codes of k slots each; acts of the second get the opposite sign.

    A latent can be in both only if its act is NaN; it is then counted once.
    """
    with without_autocast(above.acts.device.type):  # on a CPU it has no float16 for cat
        acts = torch.cat([above.acts, -torch.where(below.acts.isnan(), 0, below.acts)], -1)
        indices = torch.cat([above.indices, below.indices], -1)
    size = torch.where(acts.isnan(), torch.inf, acts.detach().abs())
    # By index first, so that a stable sort by size lets ties go to the lower one; then back to the order of a code.
    order = indices.argsort(dim=-1, stable=True)
    order = order.gather(-1, size.gather(-1, order).argsort(dim=-1, descending=True, stable=True))[..., :k]
    place = torch.where(acts.gather(-1, order) == 0, above.d_sae, indices.gather(-1, order))
    order = order.gather(-1, place.argsort(dim=-1, stable=True))
    acts, indices = acts.gather(-1, order), indices.gather(-1, order)
    both = [c.redone for c in (above, below) if c.redone is not None]
    return SparseCodes(
        acts,
        torch.where(acts == 0, above.d_sae - 1, indices).int(),
        above.d_sae,
        redone=torch.stack(both).amax() if both else None,
    )
