"""One training step the ordinary way: autograd through the module, projection, `torch.optim.Adam`, renormalization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsae.model import losses
from fastsae.model.sae import SparseAutoencoder
from fastsae.ops import checks as validation

OPTIMIZERS: dict[str, type[torch.optim.Adam]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


class PlainTrainStep:
    """g = ∇loss(sae(x));  project g;  Adam;  renormalize: what `FusedTrainStep` does in one call, in many.

    Slower, any backend, and readable: the curve that the fused step is held against, and the way to train a module
    that the fused step does not know. Same call, same metrics, same kind of state.

    lr: peak learning rate; schedule: step -> multiplier, with step counting the updates done before; optimizer: "adam"
    or "adamw"; clip_norm, penalty_schedule, k_schedule: as FusedTrainStep's. Raises ValueError for another optimizer.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        schedule: Callable[[int], float] | None = None,
        optimizer: str = "adam",
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        penalty_schedule: Callable[[int], float] | None = None,
        k_schedule: Callable[[int], int] | None = None,
    ):
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is {optimizer!r}, a plain step has {', '.join(OPTIMIZERS)}; use a fused step")
        validation.optimizer(optimizer, betas, eps, weight_decay)
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm is {clip_norm}, expected a number above 0, or None")
        self.sae, self.lr, self.schedule = sae, lr, schedule
        self.clip_norm, self.penalty_schedule, self.k_schedule = clip_norm, penalty_schedule, k_schedule
        self.step = 0
        # A rule's own parameters do not decay: a threshold of 1 is no resting place.
        rule_state = list(sae.rule_parameters.values())
        others = [p for name, p in sae.named_parameters() if name not in sae.rule_parameters]
        groups: list[dict[str, Any]] = [
            {"params": others},
            *([{"params": rule_state, "weight_decay": 0.0}] if rule_state else []),
        ]
        self.optimizer = OPTIMIZERS[optimizer](groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """One update on x (*batch, d_in). Returns 0-d tensors as `FusedTrainStep` does; reads nothing back."""
        sae = self.sae
        lr = self.lr * (1.0 if self.schedule is None else self.schedule(self.step))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        was_training = sae.training
        sae.train()
        try:
            if self.penalty_schedule is not None:
                sae.penalty_scale.fill_(self.penalty_schedule(self.step))
            sae.annealed_k = None if self.k_schedule is None else self.k_schedule(self.step)
            out = sae(x)
            out.loss.backward()
        finally:
            sae.train(was_training)
            sae.annealed_k = None
            sae.penalty_scale.fill_(1.0)
        with torch.no_grad():
            ready = sae.inputs(x)
            goal, stats = ready.target, ready.stats
            recon = sae.norm.normalize(out.recon.reshape(-1, sae.d_out), stats)
            norms = [torch.linalg.vector_norm(p.grad.double()) for p in sae.parameters() if p.grad is not None]
            metrics = {
                "loss": out.loss.detach(),
                **{name: value.detach() for name, value in out.losses.items()},
                "mse": losses.mse(recon, goal),
                "fvu": losses.fvu(recon, goal),
                "l0": out.codes.l0.double().mean(),
                "grad_norm": torch.linalg.vector_norm(torch.stack(norms)),
                "lr": torch.tensor(lr, dtype=torch.float64),
            }
            if out.codes.redone is not None:
                metrics["redone"] = out.codes.redone
        sae.project_gradients_()
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(sae.parameters(), self.clip_norm)
        self.optimizer.step()
        sae.normalize_decoder_()
        self.step += 1
        metrics["dead"] = sae.dead.sum()
        return metrics

    @torch.no_grad()
    def forget_rows_(self, latents: Tensor) -> None:
        """Sets the optimizer's moments of these latents (int64) to zero, as resampling wants."""
        for name, p in self.sae.named_parameters():
            if name in ("b_dec", "W_skip"):
                continue
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment in self.optimizer.state.get(p, {}):
                    self.optimizer.state[p][moment][latents] = 0

    def state_dict(self) -> dict[str, Any]:
        """{"step", "adam": {parameter's name: {"step", "exp_avg", "exp_avg_sq"}}}: tensors and numbers."""
        adam = {}
        for name, parameter in self.sae.named_parameters():
            if parameter in self.optimizer.state:
                adam[name] = dict(self.optimizer.state[parameter])
        return {"step": self.step, "adam": adam}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned. Raises KeyError or ValueError where it belongs to another module."""
        parameters = dict(self.sae.named_parameters())
        if state["step"] and set(state["adam"]) != set(parameters):
            raise ValueError(f"got optimizer state for {sorted(state['adam'])}, expected it for {sorted(parameters)}")
        for name, moments in state["adam"].items():
            parameter = parameters[name]
            got, expected = tuple(moments["exp_avg"].shape), tuple(parameter.shape)
            if got != expected:
                raise ValueError(f"the moments of {name} have shape {got}, expected {expected}")
            self.optimizer.state[parameter] = {
                # Adam keeps its step counter on the CPU, and its moments with the parameter. Copies: it writes them.
                key: (value if key == "step" else value.to(parameter.device)).clone()
                for key, value in moments.items()
            }
        self.step = state["step"]
