"""What a converter reads from a checkpoint, in fastsae's layout, and the SAE built from it; and the reverse."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastsae.model.files import SavedModuleError
from fastsae.model.parameters import EXTRA_STATE
from fastsae.model.rules import Activation, BatchTopK, JumpReLU, Matryoshka, ReLU
from fastsae.model.sae import SparseAutoencoder

UNIT = {torch.float16: 1e-2, torch.bfloat16: 2e-2}
"""How far from 1 the norm of a row may be to count as 1; 1e-4 for wider types."""


@dataclass
class Parts:
    """One SAE: W_enc (M, d_in), W_dec (M, d_out), b_enc (M,), b_dec (d_out,), W_skip (d_out, d_in) or None.

    rule_state: the rule's parameters and buffers by name. settings: of SparseAutoencoder, where not its default.
    """

    rule: Activation
    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    pre_bias: bool
    W_skip: Tensor | None = None
    rule_state: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def rescale(self, encoder: Tensor | float, decoder: Tensor | float) -> None:
        """Multiplies each latent's pre-act by `encoder` and its decoder's row by `decoder`: (M,) or a number.

        In float64, rounded once.
        """
        self.W_enc = _times(self.W_enc, encoder if isinstance(encoder, float) else encoder[:, None])
        self.b_enc = _times(self.b_enc, encoder)
        self.W_dec = _times(self.W_dec, decoder if isinstance(decoder, float) else decoder[:, None])

    def fold_norms(self) -> Tensor:
        """Acts become act · ‖W_dec‖ and rows get norm 1; the reconstruction stays. Returns the norms (M,) float64.

        A row of 0 stays one: its latent is then never active, and adds nothing either way.
        """
        norms = self.norms()
        self.rescale(norms, torch.where(norms > 0, 1 / norms, 0.0))
        return norms

    def norms(self) -> Tensor:
        """‖W_dec‖: (M,) float64."""
        return torch.linalg.vector_norm(self.W_dec.double(), dim=1)

    def fold_input_scale(self, of_input: float, of_output: float) -> None:
        """Makes an SAE that was trained on x · of_input and target · of_output one of x and of target.

        Acts stay: W_enc · of_input reads x, W_dec / of_output and b_dec / of_output give the target.
        """
        self.W_enc = _times(self.W_enc, of_input)
        self.W_dec, self.b_dec = _times(self.W_dec, 1 / of_output), _times(self.b_dec, 1 / of_output)
        if self.W_skip is not None:
            self.W_skip = _times(self.W_skip, of_input / of_output)

    def build(self, device: torch.device | str | None) -> SparseAutoencoder:
        """The SAE, in eval mode. Raises ValueError for settings that do not fit."""
        device = device or "cpu"
        weights = [t for t in (self.W_enc, self.W_dec, self.b_enc, self.b_dec, self.W_skip) if t is not None]
        dtype = weights[0].dtype
        for t in weights[1:]:
            dtype = torch.promote_types(dtype, t.dtype)  # wider, so nothing is rounded
        d_sae, d_out = self.W_dec.shape
        unit = bool(((self.norms() - 1).abs() <= UNIT.get(self.W_dec.dtype, 1e-4)).all())
        settings: dict[str, Any] = {
            "d_out": d_out,
            "pre_bias": self.pre_bias,
            "decoder_norm": "unit" if unit else "free",
            "skip": self.W_skip is not None,
            "normalize": "none",
            "rule_dtype": torch.float64 if isinstance(self.rule, JumpReLU) else torch.float32,
        }
        sae = SparseAutoencoder(
            self.W_enc.shape[1], d_sae, self.rule, dtype=dtype, device="meta", **(settings | self.settings)
        )
        state = {"W_dec": self.W_dec, "b_enc": self.b_enc, "b_dec": self.b_dec, "W_skip": self.W_skip}
        if not sae.tied:
            state["W_enc"] = self.W_enc
        state["tokens_since_fired"] = torch.zeros(d_sae, dtype=torch.int64, device="cpu")
        full = sae.state_dict()
        tensors = {
            name: t.detach().to(device, full[name].dtype).contiguous()
            for name, t in (state | self.rule_state).items()
            if t is not None
        }
        memory: set[int] = set()
        for name, t in tensors.items():  # a torch file keeps what tensors share; here each is trained by itself
            if (at := t.untyped_storage().data_ptr()) in memory:
                tensors[name] = t.clone()
            memory.add(at)
        sae.load_state_dict({**tensors, EXTRA_STATE: sae.get_extra_state()}, assign=True)
        return sae.eval()


def _times(t: Tensor, factor: Tensor | float) -> Tensor:
    return (t.double() * factor).to(t.dtype)


def relu() -> ReLU:
    """ReLU as a file has it: without the penalty it was trained with."""
    return ReLU(l1=0.0)


def jump_relu(
    threshold: Tensor, d_sae: int, *, inclusive: bool = False, dtype: torch.dtype
) -> tuple[JumpReLU, dict[str, Tensor]]:
    """The rule, and its state, of relu(pre) where pre > threshold; a threshold is a number or (M,).

    inclusive: where pre >= threshold, which is above the number before it: scores of `dtype` weights are float32 at
    least. With relu, a threshold below 0 is one of 0. Kept as a logarithm in float64, whose exponential, rounded to
    float32, is the float32 threshold again.
    """
    theta = threshold.detach().expand(d_sae)
    if inclusive:
        theta = theta.to(torch.float64 if dtype == torch.float64 else torch.float32)
        theta = torch.nextafter(theta, torch.full_like(theta, -torch.inf))
    return JumpReLU(l0=0.0, threshold=1.0), {"log_threshold": theta.double().clamp_min(0.0).log()}


def running_threshold(threshold: Tensor | float) -> dict[str, Tensor]:
    """The buffers of a BatchTopK at a threshold that training has set."""
    value = torch.as_tensor(threshold, dtype=torch.float32, device="cpu")
    return {"threshold": value.reshape(()).clamp_min(0.0), "threshold_weight": torch.ones((), device="cpu")}


# -- writing ----------------------------------------------------------------------------------------------------------


def refuse(kind: str, what: str, instead: str = "") -> SavedModuleError:
    """The error for an SAE that a format cannot hold."""
    return SavedModuleError(f"the {kind} format has no {what}{'; ' + instead if instead else ''}")


def above_threshold(parts: Parts, kind: str) -> Tensor:
    """The thresholds (M,), fp32 at least, of an SAE whose acts are relu(pre) where pre > threshold; 0 for a ReLU.

    Raises SavedModuleError for a rule that is none, and for a pre-bias or a normalization, which formats of bare
    tensors do not have.
    """
    rule, held = parts.rule, parts.rule_state
    if parts.pre_bias:
        raise refuse(kind, "pre_bias=True")
    if "normalize" in parts.settings:
        raise refuse(kind, f"normalize={parts.settings['normalize']!r}")
    if isinstance(rule, JumpReLU):
        threshold = held["log_threshold"].exp()
    elif isinstance(rule, BatchTopK):
        threshold = held["threshold"].expand(len(parts.b_enc))
    elif isinstance(rule, ReLU):
        threshold = torch.zeros_like(parts.b_enc)
    else:
        raise refuse(kind, type(rule).__name__, "it has thresholds: JumpReLU, ReLU, and BatchTopK by its own")
    return threshold.to(torch.promote_types(parts.b_enc.dtype, torch.float32))


def plain_rule(sae: SparseAutoencoder) -> Activation:
    """The rule that gives the same codes at inference: for a Matryoshka, the rule that it wraps."""
    rule = sae.activation
    return rule.inner if isinstance(rule, Matryoshka) else rule


@torch.no_grad()
def parts_of(sae: SparseAutoencoder, kind: str) -> Parts:
    """The SAE's tensors, on the CPU, with normalize="constant" folded into them: acts and reconstructions stay.

    Raises SavedModuleError for a TopK that selects by decoder norm unless all norms are 1, and for a BatchTopK without
    a threshold.
    """
    rule = plain_rule(sae)
    held = {name: t.detach().cpu() for name, t in sae.rule_state.items() if name != "b_enc"}
    W_enc, W_dec, b_enc, b_dec = (t.detach().cpu() for t in (sae.encoder_weight, sae.W_dec, sae.b_enc, sae.b_dec))
    skip = None if sae.W_skip is None else sae.W_skip.detach().cpu()
    parts = Parts(rule, W_enc, W_dec, b_enc, b_dec, sae.pre_bias, skip, held)
    if rule.selects_by_norm and bool(((parts.norms() - 1).abs() > UNIT.get(sae.W_dec.dtype, 1e-4)).any()):
        raise refuse(kind, "selection by decoder norm that leaves the acts as they are")
    if isinstance(rule, BatchTopK) and float(held["threshold"]) < 0:
        raise refuse(
            kind, "BatchTopK without a threshold for inference", "call sae.calibrate_threshold_(x) on training data"
        )
    if sae.norm.mode == "constant":
        if not sae.norm.calibrated:
            raise refuse(kind, "normalize='constant' without its scale", "call sae.calibrate_(x) on training data")
        scale = float(sae.norm.scale)
        parts.fold_input_scale(1 / scale, 1 / scale)
    elif sae.norm.mode != "none":
        parts.settings["normalize"] = sae.norm.mode
    return parts
