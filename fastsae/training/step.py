"""Training steps as one call: FusedTrainStep with a fastsae optimizer, PlainTrainStep with torch's.

    metrics = step(x)

Both wrap what any loop does: the module's objective, backward(), optimizer.step(). The numbers are the same; the fused
one stores no gradient of a dictionary, and can be captured in a CUDA graph. For rules that fix how many latents are
active it reads nothing back from the device: learning rate, step count and metrics are 0-d tensors. A threshold rule
reads once per step how many latents were above their thresholds, and is dense while there are too many. In a CUDA graph
it reads that after the step.

A step never destroys a run. If the loss, a gradient or the learning rate is NaN, infinite or too large to square, the
call changes nothing: no parameter, moment, dead-latent counter, running threshold, penalty weight or count of updates.
It returns the metrics as they were, and `skipped` counts it; the next call continues as if the batch had been left out.
After any other call all of these are finite. On a CPU the first skipped step warns, with the rows of x that are not
finite or else the largest (`fastsae.training.skipped.say_rows`); a `Trainer` also names the rows of the data, and stops
after ten skipped steps in a row. Off the CPU a bound decides, see `fastsae.ops.gradients.gradients_are_bounded`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import isnan
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastsae.model import losses
from fastsae.model.parameters import DENSE_ABOVE
from fastsae.model.sae import Objective, SparseAutoencoder, as_sae
from fastsae.model.settings import Config, check_state_config
from fastsae.ops import checks
from fastsae.ops.gradients import moves_little
from fastsae.ops.register import without_autocast
from fastsae.ops.sums import sum_of_squares
from fastsae.reference import wide
from fastsae.training.graph import StepGraph, check_graph, room_for
from fastsae.training.optimizers import OPTIMIZERS, FusedOptimizer
from fastsae.training.skipped import FirstSkip, say_rows, torch_adam

FORMAT = 3
GRAPH_WARMUP = 2
"""Steps before a CUDA graph is captured: compiling and loading kernels during a capture would make it fail."""

Outer = Callable[[Tensor], Tensor]


class _TrainStep:
    """What both steps share: one batch through objective and backward, and its metrics."""

    def __init__(
        self,
        sae: SparseAutoencoder,
        penalty_schedule: Callable[[Any], Any] | None,
        k_schedule: Callable[[int], int] | None,
    ):
        if isinstance(sae, DistributedDataParallel):
            raise TypeError(
                f"sae is a {type(sae).__name__}, whose gradients this step does not sum over processes. Train it in "
                "your own loop with a torch optimizer, project_gradients_() before its step and "
                "normalize_decoder_() after; or, if each process trains an SAE of its own, pass .module and "
                "independent=True"
            )
        self.sae = sae = as_sae(sae, "sae")
        self.penalty_schedule, self.k_schedule = penalty_schedule, k_schedule
        if k_schedule is not None:
            sae.activation.with_k(k_schedule(0)).check(sae.n_latents)

    @contextmanager
    def _scheduled(self, penalty_at: Any, step: int) -> Iterator[None]:
        """The module in training mode, with the penalty's weight and the k of this step."""
        sae = self.sae
        was_training, sae.training = sae.training, True
        try:
            if self.penalty_schedule is not None:
                sae.penalty_scale.fill_(self.penalty_schedule(penalty_at))
            if self.k_schedule is not None:
                sae.annealed_k = self.k_schedule(step)
            yield
        finally:
            sae.training, sae.annealed_k = was_training, None
            if self.penalty_schedule is not None:
                sae.penalty_scale.fill_(1.0)

    def _backward(
        self, x: Tensor, target: Tensor | None, outer: Outer | None, *, for_step: bool
    ) -> tuple[Objective, dict[str, Tensor]]:
        """loss.backward(), and the metrics from before the update."""
        sae, n = self.sae, x.shape[:-1].numel()
        if sae.placement is None:
            if n == 0:
                raise ValueError(f"x has shape {tuple(x.shape)}: an empty batch cannot train; skip it")
            losses.check_tokens(sae.loss, n)
        checks.gradients_possible()
        with torch.enable_grad():
            found = sae.objective(x, target, for_step=for_step)
            if sae.placement is not None:
                n = sae.placement.n  # now, since `outer` may use the SAE for other rows
                if n == 0:
                    raise ValueError("no process got a row: an empty batch cannot train; skip it")
            loss, behind = found.loss, None
            if outer is not None:
                behind = self._behind(found, outer, tuple(x.shape[:-1]))
                loss = loss + behind
            metrics = self._metrics(found, n)
            loss.backward()
        more = {} if behind is None else {"outer": behind.detach()}
        return found, {"loss": loss.detach(), **metrics, **more}

    def _behind(self, found: Objective, outer: Outer, batch: tuple[int, ...]) -> Tensor:
        recon = self.sae.restored(found.error, found.ready, batch)
        value = outer(recon)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"outer returned {got}, expected one number computed from the reconstruction it was given")
        if torch.autograd.grad(value, recon, retain_graph=True, allow_unused=True)[0] is None:
            raise ValueError("outer's loss does not depend on the reconstruction it was given")
        return value.double().reshape(())

    def _metrics(self, found: Objective, n: int) -> dict[str, Tensor]:
        squares, active, dead = found.squares.detach(), found.active, found.dead.sum()
        rule, placement = self.sae.activation, self.sae.placement
        if placement is not None:
            active, dead = placement.latents.sum(torch.stack([active, dead])).unbind()
        metrics = {
            **{name: value.detach() for name, value in found.losses.items()},
            **({"penalty_weight": self.sae.penalty_weight} if rule.from_data and rule.penalizes else {}),
            "mse": squares / n,
            "fvu": squares / losses.total_variance(found.ready.target.detach(), placement),
            "l0": active.double() / n,
            "dead": dead,
        }
        if found.redone is None:
            return metrics
        return metrics | {"redone": found.redone if placement is None else placement.tokens.sum(found.redone)}


