"""FusedTrainStep: forward, loss, backward, projection, optimizer and renormalization of an SAE in one call, in place.

The same numbers as autograd + `project_gradients_` + a torch optimizer + `normalize_decoder_`, without autograd over
the dictionaries, without a stored dictionary gradient and without an (N, M) tensor. For rules that fix how many latents
are active nothing is read back from the device: the learning rate, the count of steps and every metric are 0-d tensors.
A threshold rule asks once a step how many latents were above, and goes the dense way while they are too many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastsae import ops
from fastsae.codes import Screen, UpdateTerm
from fastsae.model import losses
from fastsae.model.sae import Inputs, SparseAutoencoder
from fastsae.ops import checks as validation
from fastsae.reference import Optimizer
from fastsae.training import input_gradient, objective
from fastsae.training.dense import dense_pass, sampled_density
from fastsae.training.graph import StepGraph, check_graph
from fastsae.training.objective import Pass, Task
from fastsae.training.optimizer_state import OptimizerState
from fastsae.training.revival import revive
from fastsae.training.screen import KeptScreen

FORMAT = 2

# Steps before a CUDA graph is captured: kernels are compiled and loaded by then, which a capture would not survive.
GRAPH_WARMUP = 2

DENSE_ABOVE = 0.04
"""Share of latents active per token from which a threshold rule's step is made densely: see `FusedTrainStep`."""
SAMPLED_TOKENS = 64
"""Tokens on which a first step looks at the density."""


