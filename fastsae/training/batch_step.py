"""BatchTrainStep: one update of every SAE of a batch, each as if it were alone.

The rules that keep some of relu(pre) as it is (TopK, BatchTopK, GroupMax) have their gradients written out: for SAEs of
a few latents autograd costs more than the arithmetic. All others go through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsae.model import losses
from fastsae.model.parameters import normalize_rows_, project_rows_
from fastsae.model.rules import BatchTopK, GroupMax, TopK
from fastsae.training.batch import SAEBatch

OPTIMIZERS: dict[str, type[torch.optim.Adam]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


class BatchTrainStep:
    """`metrics = step(x)`: gradient, projection of a unit decoder's, Adam or AdamW, renormalization, for all at once.

    lr, betas, eps, weight_decay, optimizer ("adam", "adamw"): as torch's. Elementwise, so no SAE has an influence on
    another. schedule: multiplier of lr from the number of updates done.
    measure: also return mse, fvu, l0 and dead. closed_form: write the gradients out where the rule allows; False:
    autograd throughout.
    Raises ValueError for another optimizer, and for a weight decay of adam.
    """

    def __init__(
        self,
        batch: SAEBatch,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optimizer: str = "adam",
        schedule: Callable[[int], float] | None = None,
        measure: bool = True,
        closed_form: bool = True,
    ):
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is {optimizer!r}, a batch's step has {', '.join(OPTIMIZERS)}")
        if optimizer == "adam" and weight_decay:
            raise ValueError(f"adam has no weight_decay, got {weight_decay}; take optimizer='adamw'")
        self.batch, self.lr, self.schedule, self.step = batch, lr, schedule, 0
        self.measure = measure
        self.closed_form = closed_form and isinstance(batch.activation, (TopK, BatchTopK, GroupMax))
        self.optimizer = OPTIMIZERS[optimizer](
            batch.parameters(), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
        )

    def __call__(self, x: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
        """One update on x (N, d_in), the same for all, or (B, N, d_in).

        Returns (B,) tensors, of before the update: "loss" and its parts, and with `measure` "mse", "fvu", "l0" (mean
        active latents) and "dead" (latents), which mean what they mean in FusedTrainStep's metrics.
        """
        batch = self.batch
        if self.schedule is not None:
            self.optimizer.param_groups[0]["lr"] = self.lr * self.schedule(self.step)
        if self.closed_form and batch.training:
            with torch.no_grad():
                metrics = self._written_out(x, target)
        else:
            metrics = self._by_autograd(x, target)
        with torch.no_grad():
            W = batch.get_parameter("W_dec")
            if batch.decoder_norm == "unit":
                assert W.grad is not None
                project_rows_(W.grad, W)
            self.optimizer.step()
            if batch.decoder_norm == "unit":
                normalize_rows_(W)
        self.step += 1
        return metrics

    def _by_autograd(self, x: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        batch = self.batch
        self.optimizer.zero_grad(set_to_none=True)
        out = batch(x, target)
        out.losses["loss"].sum().backward()
        with torch.no_grad():
            goal = x.expand(len(batch), *x.shape[-2:]) if target is None else target.expand_as(out.recon)
            metrics = {name: value.detach() for name, value in out.losses.items()}
            if self.measure:
                squared = (out.recon - goal).square().sum((-2, -1))
                metrics |= self._measured(squared, _variance(goal), out.A != 0)
            return metrics

    def _measured(self, squared: Tensor, variance: Tensor, active: Tensor) -> dict[str, Tensor]:
        n = max(active.shape[-2], 1)
        l0 = active.sum((-2, -1), dtype=squared.dtype) / n
        return {"mse": squared / n, "fvu": squared / variance, "l0": l0, "dead": self.batch.dead.sum(-1)}

    def _written_out(self, x: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """What autograd would leave in .grad, for A = relu(pre) at the latents that the rule keeps.

        G = 2 (recon - target) / unit:  ∂W_dec = AᵀG,  ∂pre = (G W_decᵀ)·[A > 0],  ∂W_enc = ∂preᵀ c with c = x - b_dec,
        ∂b_enc = Σ_n ∂pre,  ∂b_dec = Σ_n G - ∂b_enc W_enc (the last term with pre_bias).
        """
        batch = self.batch
        if target is None and batch.d_out != batch.d_in:
            raise ValueError(f"d_out = {batch.d_out} is not d_in = {batch.d_in}; pass target=")
        x = batch.checked(x, batch.d_in, "x")
        goal = x if target is None else batch.checked(target, batch.d_out, "target")
        named = dict(batch.named_parameters())
        W_dec, W_dec_norms = _read(named["W_dec"], batch.decoder_norm)
        tied = "W_enc" not in named
        W_enc, W_enc_norms = (W_dec, None) if tied else _read(named["W_enc"], batch.encoder_norm)
        b_dec = named["b_dec"][:, None]
        inputs = x - b_dec if batch.pre_bias else x
        pre = torch.baddbmm(named["b_enc"][:, None], inputs, W_enc.mT)
        A = self._acts(pre)
        active = A > 0
        error = torch.baddbmm(inputs if target is None and batch.pre_bias else goal - b_dec, A, W_dec, beta=-1)
        squared = torch.linalg.vector_norm(error, dim=(-2, -1)).square()
        variance = _variance(goal) if self.measure or batch.loss == "fvu" else None
        unit: Tensor | float = max(x.shape[1], 1)
        if batch.loss == "fvu" and variance is not None:
            unit = variance[:, None, None]
        # 2 / unit scales the small results rather than the error.
        dpre = torch.bmm(error, W_dec.mT).mul_(active).mul_(2 / unit)
        dW_dec, dW_enc = torch.bmm(A.mT, error).mul_(2 / unit), torch.bmm(dpre.mT, inputs)
        db_enc, db_dec = dpre.sum(1, keepdim=True), error.sum(1, keepdim=True).mul_(2 / unit)
        if batch.pre_bias:
            db_dec.baddbmm_(db_enc, W_enc, alpha=-1)
        if tied:
            dW_dec += dW_enc
        batch.observe_(A, active)
        loss = squared / (variance if variance is not None and batch.loss == "fvu" else unit)
        metrics = {"loss": loss, batch.loss: loss}
        named["W_dec"].grad = _through_norm(dW_dec, W_dec, W_dec_norms)
        if not tied:
            named["W_enc"].grad = _through_norm(dW_enc, W_enc, W_enc_norms)
        named["b_enc"].grad, named["b_dec"].grad = db_enc[:, 0], db_dec[:, 0]
        if batch.ghost is not None:
            metrics["ghost"] = self._add_ghosts(inputs, error)
            metrics["loss"] = loss + batch.ghost_coef * metrics["ghost"]
        return metrics if variance is None or not self.measure else metrics | self._measured(squared, variance, active)

    def _acts(self, pre: Tensor) -> Tensor:
        rule = self.batch.rule
        if rule == TopK(1):  # one pass; the first of equal ones, as the stable sort has it
            values, latents = pre.max(-1, keepdim=True)
            return torch.zeros_like(pre).scatter_(-1, latents, values.relu_())
        if isinstance(rule, TopK) and pre.device.type == "cpu":
            acts = torch.relu(pre)
            kept = acts >= acts.topk(rule.k).values[..., -1:].clamp_min(torch.finfo(acts.dtype).tiny)
            if bool((kept.sum(-1) <= rule.k).all()):  # else equal ones, among which the stable sort decides
                return acts.mul_(kept)
        return rule.dense(
            pre, {}, {name: getattr(self.batch, name) for name in self.batch.activation.new_buffers()}, True
        )

    def _add_ghosts(self, inputs: Tensor, error: Tensor) -> Tensor:
        """The ghosts' loss (B,); adds its gradients: -ghost_coef·σ(-⟨u, W_enc_i⟩)·u in dead rows, w in W_dec's."""
        batch = self.batch
        dead = batch.dead
        if dead.device.type == "cpu" and not bool(dead.any()):
            return error.new_zeros(len(batch))
        total = error.new_zeros(len(batch))
        u, w = losses.error_weighted_means(inputs, -error)
        named = dict(batch.named_parameters())
        for p, direction in ((named.get("W_enc", named["W_dec"]), u), (named["W_dec"], w)):
            along = torch.bmm(p, direction[..., None])[..., 0]
            total += torch.where(dead, torch.nn.functional.softplus(-along), 0).sum(-1)
            slope = torch.where(dead, torch.sigmoid(-along), 0) * -batch.ghost_coef
            assert p.grad is not None
            p.grad.addcmul_(slope[..., None], direction[:, None])
        return total

    def state_dict(self) -> dict[str, Any]:
        """{"step", "optimizer"}: with the batch's own state, all that training goes on from."""
        return {"step": self.step, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned."""
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])


def _variance(target: Tensor) -> Tensor:
    """Σ_n ‖target_n - mean‖², (B,)."""
    return (target - target.mean(-2, keepdim=True)).square().sum((-2, -1))


def _read(W: Tensor, norm: str) -> tuple[Tensor, Tensor | None]:
    """The rows as the forward pass reads them, and the norms they were divided by."""
    if norm != "forward":
        return W, None
    norms = torch.linalg.vector_norm(W, dim=-1, keepdim=True).clamp_min(1e-12)  # as F.normalize's
    return W / norms, norms


def _through_norm(grad: Tensor, unit: Tensor, norms: Tensor | None) -> Tensor:
    """The gradient in W of a function of unit = W / ‖W‖: (g - ⟨g, unit⟩ unit) / ‖W‖."""
    if norms is None:
        return grad
    return grad.addcmul_(unit, torch.linalg.vecdot(grad, unit)[..., None], value=-1).div_(norms)