class FusedTrainStep(_TrainStep):
    """`metrics = step(x)`: one update of every parameter of `sae`, and its dead-latent counters.

    lr, betas, eps   of the optimizer. `step.lr` is a 0-d float64 tensor: `step.lr = 1e-4` and `step.lr.fill_(...)`.
    schedule         multiplier of lr from the 0-d count of updates done before this one, e.g. `Schedule(...)`; None: 1.
    moments, seed, clip_norm, clip_rows, weight_decay, independent   as fastsae.optim.Adam's.
    backend          of the ops, see `fastsae.backends()`; None takes the fastest.
    check            raise ValueError for NaN in x before anything changes; a host sync on a GPU.
    cuda_graph       capture the step in a CUDA graph after two ordinary ones and replay it from then on, as long as
                     shapes, settings and parameter addresses do not change; other shapes run without. lr is read on
                     the device; a schedule must be made of tensor ops. A threshold rule's graph has room for twice the
                     latents of the step before; a step that needs more is made without it, and another one is captured.
                     Not with ghost gradients.
    optimizer        "adam", "adamw", "lion", "signsgd".
    penalty_schedule multiplier of the rule's penalty from the count, like `schedule`: a warm-up of L1, for instance.
    k_schedule       the rule's k from the number of calls so far, an int, for annealing; None: the rule's own.
    dense_above      sets `sae.dense_above`: a threshold rule's step is dense if more than this share of the latents was
                     active in the previous step (or, at first, on a sample), or turns out to be in this one.

    `step.optimizer` is the fastsae optimizer behind it, whose step hooks run, though not in a replay of a CUDA graph;
    torch's learning-rate schedulers may drive it if `schedule` is None. The update maintains its low-precision copy of
    the encoder, which is rebuilt after other code wrote the weights: call `refresh()` after writes that torch cannot
    see.

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
        independent: bool = False,
        penalty_schedule: Callable[[Tensor], Any] | None = None,
        k_schedule: Callable[[int], int] | None = None,
        dense_above: float = DENSE_ABOVE,
    ):
        super().__init__(sae, penalty_schedule, k_schedule)
        sae = self.sae
        checks.optimizer(optimizer, betas, eps, weight_decay, lr)
        if not 0 <= dense_above <= 1:
            raise ValueError(f"dense_above is {dense_above}, expected a share in [0, 1]")
        if cuda_graph:
            check_graph(sae, check, k_schedule is not None)
        sae.dense_above, sae.active_share = dense_above, None
        device = sae.W_dec.device
        self._lr = torch.tensor(lr, dtype=torch.float64, device=device)
        given: dict[str, Any] = {"betas": betas, "eps": eps} if optimizer in ("adam", "adamw") else {}
        if optimizer == "lion":
            given = {"betas": betas}
        self.optimizer: FusedOptimizer = OPTIMIZERS[optimizer](
            sae, lr=self._lr, weight_decay=weight_decay, moments=moments, clip_norm=clip_norm, clip_rows=clip_rows,
            seed=seed, backend=backend, independent=independent, **given,
        )  # fmt: skip
        self.schedule, self.backend, self.check = schedule, backend, check
        self.cuda_graph = cuda_graph
        self._graph: StepGraph | None = None
        self._graph_of: tuple[Any, ...] | None = None
        self._room: int | None = None  # of the graph
        self._warm = 0
        self._steps = 0  # calls so far, those that were skipped included: k is chosen on the host

    # -- settings that may change between steps -----------------------------------------------------------------------

    @property
    def lr(self) -> Tensor:
        """The learning rate before the schedule, 0-d float64 on the device."""
        return self._lr

    @lr.setter
    def lr(self, value: float | Tensor) -> None:
        if not isinstance(value, Tensor):
            checks.at_least_0("lr", value)
        self._lr.fill_(value)

    @property
    def betas(self) -> tuple[float, float]:
        return self.optimizer.param_groups[0]["betas"]

    @betas.setter
    def betas(self, betas: tuple[float, float]) -> None:
        for group in self.optimizer.param_groups:
            group["betas"] = betas

    @property
    def count(self) -> Tensor:
        """Updates done: 0-d int64 on the device."""
        return self.optimizer.state[self.sae.W_dec]["step"]

    @property
    def skipped(self) -> Tensor:
        """Steps that were not made because the loss, a gradient or the lr was not finite: 0-d int64 on the device."""
        return self.optimizer.skipped

    @property
    def first_skip(self) -> FirstSkip:
        """The object that warns about the first skipped step."""
        return self.optimizer.first_skip

    # -- one step -----------------------------------------------------------------------------------------------------

    def __call__(self, x: Tensor, target: Tensor | None = None, *, outer: Outer | None = None) -> dict[str, Tensor]:
        """One update on x (*batch, d_in), towards target (*batch, d_out) or x itself.

        outer: a function of the reconstruction (*batch, d_out), in the caller's units, whose loss is added. If x
        requires a gradient, it gets that of the whole loss, as from any backward().
        Returns 0-d tensors: loss (what was minimized), mse, fvu and the other parts of `ForwardResult.losses` (all in
        normalized units), l0 (mean active latents), redone (tokens whose selection was repeated), dead (latents),
        grad_norm (before projection), lr, skipped (steps so far that changed nothing, see the top of this module),
        outer. Counts are int64, and float64 where a CUDA graph gives them.
        Raises ValueError for an empty batch and what `sae.inputs` raises; nothing has changed then.
        """
        self.sae.check_input(x, target)
        if self.cuda_graph and (outer is not None or x.requires_grad):
            raise ValueError("a CUDA graph can capture neither outer losses nor x's gradient; pass cuda_graph=False")
        with without_autocast(x.device.type):
            return self._replayed(x, target) if self.cuda_graph else self._step(x, target, outer)

    def _step(self, x: Tensor, target: Tensor | None, outer: Outer | None = None) -> dict[str, Tensor]:
        sae, optimizer = self.sae, self.optimizer
        optimizer.refuse()
        if self.check and sae.placement is not None:  # all of them raise, or some would wait for the others
            if not bool(sae.placement.everywhere(x.isfinite().all())):
                raise ValueError("x holds values that are NaN or infinite in some process; drop those rows")
        elif self.check:
            checks.no_nan("x", x)
        optimizer.zero_grad()
        x_grad = x.grad.clone() if x.is_leaf and x.grad is not None else None
        was_backend, sae.backend = sae.backend, self.backend or sae.backend
        try:
            with self._scheduled(self.count, self._steps):
                found, metrics = self._backward(x, target, outer, for_step=True)
            factor = 1.0 if self.schedule is None else self.schedule(self.count)
            lr = self._lr * factor
            good = metrics["loss"].isfinite()
            if found.overflow is not None and found.codes is not None:
                good = good & ~found.overflow
                metrics["taken"] = torch.where(found.overflow, torch.nan, found.codes.nnz.double())
            # The optimizer sees gradients alone: at a rate of NaN it makes no step.
            optimizer.describe = lambda: say_rows(x, target)
            optimizer.step_scheduled(factor * torch.where(good, lr.new_ones(()), torch.nan))
        except BaseException:
            optimizer.zero_grad()  # drops what a failed step left behind
            if x.is_leaf:
                x.grad = x_grad
            raise
        finally:
            sae.backend, optimizer.describe = was_backend, None
        assert optimizer.made is not None
        assert optimizer.grad_norm is not None
        found.count(optimizer.made)
        self._steps += 1
        return {**metrics, "grad_norm": optimizer.grad_norm, "lr": lr, "skipped": self.skipped.clone()}

    # -- the same as a CUDA graph -------------------------------------------------------------------------------------

    def _replayed(self, x: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """The step through its CUDA graph, captured when nothing has changed for GRAPH_WARMUP steps."""
        settings = self._graph_settings(x, target)
        if self._graph_of != settings:
            if self._graph is not None and self._graph_of is not None and self._graph_of[1:] == settings[1:]:
                return self._step(x, target)  # another shape, the last batch of an epoch for instance
            self._graph, self._graph_of, self._warm = None, settings, 0
        if self._graph is None and self._warm < GRAPH_WARMUP:
            self._warm += 1
            return self._step(x, target)
        sae, kept, n = self.sae, self.optimizer.screen_of(self.sae), x.shape[:-1].numel()
        if sae.activation.shaped and (sae.active_share is None or sae.active_share > sae.dense_above):
            return self._step(x, target)
        if self._graph is None:
            with torch.no_grad():
                kept.make(sae.inputs(x, target).encoder_input)  # here, so that no capture makes it
            self._room = room_for(sae, n)
            self._graph = self._captured(x, target)
            kept.in_place = True
            kept.remember()
        if kept.written():
            self.refresh()
        metrics = self._graph(x, target)
        if self._room is not None:
            taken, pairs = float(metrics.pop("taken")), n * sae.d_sae
            if isnan(taken):  # the code did not fit, and nothing has changed
                self._graph = None
                self.skipped.sub_(1)
                sae.active_share = min(sae.dense_above, self._room / pairs)  # at least
                return self._step(x, target)
            sae.active_share = taken / pairs
            if 4 * (room_for(sae, n) or 0) < self._room:
                self._graph = None
        self._steps += 1
        # A replay writes without torch's notice: tensors saved for a backward pass must see it.
        torch.autograd.graph.increment_version(list(self.sae.parameters()))
        kept.remember()
        return metrics

    def _captured(self, x: Tensor, target: Tensor | None) -> StepGraph:
        """The graph. Raises RuntimeError if it cannot be captured: nothing was computed then, and the next calls run
        without one before it is tried again.
        """
        steps, self.sae.room = self._steps, self._room
        try:
            return StepGraph(self._step, x, target)
        except RuntimeError as error:
            self._graph_of, self.optimizer.screen_of(self.sae).redone = None, None  # what was never computed
            raise RuntimeError(f"no CUDA graph can capture this step ({error}); pass cuda_graph=False") from error
        finally:
            self._steps, self.sae.room = steps, None

    def _graph_settings(self, x: Tensor, target: Tensor | None) -> tuple[Any, ...]:
        """Everything that a captured step fixes: the shapes first, then the settings and the addresses in memory."""
        sae, optimizer = self.sae, self.optimizer
        shapes = tuple((t.shape, t.dtype, t.device) for t in (x, target) if t is not None)
        states = [t for state in optimizer.state.values() for t in state.values()]
        held = [*sae.parameters(), *sae.buffers(), *states, self._lr]
        groups = tuple((g["betas"], g["eps"], g["weight_decay"]) for g in optimizer.param_groups)
        return (
            shapes, sae.activation, sae.loss, sae.aux_k, sae.aux_coef, sae.dead_after, sae.precision, sae.pre_bias,
            sae.decoder_norm, sae.norm.mode, groups, optimizer.seed, self.backend, self.schedule,
            self.penalty_schedule, optimizer.clip_norm, optimizer.clip_rows, tuple(t.data_ptr() for t in held),
        )  # fmt: skip

    # -- what the optimizer keeps -------------------------------------------------------------------------------------

    def forget_rows_(self, latents: Tensor) -> None:
        """Sets the optimizer's moments of these latents (int64) to zero, as resampling needs."""
        self.optimizer.forget_rows_(self.sae, latents)

    def refresh(self, encoder_input: Tensor | None = None) -> None:
        """Rebuilds the low-precision copy of the encoder. Needed only after a write that torch cannot see.

        encoder_input (N, d_in): what it will encode, for a backend that chooses its format by it.
        """
        self.optimizer.refresh(encoder_input)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on besides the module's own state: plain numbers, strings and tensors.

        "optimizer" has the optimizer's state by parameter name. The tensors are the live ones, as in a torch optimizer:
        save or clone them before the next step. The schedules are functions of the count and are not stored.
        """
        return {
            "format": FORMAT,
            "lr": float(self._lr),
            "seed": self.optimizer.seed,
            "active_share": self.sae.active_share,
            "skipped": int(self.skipped),
            "optimizer": named_state(self.sae, self.optimizer),
            "settings": settings_of(self.optimizer, self.sae.config),
        }

    def load_state_dict(self, state: dict[str, Any], allow_other_config: bool = False) -> None:
        """Restores what `state_dict` gave, bit for bit; lr, betas, eps, weight decay and seed become the saved ones.

        allow_other_config: do not compare the settings of the SAE and the kind of optimizer, which older states lack.
        Raises ValueError, and changes nothing, if it has another format or other settings, or does not fit this module.
        """
        expected = self.state_dict()
        if not isinstance(state, dict):
            raise ValueError(f"got a state that is a {type(state).__name__}, expected a dict of {sorted(expected)}")
        if set(state) | {"settings"} != set(expected) or repr(state["format"]) != repr(FORMAT):
            raise ValueError(
                f"got a state with keys {sorted(state)} and format {state.get('format')}, expected {sorted(expected)} "
                f"and format {FORMAT}"
            )
        if not allow_other_config:
            check_settings_of(state, expected)
        for name in ("lr", "seed", "skipped", "active_share"):
            if not (name == "active_share" and state[name] is None):
                checks.at_least_0(f"{name} of the state", state[name])
        load_named_state(self.sae, self.optimizer, state["optimizer"])
        self._lr.fill_(state["lr"])
        self.optimizer.seed = state["seed"]
        self.sae.active_share = state["active_share"]
        self.skipped.fill_(state["skipped"])
        self._steps = int(self.count) + state["skipped"]


class PlainTrainStep(_TrainStep):
    """g = ∇loss(sae(x));  project g;  torch.optim.Adam or AdamW;  renormalize: the same step with torch's optimizer.

    Slower but readable, and for any backend: the reference curve for the fused step. It reads one bool back: whether
    the step may be made.

    lr: peak learning rate; schedule: step -> multiplier, with step counting the updates done before; optimizer: "adam"
    or "adamw"; clip_norm, penalty_schedule, k_schedule, independent: as FusedTrainStep's. skipped: as FusedTrainStep's.
    Raises ValueError for another optimizer, and for float16 weights: torch's Adam would keep its moments in float16,
    where the squares of small gradients are 0, and then step by m / eps.
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
        independent: bool = False,
    ):
        super().__init__(sae, penalty_schedule, k_schedule)
        sae = self.sae
        checks.limit("clip_norm", clip_norm)
        self.lr, self.schedule, self.clip_norm = lr, schedule, clip_norm
        self.step, self.independent, self.first_skip = 0, independent, FirstSkip()
        self.skipped = torch.zeros((), dtype=torch.int64, device=sae.W_dec.device)
        # A rule's own parameters do not decay: a threshold of 1 is no resting place.
        learnt = list(sae.rule_parameters.values())
        others = [p for name, p in sae.named_parameters() if name not in sae.rule_parameters]
        groups: list[dict[str, Any]] = [{"params": others}]
        if learnt:
            groups.append({"params": learnt, "weight_decay": 0.0})
        self.optimizer = torch_adam(optimizer, groups, lr, betas, eps, weight_decay)

    def __call__(self, x: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
        """One update on x (*batch, d_in), towards target (*batch, d_out) or x itself.

        Returns 0-d tensors as `FusedTrainStep` does. Raises RuntimeError in one of several processes, unless
        `independent`.
        """
        checks.one_process(self.independent)
        self.sae.check_input(x, target)
        with without_autocast(x.device.type):
            return self._step(x, target)

    def _step(self, x: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        sae = self.sae
        lr = self.lr * (1.0 if self.schedule is None else self.schedule(self.step))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        calls = self.step if self.k_schedule is None else self.step + int(self.skipped)  # a host sync
        with self._scheduled(self.step, calls):
            found, metrics = self._backward(x, target, None, for_step=True)
        grads = [wide(p.grad) for p in sae.parameters() if p.grad is not None]
        squares = torch.stack([sum_of_squares(grad.reshape(-1, grad.shape[-1])) for grad in grads]).sum()
        rate = torch.tensor(lr, dtype=torch.float64, device=sae.W_dec.device)
        metrics |= {"grad_norm": squares.sqrt(), "lr": rate}
        made = self._may_step(found, squares, rate)
        found.count(made)
        self.skipped += ~made
        if not bool(made):
            self.first_skip(lambda: f": {say_rows(x, target)}")
        if bool(made):
            sae.project_gradients_()
            if self.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(sae.parameters(), self.clip_norm)
            self.optimizer.step()
            sae.normalize_decoder_()
            self.step += 1
        return metrics | {"skipped": self.skipped.clone()}

    def _may_step(self, found: Objective, squares: Tensor, lr: Tensor) -> Tensor:
        """squares: the squared norm of all gradients, 0-d float64; it must also be finite in the gradients' dtype."""
        W, group, step = self.sae.W_dec, self.optimizer.param_groups[0], torch.full_like(self.skipped, self.step + 1)
        held = squares <= torch.finfo(wide(W).dtype).max
        return found.loss.detach().isfinite() & held & moves_little("adam", group, W, lr=lr, step=step)

    @torch.no_grad()
    def forget_rows_(self, latents: Tensor) -> None:
        """Sets the optimizer's moments of these latents (int64) to zero, as resampling needs."""
        for name, p in self.sae.named_parameters():
            if name in ("b_dec", "W_skip"):
                continue
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment in self.optimizer.state.get(p, {}):
                    self.optimizer.state[p][moment][latents] = 0

    def state_dict(self) -> dict[str, Any]:
        """{"step", "skipped", "optimizer", "settings"}: numbers and tensors, the optimizer's by parameter name."""
        return {
            "step": self.step, "skipped": int(self.skipped), "optimizer": named_state(self.sae, self.optimizer),
            "settings": settings_of(self.optimizer, self.sae.config),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any], allow_other_config: bool = False) -> None:
        """Puts back what `state_dict` returned. Raises ValueError where it belongs to another module.

        allow_other_config: as of FusedTrainStep.
        """
        if not isinstance(state, dict) or not {"step", "optimizer"} <= set(state) <= set(self.state_dict()):
            raise ValueError(f"got {state!r:.60}, expected a state with step and optimizer")
        if not allow_other_config:
            check_settings_of(state, self.state_dict())
        for name in ("step", "skipped"):
            checks.at_least_0(f"{name} of the state", state.get(name, 0))
        load_named_state(self.sae, self.optimizer, state["optimizer"])
        self.step = state["step"]
        self.skipped.fill_(state.get("skipped", 0))  # older states have none


def settings_of(optimizer: torch.optim.Optimizer, config: Config) -> dict[str, Any]:
    """The settings recorded in a step's state: the kind of the optimizer, and the config of what it trains."""
    return {"optimizer": type(optimizer).__name__, "sae": config.to_dict()}


@checks.reading_a_state("a step")
def check_settings_of(state: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises ValueError naming each setting in which a step's state differs; a state without them is not compared."""
    if "settings" in state:
        theirs, ours = state["settings"], expected["settings"]
        names = {"optimizer": theirs["optimizer"]}, {"optimizer": ours["optimizer"]}
        check_state_config(names[0] | theirs["sae"], names[1] | ours["sae"], "pass allow_other_config=True")


def named_state(sae: SparseAutoencoder, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state with parameter names instead of numbers: {"state", "param_groups"}."""
    names = {id(p): name for name, p in sae.named_parameters()}
    ordered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    state = optimizer.state_dict()
    groups = []
    for group in state["param_groups"]:
        plain = {k: float(v) if isinstance(v, Tensor) else v for k, v in group.items()}
        groups.append({**plain, "params": [ordered[i] for i in group["params"]]})
    return {"state": {ordered[i]: dict(s) for i, s in state["state"].items()}, "param_groups": groups}


@checks.reading_a_state("an optimizer")
def load_named_state(sae: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restores what `named_state` gave. Raises ValueError, and changes nothing, if it is of other parameters."""
    names = {id(p): name for name, p in sae.named_parameters()}
    ordered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    saved = [name for group in state["param_groups"] for name in group["params"]]
    if saved != ordered or not set(state["state"]) <= set(ordered):
        raise ValueError(
            f"got optimizer state for {sorted({*saved, *state['state']})}, expected it for {sorted(ordered)}"
        )
    for name, moments in state["state"].items():
        like = sae.get_parameter(name)
        for key in ("exp_avg", "exp_avg_sq"):
            got = moments.get(key)
            if got is not None and (got.shape != like.shape or got.is_meta != like.is_meta):
                here, there = (f"{tuple(t.shape)} on {t.device}" for t in (like, got))
                raise ValueError(f"{key} of {name} is {there}, expected {here}")
        if not isinstance(optimizer, FusedOptimizer):  # torch's takes anything
            checks.at_least_0(f"step of {name}", moments["step"])
            if float(moments["step"]) % 1:
                raise ValueError(f"step of {name} is {moments['step']!r}, expected a whole number")
            if set(moments) != {"step", "exp_avg", "exp_avg_sq"}:
                raise ValueError(f"the state of {name} has {sorted(moments)}, expected step, exp_avg and exp_avg_sq")
    if not isinstance(optimizer, FusedOptimizer):
        for group in state["param_groups"]:
            checks.optimizer("adamw", group["betas"], group["eps"], group["weight_decay"], group["lr"])
            for name, value in group.items():  # torch takes anything
                if isinstance(value, Tensor) and value.ndim:
                    raise ValueError(f"{name} of the state has shape {tuple(value.shape)}, expected one value")
    number = {name: i for i, name in enumerate(ordered)}
    groups = [{**group, "params": [number[name] for name in group["params"]]} for group in state["param_groups"]]
    optimizer.load_state_dict(
        {"state": {number[name]: dict(s) for name, s in state["state"].items()}, "param_groups": groups}
    )
