"""One training step the ordinary way: autograd through the module, projection, `torch.optim.Adam`, renormalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import losses
from .sae import SparseAutoencoder


class PlainTrainStep:
    """g = ∇loss(sae(x));  project g;  Adam;  renormalise: what `FusedTrainStep` does in one call, in many.

    Slower, any backend, and readable: the curve that the fused step is held against, and the way to train a module
    that the fused step does not know. Same call, same metrics, same kind of state.

    lr: peak learning rate; schedule: step -> multiplier, with step counting the updates done before.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        schedule: Callable[[int], float] | None = None,
    ):
        self.sae, self.lr, self.schedule = sae, lr, schedule
        self.step = 0
        self.optimizer = torch.optim.Adam(sae.parameters(), lr=lr, betas=betas, eps=eps)

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """One update on x (*batch, d_in). Returns 0-d tensors as `FusedTrainStep` does; reads nothing back."""
        sae = self.sae
        lr = self.lr * (1.0 if self.schedule is None else self.schedule(self.step))
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        out = sae(x)
        out.loss.backward()
        with torch.no_grad():
            _, goal, stats = sae.inputs(x)
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
        self.optimizer.step()
        sae.normalize_decoder_()
        self.step += 1
        metrics["dead"] = sae.dead.sum()
        return metrics

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
                # Adam keeps its step counter on the CPU, and its moments with the parameter.
                key: value if key == "step" else value.to(parameter.device)
                for key, value in moments.items()
            }
        self.step = state["step"]
