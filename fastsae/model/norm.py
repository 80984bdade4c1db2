"""Input normalization: it maps x to the SAE's input, and the reconstruction back."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsae.reference import wide

MODES = ("none", "constant", "layer_norm", "standardize")
PER_TOKEN = ("layer_norm", "standardize")
_EPS = 1e-5  # as torch.nn.LayerNorm


class TokenStats(NamedTuple):
    """x_normalized = (x - shift) / scale, and x = x_normalized · back + shift; all broadcast against (*batch, D).

    back: None where it is the scale.
    """

    shift: Tensor | None
    scale: Tensor
    back: Tensor | None = None

    @property
    def unit(self) -> Tensor:
        """The change in x that a change of 1 in x_normalized makes."""
        return self.scale if self.back is None else self.back


class InputNorm(nn.Module):
    """x_normalized = (x - shift) / scale.

    none: x itself. constant: shift 0 and one scale for the whole data set, such that the mean of ‖x_normalized‖² is D;
    `calibrate_` estimates it, the buffer `scale` keeps it. layer_norm: mean and sqrt(variance + 1e-5) of each token.
    standardize: mean and s + 1e-5 of each token, s with D - 1 in its denominator; undone by s alone.
    A transcoder's target is normalized by the input's statistics: its own are not known at inference.
    Source of the constant form: Anthropic, "Scaling Monosemanticity" (2024), methods; of standardize: Gao et al. 2024
    (arXiv 2406.04093) as released, and "layer_norm" in SAELens.
    """

    scale: Tensor

    def __init__(self, mode: str, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"normalize is {mode!r}, expected one of {', '.join(MODES)}")
        self.mode = mode
        # A host flag, so that reading it does not sync.
        self.calibrated = mode != "constant"
        if mode == "constant":
            self.register_buffer("scale", torch.full((), math.nan, dtype=dtype, device=device))

    @torch.no_grad()
    def calibrate_(self, x: Tensor) -> None:
        """Sets the constant scale from a sample x (n, D): sqrt(mean ‖x‖² / D).

        Raises ValueError when that is zero or not finite. Does nothing in the other modes. Syncs.
        """
        if self.mode != "constant":
            return
        scale = float(x.double().square().mean().sqrt())
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(
                f"the sample of shape {tuple(x.shape)} has a root mean square of {scale}, expected a positive number; "
                "calibrate on finite activations"
            )
        self.scale.fill_(scale)
        self.calibrated = True

    def statistics(self, x: Tensor) -> TokenStats | None:
        """The shift and scale of x (*batch, D); None in mode none.

        Raises RuntimeError if the constant scale was never set.
        """
        if self.mode == "none":
            return None
        if self.mode == "standardize":
            spread, mean = torch.std_mean(wide(x), dim=-1, correction=1, keepdim=True)
            # As below, for a spread that overflows; one channel has none, and is NaN too.
            spread = torch.where(spread < torch.inf, spread, torch.nan)
            return TokenStats(mean.to(x.dtype), (spread + _EPS).to(x.dtype), spread.to(x.dtype))
        if self.mode == "layer_norm":
            # In float16 the variance of activations of a few hundred overflows.
            variance, mean = torch.var_mean(wide(x), dim=-1, correction=0, keepdim=True)
            # One that overflows in float32 too makes the token NaN; divided by infinity, it would be 0.
            scale = torch.where(variance < torch.inf, variance + _EPS, torch.nan).sqrt()
            return TokenStats(mean.to(x.dtype), scale.to(x.dtype))
        if not self.calibrated:
            raise RuntimeError("normalize='constant' has no scale yet: call sae.calibrate_(x) once on sample inputs")
        return TokenStats(None, self.scale)

    @staticmethod
    def normalize(x: Tensor, stats: TokenStats | None) -> Tensor:
        """(x - shift) / scale."""
        if stats is None:
            return x
        return (x if stats.shift is None else x - stats.shift) / stats.scale

    @staticmethod
    def restore(x: Tensor, stats: TokenStats | None) -> Tensor:
        """x · back + shift."""
        if stats is None:
            return x
        return x * stats.unit if stats.shift is None else x * stats.unit + stats.shift

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.mode == "constant" and prefix + "scale" in state_dict:
            self.calibrated = bool(torch.isfinite(state_dict[prefix + "scale"]).all())

    def extra_repr(self) -> str:
        return self.mode
