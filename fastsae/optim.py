"""FusedTrainStep: forward, loss, backward, projection, Adam and renormalisation of an SAE in one call, in place.

The same numbers as autograd + `project_gradients_` + `torch.optim.Adam` + `normalize_decoder_`, without autograd,
without a stored dictionary gradient and without an (N, M) tensor. Nothing is read back from the device: the learning
rate, the count of steps and every metric are 0-d tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsae import losses, ops, validation
from fastsae.activations import TopK
from fastsae.codes import Screen, SparseCodes, UpdateTerm
from fastsae.sae import SparseAutoencoder
from fastsae.step_graph import StepGraph

MOMENTS = ("fp32", "bf16")
FORMAT = 1

# Steps after which the screen is made anew, at the latest; and at the earliest, if more tokens than this are redone.
SCREEN_LIFE = 64
SCREEN_TRIAL = 2
REDONE_LIMIT = 0.01

# Steps before a CUDA graph is captured: kernels are compiled and loaded by then, which a capture would not survive.
GRAPH_WARMUP = 2


class FusedTrainStep:
    """`metrics = step(x)`: one update of every parameter of `sae`, and its dead-latent counters.

    lr, betas, eps   of Adam. `lr` is kept as a 0-d float64 tensor; change it with `step.lr.fill_(...)`.
    schedule         multiplier of lr from the 0-d count of updates done before this one, e.g. `Schedule(...)`; None: 1.
    moments          "fp32": Adam's moments in the weights' dtype, float32 at least. "bf16": half the memory, rounded
                     stochastically as a function of (seed, step, position).
    backend          of the ops, see `fastsae.backends()`; None takes the fastest.
    check            raise ValueError for NaN in x before anything changes; a host sync on a GPU.
    cuda_graph       capture the step in a CUDA graph after two ordinary ones and replay it from then on, for as long as
                     shapes, settings and the places of the parameters stay; other shapes run without. lr is read on
                     the device, so `step.lr.fill_` and `schedule` work on; a schedule must be made of tensor ops.

    The backend's low-precision copy of the encoder (the screen) is maintained by the update. It is made anew when
    somebody else wrote the weights: seen by address and version, and on a CPU also by a sample of one weight in every
    row, because a write through `.data` changes neither. Call `refresh()` after a write through `.data` on a GPU, or
    after one that spares those samples.

    The screen's format is chosen by the inputs at hand: speed depends on it, and with precision="screened" the
    selection too, so that such a step repeats itself only from its start, not from a state loaded in the middle.

    Raises ValueError for bad settings, for parameters that do not require a gradient, and for an activation rule whose
    gradient the fused update does not know.
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
    ):
        if not isinstance(sae.activation, TopK):
            raise ValueError(f"got {sae.activation!r}, a fused step knows only TopK's gradient; use a torch optimizer")
        if not lr >= 0:
            raise ValueError(f"lr {lr}: expected 0 or more")
        validation.adam(betas, eps)
        if moments not in MOMENTS:
            raise ValueError(f"moments is {moments!r}, expected one of {', '.join(MOMENTS)}")
        frozen = [name for name, p in sae.named_parameters() if not p.requires_grad]
        if frozen:
            raise ValueError(f"{', '.join(frozen)} do not require a gradient, but a fused step updates every parameter")
        self.sae, self.betas, self.eps = sae, (float(betas[0]), float(betas[1])), float(eps)
        self.schedule, self.moments, self.seed, self.backend, self.check = schedule, moments, seed, backend, check
        device = sae.W_dec.device
        if cuda_graph and device.type != "cuda":
            raise ValueError(f"cuda_graph=True needs the SAE on a CUDA device, it is on {device}; move it there first")
        if cuda_graph and check:
            raise ValueError("check=True asks the device at every step, which a CUDA graph cannot; leave one of them")
        self.cuda_graph = cuda_graph
        self._graph: StepGraph | None = None
        self._graph_of: tuple[Any, ...] | None = None
        self._warm = 0
        self.lr = torch.tensor(lr, dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self._state: dict[str, Tensor] = {}
        for name, p in self._parameters().items():
            dtype = torch.bfloat16 if moments == "bf16" else torch.promote_types(p.dtype, torch.float32)
            for moment in ("m", "v"):
                self._state[f"{name}_{moment}"] = torch.zeros(p.shape, dtype=dtype, device=device)
        self._screen: Screen | None = None
        self._seen: tuple[Any, ...] | None = None
        self._redone: Tensor | None = None  # share of tokens, in the last step
        self._age = 0
        self._sample: Tensor | None = None

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        """In the order of `update_latents_`."""
        names = ("W_enc", "W_dec", "b_enc", "b_dec")
        return {name: getattr(self.sae, name) for name in names if getattr(self.sae, name) is not None}

    # -- one step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(self, x: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
        """One update on x (*batch, d_in), towards target (*batch, d_out) or x itself.

        Returns 0-d tensors: loss (what was minimised), mse, fvu and aux (all in normalised units), l0 (mean active
        latents), redone (tokens whose selection was repeated), dead (latents), grad_norm (before projection), lr.
        Counts are int64, and float64 where a CUDA graph gives them.
        Raises ValueError for an empty batch and what `sae.inputs` raises; nothing has changed then.
        """
        self._check_place()
        if self.cuda_graph:
            return self._replayed(x, target)
        return self._step(x, target)

    def _replayed(self, x: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """The step by its CUDA graph, which is captured when nothing has changed for GRAPH_WARMUP steps."""
        settings = self._graph_settings(x, target)
        if self._graph_of != settings:
            if self._graph is not None and self._graph_of is not None and self._graph_of[1:] == settings[1:]:
                return self._step(x, target)  # another shape, the last batch of an epoch for instance
            self._graph, self._graph_of, self._warm = None, settings, 0
        if self._graph is None and self._warm < GRAPH_WARMUP:
            self._warm += 1
            return self._step(x, target)
        if self._graph is None:
            self._current_screen(self.sae.inputs(x, target).encoder_input)  # made outside, so that it can be made anew
            self._graph = self._captured(x, target)
            self._remember()
        if self._seen != self._signature():
            self.refresh()
        metrics = self._graph(x, target)
        # A replay writes behind torch's back: whoever saved a parameter for a backward must notice.
        torch.autograd.graph.increment_version(list(self.sae.parameters()))
        self._remember()
        return metrics

    def _captured(self, x: Tensor, target: Tensor | None) -> StepGraph:
        """The graph. Raises RuntimeError where it cannot be captured: nothing was computed then, and the next calls run
        without one before it is tried again.
        """
        try:
            return StepGraph(self._step, x, target)
        except RuntimeError as error:
            self._graph_of, self._redone = None, None  # what a capture leaves behind was never computed
            raise RuntimeError(
                f"this step cannot be captured in a CUDA graph ({error}); pass cuda_graph=False"
            ) from error

    def _graph_settings(self, x: Tensor, target: Tensor | None) -> tuple[Any, ...]:
        """All that a captured step holds fast: the shapes first, then the settings and the places in memory."""
        sae = self.sae
        shapes = tuple((t.shape, t.dtype, t.device) for t in (x, target) if t is not None)
        held = [*sae.parameters(), *sae.buffers(), *self._state.values(), self.lr, self.count]
        return (
            shapes, sae.activation, sae.loss, sae.aux_k, sae.aux_coef, sae.dead_after, sae.precision, sae.pre_bias,
            sae.decoder_norm, sae.norm.mode, self.betas, self.eps, self.seed, self.backend, self.schedule,
            tuple(t.data_ptr() for t in held),
        )  # fmt: skip

    def _step(self, x: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        sae = self.sae
        encoder_input, goal, _ = sae.inputs(x, target)
        if encoder_input.shape[0] == 0:
            raise ValueError(f"x has shape {tuple(x.shape)}: an empty batch cannot train; skip it")
        losses.check_tokens(sae.loss, encoder_input.shape[0])
        centred = sae.pre_bias and target is None
        if centred:
            goal = encoder_input  # recon - x = A W_dec - (x - b_dec): no bias to add, and no copy of x to keep
        screen = self._current_screen(encoder_input)
        codes = sae.activation.encode(
            encoder_input, sae.encoder_weight, sae.b_enc,
            screen=screen, precision=sae.precision, backend=self.backend, check=self.check,
        )  # fmt: skip
        bias = None if centred else sae.b_dec
        residual, squares = ops.decode_error(codes, sae.W_dec, goal, bias, backend=self.backend)
        variance = losses.total_variance(goal)
        del goal
        sae.note_fired_(codes)
        metrics, terms = self._terms(codes, encoder_input, residual, losses.total(squares), variance, screen)
        count = self.count + 1
        lr = self.lr * (1.0 if self.schedule is None else self.schedule(self.count))
        stats = ops.update_latents_(
            sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec, list(self._state.values()), terms,
            lr=lr, step=count, betas=self.betas, eps=self.eps, unit_norm=sae.decoder_norm == "unit",
            pre_bias=sae.pre_bias, seed=self.seed, screen=screen, backend=self.backend,
        )  # fmt: skip
        self.count.copy_(count)
        self._remember()
        return metrics | {"grad_norm": stats.sum().sqrt(), "lr": lr}

    def _terms(
        self,
        codes: SparseCodes,
        encoder_input: Tensor,
        residual: Tensor,
        squares: Tensor,
        variance: Tensor,
        screen: Screen | None,
    ) -> tuple[dict[str, Tensor], list[UpdateTerm]]:
        """The losses and what their gradients come from. residual (N, D_out) = recon - target becomes the gradient."""
        sae, n = self.sae, residual.shape[0]
        over = n if sae.loss == "mse" else variance
        loss = squares / over
        dead = sae.dead
        metrics = {"mse": squares / n, "fvu": squares / variance, "l0": codes.nnz / n, "dead": dead.sum()}
        if codes.redone is not None:
            metrics["redone"] = codes.redone
            self._redone = codes.redone / n
        auxiliary: list[UpdateTerm] = []
        if sae.aux_k is not None:
            metrics["aux"] = torch.zeros_like(loss)
            dead_codes = losses.encode_dead(
                encoder_input, sae.encoder_weight, sae.b_enc, dead, sae.aux_k,
                screen=screen, precision=sae.precision, backend=self.backend,
            )  # fmt: skip
            if dead_codes is not None:
                weight = losses.aux_weight(dead, sae.aux_k)
                # ê - e with e = target - recon: the residual with the sign that is at hand.
                missed = ops.decode(dead_codes, sae.W_dec, backend=self.backend).add_(residual)
                metrics["aux"] = weight * losses.sum_of_squares(missed) / over
                missed.mul_(weight * (2 * sae.aux_coef) / over)
                auxiliary.append(UpdateTerm(dead_codes, encoder_input, missed, has_bias=False))
            loss = loss + sae.aux_coef * metrics["aux"]
        residual.mul_(2 / over)
        return {"loss": loss} | metrics, [UpdateTerm(codes, encoder_input, residual), *auxiliary]

    def _check_place(self) -> None:
        p, m = self.sae.W_dec, self._state["W_dec_m"]
        wanted = torch.bfloat16 if self.moments == "bf16" else torch.promote_types(p.dtype, torch.float32)
        if (p.device, p.shape, wanted) != (m.device, m.shape, m.dtype):
            raise RuntimeError(
                f"the SAE is {p.dtype} {tuple(p.shape)} on {p.device}, but this step's moments are {m.dtype} "
                f"{tuple(m.shape)} on {m.device}: make a new FusedTrainStep after moving the module, and load its state"
            )

    # -- the screen, and who else wrote the weights -------------------------------------------------------------------

    def refresh(self, encoder_input: Tensor | None = None) -> None:
        """Makes the low-precision copy of the encoder anew. Needed only after a write that cannot be seen.

        encoder_input (N, d_in): what it will encode, for a backend that chooses its format by it.
        """
        W, b, activation = self.sae.encoder_weight, self.sae.b_enc, self.sae.activation
        assert isinstance(activation, TopK)  # checked at the start
        fresh = ops.prepare_screen(W, b, x=encoder_input, k=activation.k, backend=self.backend)
        if self._graph is not None and self._screen is not None and fresh is not None:
            for place, made in zip(self._screen.tensors, fresh.tensors, strict=True):
                place.copy_(made)  # where the graph looks for it
        else:
            self._screen = fresh
        self._age = 0
        self._remember()

    def _current_screen(self, encoder_input: Tensor) -> Screen | None:
        written = self._seen != self._signature()
        if written or self._outgrown() or (
            self._sample is not None and not torch.equal(self._sample, self._fingerprint())
        ):  # fmt: skip
            self.refresh(encoder_input)
        self._age += 1
        return self._screen

    def _outgrown(self) -> bool:
        """Whether the screen's format should be chosen again: training changes how well it tells latents apart."""
        if self._screen is None or self._redone is None or self._redone.device.type != "cpu":
            return False  # a GPU is never asked
        return self._age >= SCREEN_LIFE or (self._age >= SCREEN_TRIAL and float(self._redone) > REDONE_LIMIT)

    def _remember(self) -> None:
        self._seen = self._signature()
        # Comparing is a host sync, so on a GPU there is no sample.
        sampled = self._screen is not None and self.sae.W_dec.device.type == "cpu"
        self._sample = self._fingerprint() if sampled else None

    def _signature(self) -> tuple[Any, ...]:
        W, b = self.sae.encoder_weight, self.sae.b_enc
        return W.data_ptr(), W._version, b.data_ptr(), b._version

    def _fingerprint(self) -> Tensor:
        """One weight of every row and every bias, as bits, so that NaN equals itself. 0.06 ms at M = 24576, D = 768."""
        W, b = self.sae.encoder_weight.detach(), self.sae.b_enc.detach()
        rows = torch.arange(W.shape[0], device=W.device)
        return torch.cat([W.take(rows * W.shape[1] + rows * 7919 % W.shape[1]), b]).view(torch.uint8)

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on besides the module's own state: plain numbers, strings and tensors.

        The tensors are the live ones, as in a torch optimizer: save or clone them before the next step. The schedule
        is a function of the count and is not stored.
        """
        return {
            "format": FORMAT,
            "count": int(self.count),
            "lr": float(self.lr),
            "betas": list(self.betas),
            "eps": self.eps,
            "moments": self.moments,
            "seed": self.seed,
            "state": dict(self._state),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, bit for bit; lr, betas, eps and seed become the saved ones.

        Raises ValueError, and changes nothing, when it is of another format or does not fit this module.
        """
        expected = self.state_dict()
        if set(state) != set(expected) or state["format"] != FORMAT:
            raise ValueError(
                f"got a state with keys {sorted(state)} and format {state.get('format')}, expected {sorted(expected)} "
                f"and format {FORMAT}"
            )
        if state["moments"] != self.moments:
            raise ValueError(f"the state has {state['moments']} moments, expected {self.moments}; pass moments=")
        if set(state["state"]) != set(self._state):
            raise ValueError(f"the state holds {sorted(state['state'])}, expected {sorted(self._state)}")
        for name, mine in self._state.items():
            theirs = state["state"][name]
            if theirs.shape != mine.shape or theirs.dtype != mine.dtype:
                raise ValueError(
                    f"{name} is {theirs.dtype} {tuple(theirs.shape)}, expected {mine.dtype} {tuple(mine.shape)}"
                )
        for name, mine in self._state.items():
            mine.copy_(state["state"][name])
        self.count.fill_(state["count"])
        self.lr.fill_(state["lr"])
        self.betas, self.eps, self.seed = tuple(state["betas"]), state["eps"], state["seed"]