class FusedTrainStep:
    """`metrics = step(x)`: one update of every parameter of `sae`, and its dead-latent counters.

    lr, betas, eps   of the optimizer. `lr` is kept as a 0-d float64 tensor; change it with `step.lr.fill_(...)`.
    schedule         multiplier of lr from the 0-d count of updates done before this one, e.g. `Schedule(...)`; None: 1.
    moments          "fp32": in the weights' dtype, float32 at least. "bf16": half the memory, "8bit" (adam, adamw): a
                     quarter; both rounded stochastically as a function of (seed, step, position).
    backend          of the ops, see `fastsae.backends()`; None takes the fastest.
    check            raise ValueError for NaN in x before anything changes; a host sync on a GPU.
    cuda_graph       capture the step in a CUDA graph after two ordinary ones and replay it from then on, for as long as
                     shapes, settings and the places of the parameters stay; other shapes run without. lr is read on
                     the device, so `step.lr.fill_` and `schedule` work on; a schedule must be made of tensor ops.
    optimizer        "adam", "adamw", "lion", "signsgd", as torch's and Chen et al.'s; weight_decay of all but adam.
    clip_norm        scale all gradients, after projection, so that their norm together is at most this, as
                     torch.nn.utils.clip_grad_norm_ does. The norm takes a backward pass of its own: gradients are
                     computed twice rather than stored.
    clip_rows        the same for each latent's row of each dictionary, at no cost.
    penalty_schedule multiplier of the rule's penalty from the count, as `schedule`: a warm-up of L1, for instance.
    k_schedule       the rule's k from the count as an int, for annealing; None: the rule's own.
    dense_above      a threshold rule's step is made densely where more than this share of the latents was active in
                     the step before (or, at first, on a sample), or turns out to be; 0: always, 1: never.

    The backend's low-precision copy of the encoder (the screen) is maintained by the update, and made anew when others
    wrote the weights: see KeptScreen, and call `refresh()` after writes that it cannot see.

    Raises ValueError for bad settings and for parameters that do not require a gradient.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        schedule: Callable[[Tensor], Any] | None = None,
        moments: str = "fp32",
        seed: int = 0,
        backend: str | None = None,
        check: bool = False,
        cuda_graph: bool = False,
        *,
        optimizer: str = "adam",
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        clip_rows: float | None = None,
        penalty_schedule: Callable[[Tensor], Any] | None = None,
        k_schedule: Callable[[int], int] | None = None,
        dense_above: float = DENSE_ABOVE,
    ):
        if not lr >= 0:
            raise ValueError(f"lr {lr}: expected 0 or more")
        validation.optimizer(optimizer, betas, eps, weight_decay)
        for name, value in (("clip_norm", clip_norm), ("clip_rows", clip_rows)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}, expected a number above 0, or None")
        if not 0 <= dense_above <= 1:
            raise ValueError(f"dense_above is {dense_above}, expected a share in [0, 1]")
        frozen = [name for name, p in sae.named_parameters() if not p.requires_grad]
        if frozen:
            raise ValueError(f"{', '.join(frozen)} do not require a gradient, but a fused step updates every parameter")
        rule = Optimizer(optimizer, (float(betas[0]), float(betas[1])), float(eps), float(weight_decay))
        self._optimizer = OptimizerState(sae, rule, moments)
        self.sae = sae
        self.schedule, self.moments, self.seed, self.backend, self.check = schedule, moments, seed, backend, check
        self.clip_norm, self.clip_rows, self.dense_above = clip_norm, clip_rows, dense_above
        self.penalty_schedule, self.k_schedule = penalty_schedule, k_schedule
        if k_schedule is not None:
            sae.activation.with_k(k_schedule(0)).check(sae.d_sae)
        device = sae.W_dec.device
        if cuda_graph:
            check_graph(sae, check, k_schedule is not None)
        self.cuda_graph = cuda_graph
        self._graph: StepGraph | None = None
        self._graph_of: tuple[Any, ...] | None = None
        self._warm = 0
        self.lr = torch.tensor(lr, dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self._steps = 0  # count, on the host
        self._kept = KeptScreen(sae, backend)
        self._density: float | None = None

    @property
    def betas(self) -> tuple[float, float]:
        return self._optimizer.optimizer.betas

    @betas.setter
    def betas(self, betas: tuple[float, float]) -> None:
        self._optimizer.optimizer = replace(self._optimizer.optimizer, betas=betas)

    # -- one step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self, x: Tensor, target: Tensor | None = None, *, outer: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, Tensor]:
        """One update on x (*batch, d_in), towards target (*batch, d_out) or x itself.

        outer: a further loss of the reconstruction (*batch, d_out), in the caller's units, that is added: what follows
        in a model, for instance. Where x, a leaf, requires a gradient, that of the whole loss is added to x.grad.
        Returns 0-d tensors: loss (what was minimised), mse, fvu and the other parts of `SAEOutput.losses` (all in
        normalized units), l0 (mean active latents), redone (tokens whose selection was repeated), dead (latents),
        grad_norm (before projection), lr, outer.
        Counts are int64, and float64 where a CUDA graph gives them.
        Raises ValueError for an empty batch and what `sae.inputs` raises; nothing has changed then.
        """
        self._optimizer.check_place()
        if x.requires_grad and not x.is_leaf:
            raise ValueError("x is no leaf: pass y = x.detach().requires_grad_() and hand y.grad on")
        if self.cuda_graph and (outer is not None or x.requires_grad):
            raise ValueError("a CUDA graph captures neither outer losses nor x's gradient; pass cuda_graph=False")
        kind = x.device.type if torch.amp.is_autocast_available(x.device.type) else "cpu"
        # Under autocast the ops run in the weights' dtype; so does what torch computes around them.
        with torch.autocast(kind, enabled=False):
            return self._replayed(x, target) if self.cuda_graph else self._step(x, target, outer)

    def _replayed(self, x: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """The step by its CUDA graph, captured when nothing has changed for GRAPH_WARMUP steps."""
        settings = self._graph_settings(x, target)
        if self._graph_of != settings:
            if self._graph is not None and self._graph_of is not None and self._graph_of[1:] == settings[1:]:
                return self._step(x, target)  # another shape, the last batch of an epoch for instance
            self._graph, self._graph_of, self._warm = None, settings, 0
        if self._graph is None and self._warm < GRAPH_WARMUP:
            self._warm += 1
            return self._step(x, target)
        if self._graph is None:
            self._kept.current(self.sae.inputs(x, target).encoder_input)  # made outside, so that it can be made anew
            self._graph = self._captured(x, target)
            self._kept.remember()
        if self._kept.written():
            self.refresh()
        metrics = self._graph(x, target)
        self._steps += 1
        # A replay writes behind torch's back: whoever saved a parameter for a backward must notice.
        torch.autograd.graph.increment_version(list(self.sae.parameters()))
        self._kept.remember()
        return metrics

    def _captured(self, x: Tensor, target: Tensor | None) -> StepGraph:
        """The graph. Raises RuntimeError where it cannot be captured: nothing was computed then, and the next calls run
        without one before it is tried again.
        """
        steps = self._steps
        try:
            return StepGraph(self._step, x, target)
        except RuntimeError as error:
            self._graph_of, self._kept.redone = None, None  # what a capture leaves behind was never computed
            raise RuntimeError(f"no CUDA graph can capture this step ({error}); pass cuda_graph=False") from error
        finally:
            self._steps = steps

    def _graph_settings(self, x: Tensor, target: Tensor | None) -> tuple[Any, ...]:
        """All that a captured step holds fast: the shapes first, then the settings and the places in memory."""
        sae = self.sae
        shapes = tuple((t.shape, t.dtype, t.device) for t in (x, target) if t is not None)
        held = [*sae.parameters(), *sae.buffers(), *self._optimizer.tensors.values(), self.lr, self.count]
        return (
            shapes, sae.activation, sae.loss, sae.aux_k, sae.aux_coef, sae.dead_after, sae.precision, sae.pre_bias,
            sae.decoder_norm, sae.norm.mode, self._optimizer.optimizer, self.seed, self.backend, self.schedule,
            self.penalty_schedule, self.clip_norm, self.clip_rows, tuple(t.data_ptr() for t in held),
        )  # fmt: skip

    def _step(
        self, x: Tensor, target: Tensor | None, outer: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, Tensor]:
        sae = self.sae
        ready = sae.inputs(x, target)
        if ready.x.shape[0] == 0:
            raise ValueError(f"x has shape {tuple(x.shape)}: an empty batch cannot train; skip it")
        losses.check_tokens(sae.loss, ready.x.shape[0])
        if self.check:
            validation.no_nan("x", x)
        was_training, sae.training = sae.training, True
        try:
            if self.penalty_schedule is not None:
                sae.penalty_scale.fill_(self.penalty_schedule(self.count))
            if self.k_schedule is not None:
                sae.annealed_k = self.k_schedule(self._steps)
            return self._trained(ready, x, target is None, outer)
        finally:
            sae.training, sae.annealed_k = was_training, None
            if self.penalty_schedule is not None:
                sae.penalty_scale.fill_(1.0)

    def _trained(
        self, ready: Inputs, x: Tensor, own_target: bool, outer: Callable[[Tensor], Tensor] | None
    ) -> dict[str, Tensor]:
        sae, n = self.sae, ready.x.shape[0]
        variance = losses.total_variance(ready.target)
        over: Tensor | int = n if sae.loss == "mse" else variance
        goal = ready.target
        bias: Tensor | None = sae.b_dec.detach()
        if sae.pre_bias and own_target:
            # recon - x = A W_dec - (x - b_dec): no bias to add, and no copy of x to keep
            goal, bias = ready.encoder_input, None
        if sae.W_skip is not None:
            goal = goal - ready.x @ sae.W_skip.mT
        screen = self._kept.current(ready.encoder_input, in_place=self._graph is not None)
        how = sae.encode_options(screen=screen, backend=self.backend)
        behind = None if outer is None else input_gradient.Outer(sae, ready, outer, x)
        task = Task(sae, ready.encoder_input, goal, bias, over, how, behind)
        found = self._passed(task, x.requires_grad)
        dead = torch.where(found.counts > 0, 0, sae.tokens_since_fired + n) >= sae.dead_after
        if found.redone is not None:
            self._kept.redone = found.redone / n
        metrics = {"mse": found.squares / n, "fvu": found.squares / variance, **found.losses}
        metrics |= {"l0": found.active.double() / n, "dead": dead.sum()}
        if found.redone is not None:
            metrics["redone"] = found.redone
        loss = found.total
        auxiliary = revive(task, found, dead, metrics)
        for name, coef in (("aux", sae.aux_coef), ("ghost", sae.ghost_coef)):
            if name in metrics:
                loss = loss + coef * metrics[name]
        if behind is not None:
            metrics["outer"] = behind.value
            loss = loss + behind.value
        terms, whole = objective.close(task, found)
        terms += auxiliary
        if x.requires_grad:
            aux = sae.aux_coef * metrics.get("aux", 0.0)
            ghost = sae.ghost_coef * metrics.get("ghost", 0.0) if sae.ghost == "residual" else 0.0
            loss_over = found.total - task.slope() * found.losses.get("sparsity", 0.0) + aux + ghost
            grad = input_gradient.of_step(task, found, terms, whole, loss_over, x, own_target)
            if behind is not None and behind.dx is not None:
                grad = grad + behind.dx
        self._update(terms, found, screen, whole, ready, metrics)
        if x.requires_grad:
            x.grad = grad if x.grad is None else x.grad + grad
        sae.count_fired_(found.counts, n)
        if found.codes is not None:
            sae.rule.observe(found.codes, sae.rule_state)
        return {"loss": torch.as_tensor(loss), **metrics}

    def _passed(self, task: Task, want_dx: bool) -> Pass:
        """The forward pass by the way that suits the rule and, of a threshold rule, the density."""
        rule = task.rule
        if not rule.shaped:
            return objective.selected_pass(task)
        pairs, found = task.n * task.sae.d_sae, None
        if self._density is None:
            self._density = sampled_density(task, SAMPLED_TOKENS)
        if self._density <= self.dense_above:
            # Room for what the sparse way should carry, a little more than it has carried: whoever needs more is dense.
            room = min(pairs, int(self.dense_above * pairs) + 1)
            guess = min(room, int(1.5 * self._density * pairs) + 64 * task.n)
            for capacity in dict.fromkeys((guess, room)):
                pre, overflow = objective.pre_acts_with_room(task, capacity)
                if not bool(overflow):
                    found = objective.shaped_pass(task, pre)
                    break
        if found is None:
            found = dense_pass(task, want_dx)
        assert found.selected is not None
        self._density = float(found.selected) / pairs
        return found

    def _update(
        self,
        terms: list[UpdateTerm],
        found: Pass,
        screen: Screen | None,
        whole: Tensor,
        ready: Inputs,
        metrics: dict[str, Tensor],
    ) -> None:
        """The step of every parameter. whole (N, d_out): the gradient of the reconstruction."""
        sae = self.sae
        count = self.count + 1
        lr = self.lr * (1.0 if self.schedule is None else self.schedule(self.count))
        others = dict(found.rule_grads)
        if sae.W_skip is not None:
            others["W_skip"] = whole.mT @ ready.x
        of_others = sum(losses.sum_of_squares(grad.unsqueeze(0)) for grad in others.values())
        added = ("decoder_pull", "db_enc", "added")
        given: dict[str, Any] = {name: found.adds[name] for name in added if name in found.adds}
        given |= {
            "lr": lr, "step": count, "unit_norm": sae.decoder_norm == "unit", "pre_bias": sae.pre_bias,
            "clip_rows": self.clip_rows, "seed": self.seed, "screen": screen, "backend": self.backend,
            **self._optimizer.arguments(),
        }  # fmt: skip

        def update(**more: Any) -> Tensor:
            return ops.update_latents_(sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec, terms=terms, **given, **more)

        scale = None
        if self.clip_norm is not None:
            squares = update(norms_only=True).sum() + of_others
            scale = (self.clip_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_ has it
            others = {name: g * scale.to(g.dtype) for name, g in others.items()}
        stats = update(grad_scale=scale)
        self._optimizer.step_others(others, lr, count)
        self.count.copy_(count)
        self._steps += 1
        self._kept.remember()
        metrics |= {"grad_norm": (stats.sum() + of_others).sqrt(), "lr": lr}

    @torch.no_grad()
    def forget_rows_(self, latents: Tensor) -> None:
        """Sets the optimizer's moments of these latents (int64) to zero, as resampling wants."""
        self._optimizer.forget_rows(latents)

    def refresh(self, encoder_input: Tensor | None = None) -> None:
        """Makes the low-precision copy of the encoder anew. Needed only after a write that cannot be seen.

        encoder_input (N, d_in): what it will encode, for a backend that chooses its format by it.
        """
        self._kept.make(encoder_input, in_place=self._graph is not None)

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on besides the module's own state: plain numbers, strings and tensors.

        The tensors are the live ones, as in a torch optimizer: save or clone them before the next step. The schedules
        are functions of the count and are not stored.
        """
        rule = self._optimizer.optimizer
        return {
            "format": FORMAT,
            "count": int(self.count),
            "lr": float(self.lr),
            "optimizer": rule.kind,
            "betas": list(rule.betas),
            "eps": rule.eps,
            "weight_decay": rule.weight_decay,
            "moments": self.moments,
            "seed": self.seed,
            "density": self._density,
            "state": dict(self._optimizer.tensors),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, bit for bit; lr, betas, eps, weight decay and seed become the saved ones.

        Raises ValueError, and changes nothing, when it is of another format or does not fit this module.
        """
        expected = self.state_dict()
        if set(state) != set(expected) or state["format"] != FORMAT:
            raise ValueError(
                f"got a state with keys {sorted(state)} and format {state.get('format')}, expected {sorted(expected)} "
                f"and format {FORMAT}"
            )
        for name in ("moments", "optimizer"):
            if state[name] != expected[name]:
                raise ValueError(f"the state has {state[name]} {name}, expected {expected[name]}; pass {name}=")
        validation.optimizer(state["optimizer"], tuple(state["betas"]), state["eps"], state["weight_decay"])
        self._optimizer.load(state["state"])
        self.count.fill_(state["count"])
        self._steps = state["count"]
        self.lr.fill_(state["lr"])
        self.seed = state["seed"]
        betas = tuple(state["betas"])
        self._optimizer.optimizer = Optimizer(state["optimizer"], betas, state["eps"], state["weight_decay"])
        self._density = state["density"]
