"""What a fused step's optimizer keeps: moments of the parameters in three formats, and the step of the small ones.

The dictionaries and biases are updated by `update_latents_`. The rule's own parameters and W_skip are small or few:
their gradient is at hand, and torch's elementwise ops take the step, the same formulas as everywhere.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastsae.model.sae import SparseAutoencoder
from fastsae.reference import Optimizer, scales_shape

MOMENTS = ("fp32", "bf16", "8bit")


class OptimizerState:
    """Zeros at the start. `tensors`: all of it by name, live: "W_enc_m", "W_enc_m_scale", "log_threshold_v", ...

    Raises ValueError for a format of moments that does not exist or does not go with the optimizer.
    """

    def __init__(self, sae: SparseAutoencoder, optimizer: Optimizer, moments: str):
        if moments not in MOMENTS:
            raise ValueError(f"moments is {moments!r}, expected one of {', '.join(MOMENTS)}")
        if moments == "8bit" and optimizer.kind not in ("adam", "adamw"):
            raise ValueError(f"moments='8bit' goes with adam and adamw, got {optimizer.kind!r}; use 'fp32' or 'bf16'")
        self.sae, self.optimizer, self.moments = sae, optimizer, moments
        self.tensors: dict[str, Tensor] = {}
        for name, p in self.main().items():
            for moment in optimizer.moments:
                self._add(f"{name}_{moment}", p, moments)
        for name, p in self.others().items():
            for moment in optimizer.moments:
                self._add(f"{name}_{moment}", p, "fp32")

    def main(self) -> dict[str, torch.nn.Parameter]:
        """What `update_latents_` updates, in its order."""
        names = ("W_enc", "W_dec", "b_enc", "b_dec")
        return {name: getattr(self.sae, name) for name in names if getattr(self.sae, name) is not None}

    def others(self) -> dict[str, torch.nn.Parameter]:
        """What `step_others` updates."""
        skip = {} if self.sae.W_skip is None else {"W_skip": self.sae.W_skip}
        return {**self.sae.rule_parameters, **skip}

    def _add(self, name: str, p: Tensor, moments: str) -> None:
        dtype = torch.promote_types(p.dtype, torch.float32)
        if moments == "bf16":
            dtype = torch.bfloat16
        elif moments == "8bit" and p.ndim == 2:
            dtype = torch.float8_e4m3fn
            self.tensors[f"{name}_scale"] = torch.zeros(scales_shape(p), device=p.device)
        self.tensors[name] = torch.zeros(p.shape, dtype=dtype, device=p.device)

    def arguments(self) -> dict[str, Any]:
        """What `update_latents_` takes of it: moments and scales in the order of its parameters."""
        names = [f"{name}_{moment}" for name in self.main() for moment in self.optimizer.moments]
        rule = self.optimizer
        return {
            "moments": [self.tensors[name] for name in names],
            "scales": [self.tensors[f"{name}_scale"] for name in names if f"{name}_scale" in self.tensors],
            "optimizer": rule.kind,
            "betas": rule.betas,
            "eps": rule.eps,
            "weight_decay": rule.weight_decay,
        }

    def step_others(self, grads: dict[str, Tensor], lr: Tensor, step: Tensor) -> None:
        """One step of the rule's parameters, which do not decay (a threshold of 1 is no resting place), and W_skip."""
        without_decay = replace(self.optimizer, weight_decay=0.0)
        for name, p in self.others().items():
            optimizer = self.optimizer if name == "W_skip" else without_decay
            held = [self.tensors[f"{name}_{moment}"] for moment in self.optimizer.moments]
            grad = grads[name].to(torch.promote_types(p.dtype, torch.float32))
            wide = tuple(m.to(grad.dtype) for m in held)
            stepped, fresh = optimizer.stepped(p.detach().to(grad.dtype), grad, wide, lr, step)
            p.copy_(stepped)
            for old, new in zip(held, fresh, strict=True):
                old.copy_(new)

    def forget_rows(self, latents: Tensor) -> None:
        """Zeros of all that is kept for these latents (int64)."""
        per_latent = ("W_enc", "W_dec", "b_enc", *self.sae.rule_parameters)
        for name, t in self.tensors.items():
            if name.rsplit("_scale", 1)[0].rsplit("_", 1)[0] in per_latent:
                # 8-bit floats know no indexed writes; their bits do.
                (t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t)[latents] = 0

    def check_place(self) -> None:
        """Raises RuntimeError where the module was moved or cast after this was made."""
        for name, p in {**self.main(), **self.others()}.items():
            for moment in self.optimizer.moments:
                m = self.tensors[f"{name}_{moment}"]
                small = m.dtype in (torch.bfloat16, torch.float8_e4m3fn)
                wanted = m.dtype if small else torch.promote_types(p.dtype, torch.float32)
                if (p.device, p.shape, wanted) != (m.device, m.shape, m.dtype):
                    raise RuntimeError(
                        f"{name} is {p.dtype} {tuple(p.shape)} on {p.device}, but this step's moments are {m.dtype} "
                        f"{tuple(m.shape)} on {m.device}: make a new FusedTrainStep after moving the module, and load "
                        "its state"
                    )

    def load(self, saved: dict[str, Tensor]) -> None:
        """Copies saved tensors into these. Raises ValueError, and changes nothing, where they do not fit."""
        if set(saved) != set(self.tensors):
            raise ValueError(f"the state holds {sorted(saved)}, expected {sorted(self.tensors)}")
        for name, mine in self.tensors.items():
            theirs = saved[name]
            if theirs.shape != mine.shape or theirs.dtype != mine.dtype:
                raise ValueError(
                    f"{name} is {theirs.dtype} {tuple(theirs.shape)}, expected {mine.dtype} {tuple(mine.shape)}"
                )
        for name, mine in self.tensors.items():
            mine.copy_(saved[name])
