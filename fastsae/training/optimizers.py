"""Adam, AdamW, Lion and SignSGD as torch optimizers whose step is the fused update.

    optimizer = fastsae.optim.Adam(sae, lr=2e-4)
    loss = sae(x).loss + anything_differentiable
    loss.backward()      # the ledger keeps terms; no (M, D) gradient is stored
    optimizer.step()     # one pass over the rows: gradient, projection, clipping, moments, renormalization
    optimizer.zero_grad()

They behave like torch's own: param_groups with "lr" and "weight_decay", closures, hooks, state_dict. What differs: a
step consumes the gradients (every .grad is None after it), and a step never destroys its parameters. If its gradients
or its learning rate are NaN, infinite or too large to square, it changes nothing (no parameter, moment or count) and is
counted in `skipped`; every other step leaves finite numbers.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastsae import ops
from fastsae.codes import SparseCodes, UpdateTerm
from fastsae.model.sae import SparseAutoencoder
from fastsae.ops import checks
from fastsae.ops.gradients import can_be_squared, gradients_are_bounded, largest_square, moves_little
from fastsae.ops.ledger import LedgerGradient, Taken
from fastsae.ops.sums import sum_of_squares
from fastsae.reference import Optimizer as Rule
from fastsae.reference import scales_shape
from fastsae.training import gathered
from fastsae.training.dictionaries import Dictionaries, HasDictionaries
from fastsae.training.gathered import on_device
from fastsae.training.members import Member
from fastsae.training.screen import KeptScreen
from fastsae.training.skipped import FirstSkip

MOMENTS = ("fp32", "bf16", "8bit")
KEYS = {"m": "exp_avg", "v": "exp_avg_sq"}
"""A moment's name in an optimizer's state, as in torch."""


class FusedOptimizer(torch.optim.Optimizer):
    """The base of the four. Raises ValueError for bad settings.

    params        a SparseAutoencoder, a module of `fastsae.accelerate`, `Dictionaries`, or a list of them, or of groups
                  {"params": one of them, "lr": ...}. Each becomes one parameter group, and its rule's own parameters,
                  which do not decay, another. A module that holds SAEs becomes a group for each of them and one of its
                  other parameters. A group of other tensors, {"params": [...]}, is stepped elementwise by the same
                  formula, with moments of fp32.
    lr            a number or a 0-d tensor, which a CUDA graph needs on the device.
    moments       "fp32": in the weights' dtype, float32 at least. "bf16": half the memory, "8bit" (Adam, AdamW): a
                  quarter; both rounded stochastically as a function of (seed, step, position).
    clip_rows     scale each latent's row of each dictionary's gradient to at most this norm, at no cost.
    clip_norm     the same for all gradients of an SAE together, after projection, as clip_grad_norm_ does. It costs a
                  second pass, because the gradients are recomputed and not stored. A group of other tensors is clipped
                  separately.
    term_bytes    what the terms of earlier backward passes may take before the step, for each SAE, when gradients are
                  accumulated; the pass that runs comes on top. Beyond it they are added up as dense gradients, which
                  gives the same sums and needs no more memory, however many passes follow, but costs time. So None
                  takes the size of dense gradients, where both take as much. With several processes the terms are
                  joined in the step, and a part of them cannot be added up before: a backward pass beyond the limit
                  raises RuntimeError. None then takes 1 GiB at least. The step holds those of all data ranks.
    backend       of the update, see `fastsae.backends()`; None takes the fastest.
    independent   with several processes of torch.distributed: True says that each trains an SAE of its own. Without it
                  a step is refused, because gradients are not summed over processes.

    skipped: 0-d int64, steps not made because a gradient or the learning rate was not finite, counted for each SAE;
    made: 0-d bool, whether the last step was made for every SAE; grad_norm: 0-d float64, the norm of all gradients of
    the last step, before projection and clipping.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        *,
        moments: str = "fp32",
        clip_norm: float | None = None,
        clip_rows: float | None = None,
        term_bytes: int | None = None,
        seed: int = 0,
        backend: str | None = None,
        independent: bool = False,
    ):
        if moments not in MOMENTS:
            raise ValueError(f"moments is {moments!r}, expected one of {', '.join(MOMENTS)}")
        if moments == "8bit" and self.kind not in ("adam", "adamw"):
            raise ValueError(f"moments='8bit' needs adam or adamw, got {self.kind!r}; use 'fp32' or 'bf16'")
        checks.limit("clip_norm", clip_norm)
        checks.limit("clip_rows", clip_rows)
        checks.limit("term_bytes", term_bytes)
        self.moments, self.clip_norm, self.clip_rows = moments, clip_norm, clip_rows
        self.seed, self.backend, self.independent, self.term_bytes = seed, backend, independent, term_bytes
        self._members: list[Member] = []
        self._groups: list[tuple[int, int | None]] = []  # of each member: its group, and its rule's
        self.grad_norm: Tensor | None = None
        self.made: Tensor | None = None
        self._factor: Tensor | float = 1.0  # of every learning rate
        self.first_skip = FirstSkip()
        self.describe: Callable[[], str] | None = None  # what the first skipped step's warning says of its inputs
        given = [params] if isinstance(params, (nn.Module, Dictionaries)) else list(params)
        groups: Any = [one for g in given for one in _split(g if isinstance(g, Mapping) else {"params": g})]
        self._plain: list[int] = []  # the groups of parameters that are no SAE's
        self._complete = False
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        if not self._members:
            raise TypeError("params holds no SparseAutoencoder or Dictionaries; pass the module, or use torch.optim")
        device = self._members[0].dictionaries.W_dec.device
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._complete = True
        for member in self._members:  # only now: if construction fails, no other optimizer has lost its parameters
            member.ledger.open()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a SparseAutoencoder, `Dictionaries` or a list of other tensors, as "params", with its own settings."""
        given = param_group["params"]
        plain = isinstance(given, list) and bool(given) and all(isinstance(p, Tensor) for p in given)
        if not plain and not isinstance(given, (SparseAutoencoder, Dictionaries, HasDictionaries)):
            what = f"{type(given).__module__}.{type(given).__name__}"
            raise TypeError(
                f"params is a {what}, expected a module that is or holds a SparseAutoencoder or a module of "
                "fastsae.accelerate, or fastsae.optim.Dictionaries; pass the module itself, not its parameters(): a "
                'fused update needs to know which is which. Other parameters go into a group, {"params": [tensors]}'
            )
        settings = {**self.defaults, **{k: v for k, v in param_group.items() if k != "params"}}
        lr = settings["lr"]
        rate = 0.0 if isinstance(lr, Tensor) else lr
        checks.optimizer(self.kind, settings["betas"], settings["eps"], settings["weight_decay"], rate)
        if plain:
            super().add_param_group({**settings, "params": given})
            self._plain.append(len(self.param_groups) - 1)
            for p in given:  # each has its own count, since some may have no gradient in some steps
                self._begin_state({None: p})
            return
        member = Member(given, self.backend, self.term_bytes)
        mine = {id(p) for group in self.param_groups for p in group["params"]}
        if twice := [name for name, p in member.parameters().items() if id(p) in mine]:
            raise ValueError(f"{', '.join(twice)} of params are already in this optimizer")
        undecayed = member.dictionaries.undecayed
        named = member.parameters()
        if member.module is not None:  # in the order of its parameters(), as a torch optimizer's state has them
            order = {id(p): i for i, p in enumerate(member.module.parameters())}
            named = dict(sorted(named.items(), key=lambda item: order[id(item[1])]))
        first = [p for name, p in named.items() if name not in undecayed]
        rest = [p for name, p in named.items() if name in undecayed]
        super().add_param_group({**settings, "params": first})
        where: tuple[int, int | None] = (len(self.param_groups) - 1, None)
        if rest:
            super().add_param_group({**settings, "params": rest, "weight_decay": 0.0})
            where = (where[0], where[0] + 1)
        self._members.append(member)
        self._groups.append(where)
        me, index = weakref.ref(self), len(self._members) - 1
        member.ledger.measure = lambda: None if (optimizer := me()) is None else optimizer._measure(index)
        self._begin_state(member.parameters(), member.dictionaries)
        if self._complete:
            member.ledger.open()

    def _begin_state(self, parameters: Mapping[Any, Tensor], dictionaries: Dictionaries | None = None) -> None:
        """State of zeros, with one step count for all. dictionaries: their `main` are stepped by `update_latents_`."""
        main = {} if dictionaries is None else dictionaries.main
        turned = Dictionaries.turned_by(dictionaries)
        count = torch.zeros((), dtype=torch.int64, device=next(iter(parameters.values())).device)
        for name, p in parameters.items():
            state: dict[str, Tensor] = {"step": count}
            for letter in self.rule_letters:
                dtype = torch.promote_types(p.dtype, torch.float32)
                if name in main and self.moments == "bf16":
                    dtype = torch.bfloat16
                elif name in main and self.moments == "8bit" and p.ndim == 2:
                    dtype = torch.float8_e4m3fn
                    scales = torch.zeros(scales_shape(turned(name, p)), dtype=torch.float32, device=p.device)
                    state[f"{KEYS[letter]}_scale"] = scales
                state[KEYS[letter]] = turned(name, torch.zeros(turned(name, p).shape, dtype=dtype, device=p.device))
            self.state[p] = state

    @property
    def rule_letters(self) -> str:
        return Rule(self.kind).moments

    # -- a step -------------------------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients and the tensors kept for them."""
        super().zero_grad(set_to_none)
        for member in self._members:
            member.ledger.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every SAE that has a gradient; consumes the gradients. Returns the closure's loss, if any.

        Raises RuntimeError if a parameter was moved, cast, replaced, frozen or taken over by another optimizer since
        this one was made, and with several processes unless `independent`; ValueError for a group's bad settings.
        Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.refuse()
        for member, (main, _) in zip(self._members, self._groups, strict=True):
            if member.placement is not None:
                lr = on_device(self.param_groups[main]["lr"], member.dictionaries.W_dec) * self._factor
                gathered.check_alike(member.ledger.look(), member.placement, lr)
        tried = [self._step_member(i, self._factor) for i in range(len(self._members))]
        tried += [self._step_plain(self.param_groups[number], self._factor) for number in self._plain]
        steps = [step for step in tried if step is not None]
        if steps:
            squares, made = ([t.to(self.skipped.device) for t in ts] for ts in zip(*steps, strict=True))
            self.grad_norm = sum(squares[1:], squares[0]).sqrt()
            self.made = functools.reduce(torch.logical_and, made)
        return loss

    def step_scheduled(self, factor: Tensor | float) -> None:
        """A step with every learning rate times a factor, which may be a 0-d tensor on the device."""
        self._factor = factor
        try:
            self.step()
        finally:
            self._factor = 1.0

    def refuse(self) -> None:
        """Raises RuntimeError whenever a step would: see `step`."""
        if self._plain or any(member.placement is None for member in self._members):
            checks.one_process(self.independent)
        for group in self.param_groups:  # all before the first SAE changes
            checks.group(self.kind, group)
        for member, (main, _) in zip(self._members, self._groups, strict=True):
            self._check(member)
            member.ledger.check()
            if member.placement is not None and not member.agreed:
                member.agreed = gathered.check_settings(self, self.param_groups[main], member.placement)
        for number in self._plain:
            for i, p in enumerate(self.param_groups[number]["params"]):
                self._check_moments(f"parameter {i} of group {number}", p)
                if isinstance(p.grad, LedgerGradient) or (p.grad is not None and p.grad.layout != torch.strided):
                    what = "kept as terms of an SAE" if isinstance(p.grad, LedgerGradient) else str(p.grad.layout)
                    raise RuntimeError(
                        f"the gradient of parameter {i} of group {number} is {what}, expected an ordinary tensor; "
                        "leave that parameter to another optimizer"
                    )

    def screen_of(self, sae: SparseAutoencoder) -> KeptScreen:
        """The keeper of the low-precision copy of an SAE's encoder."""
        return next(member.screen for member in self._members if member.sae is sae)

    def _step_member(self, index: int, lr_factor: Tensor | float) -> tuple[Tensor, Tensor] | None:
        """The squared norm of its gradients, and whether the step was made; None where there was no gradient."""
        member, group = self._members[index], self.param_groups[self._groups[index][0]]
        d = member.dictionaries
        taken, placement = member.ledger.take(), member.placement
        count = self.state[d.W_dec]["step"] + 1
        numbers = {"lr": on_device(group["lr"], d.W_dec) * lr_factor, "step": count}
        if placement is not None:
            taken = gathered.of_all_tokens(taken, placement)
        others = {name: p.grad for name, p in d.others.items() if p.grad is not None}
        if taken is None and not others:
            return None
        taken = taken or Taken([], {}, None, None)
        if placement is not None:
            others = {name: placement.tokens.sum(grad) for name, grad in others.items()}
            if member.shares_latents and member.ledger.pre_bias:
                taken = gathered.with_pre_share(taken, placement, d.encoder_rows(), d.rows["W_dec"])
        given = self._arguments(index, taken)
        of_others, scale = member.squares_of(others), taken.factor
        if self.clip_norm is not None:
            squares = member.squared_norm(self._update(index, given, norms_only=True, **numbers))
            norm = (squares * _square(scale) + of_others).sqrt()
            clip = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_ has it
            scale = clip if scale is None else scale * clip
            others = {name: g * clip.to(g.dtype) for name, g in others.items()}
        made = self._finite(index, given, taken, others, scale, numbers)
        stats = self._update(index, given, grad_scale=scale, skip=~made, **numbers)
        main, rules = self._groups[index]
        for name, grad in others.items():
            its_group = self.param_groups[rules if name in d.undecayed and rules is not None else main]
            self._step_elementwise(d.others[name], grad, its_group, lr_factor, count, made)
            d.others[name].grad = None
        self.state[d.W_dec]["step"].copy_(torch.where(made, count, count - 1))
        member.screen.remember()
        member.ledger.drop()
        self._count_skipped(made)
        return member.squared_norm(stats) * _square(taken.factor) + of_others, made

    def _arguments(self, index: int, taken: Taken) -> dict[str, Any]:
        """The arguments of `update_latents_` from gradients and settings, without lr and step."""
        member, group = self._members[index], self.param_groups[self._groups[index][0]]
        d, dense, terms = member.dictionaries, taken.dense, list(taken.terms)
        latents, d_out = d.rows["W_dec"].shape
        added: list[Tensor] = []
        if "W_enc" in dense or "W_dec" in dense:
            names = ("W_dec",) if d.W_enc is None else ("W_enc", "W_dec")
            added = [dense.get(name, torch.zeros_like(d.rows[name])).contiguous() for name in names]
            added.append(torch.zeros_like(d.b_enc))
        if "b_dec" in dense:
            # A reconstruction without latents: its gradient is b_dec's alone.
            none = SparseCodes(
                d.W_dec.new_zeros(0), torch.zeros(0, dtype=torch.int32, device=d.W_dec.device), latents,
                torch.zeros(2, dtype=torch.int64, device=d.W_dec.device),
            )  # fmt: skip
            x = d.W_dec.new_zeros(1, d.encoder_rows().shape[1])
            terms.append(UpdateTerm(none, x, dense["b_dec"].reshape(1, d_out), has_bias=True))
        states, keys = {name: self.state[p] for name, p in d.main.items()}, [KEYS[one] for one in self.rule_letters]
        return {
            "terms": terms,
            "added": added,
            "db_enc": dense.get("b_enc"),
            "decoder_pull": taken.decoder_pull,
            "moments": [d.turned(name, state[key]) for name, state in states.items() for key in keys],
            "scales": [state[f"{key}_scale"] for state in states.values() for key in keys if f"{key}_scale" in state],
            "optimizer": self.kind,
            "betas": group["betas"],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "unit_norm": (d.decoder_norm if member.sae is None else member.sae.decoder_norm) == "unit",
            "pre_bias": member.ledger.pre_bias and not member.shares_latents,
            "clip_rows": self.clip_rows,
            "seed": self.seed,
            "first_latent": 0 if member.placement is None else member.placement.first,
            "screen": member.screen.screen,
            "backend": self.backend,
        }

    def _update(self, index: int, given: dict[str, Any], **more: Any) -> Tensor:
        rows = self._members[index].dictionaries.rows
        return ops.update_latents_(rows.get("W_enc"), rows["W_dec"], rows["b_enc"], rows["b_dec"], **given, **more)

    def _measure(self, index: int) -> Tensor:
        """The squared norms (4,) of the gradients so far, as a step would use them."""
        if self._members[index].placement is not None:
            raise RuntimeError(
                "the gradients of an SAE on several processes are summed in the step, so their norm is not known "
                "before; clip with clip_norm= of the optimizer, and read grad_norm after the step"
            )
        d = self._members[index].dictionaries
        given = self._arguments(index, self._members[index].ledger.peek())
        count = self.state[d.W_dec]["step"] + 1
        with torch.no_grad():
            return self._update(index, given, norms_only=True, lr=on_device(0.0, d.W_dec), step=count)

    def _finite(
        self, index: int, given: dict[str, Any], taken: Taken, others: dict[str, Tensor], scale: Tensor | None,
        numbers: dict[str, Tensor],
    ) -> Tensor:  # fmt: skip
        """Whether the step may be made: 0-d bool on the device.

        Off the CPU a bound decides, which also stops gradients within a factor 10³ of overflow; on the CPU they are
        then computed.
        """
        d = self._members[index].dictionaries
        pull = [] if taken.decoder_pull is None else [taken.decoder_pull]
        largest = largest_square(d.W_dec.dtype, narrow=self.moments != "fp32" and bool(self.rule_letters))
        bounded = gradients_are_bounded(given["terms"], [*taken.dense.values(), *pull], d.W_dec, largest)
        if bounded.device.type == "cpu" and not bool(bounded):
            # Before clip_rows, which would turn what cannot be squared into 0.
            squares = self._update(index, {**given, "clip_rows": None}, norms_only=True, **numbers).sum()
            bounded = squares <= largest
        for grad in others.values():
            bounded = bounded & can_be_squared(grad)
        if scale is not None:
            bounded = bounded & scale.isfinite()
        bounded = bounded & moves_little(self.kind, self.param_groups[self._groups[index][0]], d.W_dec, **numbers)
        placement = self._members[index].placement
        return bounded if placement is None else placement.everywhere(bounded)

    def _step_plain(self, group: dict[str, Any], lr_factor: Tensor | float) -> tuple[Tensor, Tensor] | None:
        """One step of a group of tensors that belong to no SAE. Returns as `_step_member`."""
        grads = {p: p.grad for p in group["params"] if p.grad is not None}
        if not grads:
            return None
        device = next(iter(grads)).device
        squares: Any = sum(sum_of_squares(g.reshape(1, -1)).to(device) for g in grads.values())
        made = squares.isfinite()
        for p in grads:
            numbers = {"lr": on_device(group["lr"], p) * lr_factor, "step": self.state[p]["step"] + 1}
            made = made & moves_little(self.kind, group, p, **numbers).to(device)
        clip = None if self.clip_norm is None else (self.clip_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        for p, grad in grads.items():
            clipped = grad if clip is None else grad * clip.to(grad.device, grad.dtype)
            count, here = self.state[p]["step"], made.to(p.device)
            self._step_elementwise(p, clipped, group, lr_factor, count + 1, here)
            count.add_(here.to(count.dtype))
            p.grad = None
        self._count_skipped(made)
        return squares, made

    def _step_elementwise(
        self, p: Tensor, grad: Tensor, group: dict[str, Any], lr_factor: Tensor | float, step: Tensor, made: Tensor
    ) -> None:
        """One step of one parameter, by torch's ops."""
        rule, state = Rule(self.kind, group["betas"], group["eps"], group["weight_decay"]), self.state[p]
        lr = on_device(group["lr"], p) * lr_factor
        held = [state[KEYS[letter]] for letter in self.rule_letters]
        grad = grad.to(torch.promote_types(p.dtype, torch.float32))
        wide = tuple(m.to(grad.dtype) for m in held)
        stepped, fresh = rule.stepped(p.detach().to(grad.dtype), grad, wide, lr, step)
        p.copy_(torch.where(made, stepped, p.detach().to(grad.dtype)))
        for old, new in zip(held, fresh, strict=True):
            old.copy_(torch.where(made, new, old.to(new.dtype)))

    def _count_skipped(self, made: Tensor) -> None:
        self.skipped += (~made).to(self.skipped.device)
        if not self.first_skip.said and made.device.type == "cpu" and not bool(made):
            describe = self.describe or (lambda: "look for such numbers in the inputs")
            self.first_skip(lambda: f": {describe()}")

    # -- refusals -----------------------------------------------------------------------------------------------------

    def _check(self, member: Member) -> None:
        """Raises RuntimeError for parameters that are not what they were."""
        if not member.ledger.is_open:
            raise RuntimeError(
                "another optimizer of fastsae.optim was made for these parameters later; step that one, or make a new "
                "one"
            )
        for name, now in member.current().items():
            p = member.parameters()[name]
            if now is not p:
                raise RuntimeError(f"{name} of the module was replaced since this optimizer was made; make a new one")
            if not p.requires_grad:
                raise RuntimeError(
                    f"{name} no longer requires a gradient, but a fused update steps every parameter of an SAE; "
                    "call .requires_grad_(), or use a torch optimizer on the others"
                )
            self._check_moments(name, p)

    def _check_moments(self, name: str, p: Tensor) -> None:
        for letter in self.rule_letters:
            m = self.state[p][KEYS[letter]]
            small = m.dtype in (torch.bfloat16, torch.float8_e4m3fn)
            wanted = m.dtype if small else torch.promote_types(p.dtype, torch.float32)
            if (p.device, p.shape, wanted) != (m.device, m.shape, m.dtype):
                raise RuntimeError(
                    f"{name} is {p.dtype} {tuple(p.shape)} on {p.device}, but its moments are {m.dtype} "
                    f"{tuple(m.shape)} on {m.device}: make a new optimizer after moving or casting the module, and "
                    "load its state"
                )

    # -- state --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forget_rows_(self, sae: nn.Module | Dictionaries, latents: Tensor) -> None:
        """Sets the moments of these latents (int64) of an SAE to zero, as resampling needs."""
        for member in self._members:
            if sae is not member.module and sae is not member.dictionaries:
                continue
            for name, p in member.parameters().items():
                if name in ("b_dec", "W_skip"):
                    continue
                for key, kept in self.state[p].items():
                    if key != "step":
                        t = kept if key.endswith("_scale") else member.dictionaries.turned(name, kept)
                        # 8-bit floats know no indexed writes; their bits do.
                        (t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t)[latents] = 0

    def refresh(self, encoder_input: Tensor | None = None) -> None:
        """Rebuilds the low-precision copies of the encoders. Needed only after a write that torch cannot see.

        encoder_input (N, d_in): what they will encode, for a backend that chooses its format by it.
        """
        for member in self._members:
            member.screen.make(encoder_input)

    def state_dict(self) -> dict[str, Any]:
        """As torch's: {"state", "param_groups"}. Each parameter has its own step count there."""
        found = super().state_dict()
        found["state"] = {i: {**state, "step": state["step"].clone()} for i, state in found["state"].items()}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, bit for bit; also the state of a torch optimizer over sae.parameters().

        A state without moments (a torch optimizer that made no step) is a fresh start. Raises ValueError, and changes
        nothing, where parameters, moments or their storage do not fit.
        """
        if self._optimizer_load_state_dict_pre_hooks:
            state_dict = dict(state_dict)  # which a hook may change
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        self._load(state_dict)
        for done in self._optimizer_load_state_dict_post_hooks.values():
            done(self)

    @torch.no_grad()
    @checks.reading_a_state("an optimizer of fastsae.optim")
    def _load(self, state_dict: dict[str, Any]) -> None:
        groups, saved = state_dict["param_groups"], state_dict["state"]
        ids = [i for group in groups for i in group["params"]]
        mine = [p for group in self.param_groups for p in group["params"]]
        if len(ids) != len(mine):
            raise ValueError(f"the state has {len(ids)} parameters, expected {len(mine)}")
        if len(groups) != len(self.param_groups) and (len(groups) != 1 or self._plain):
            raise ValueError(f"the state has {len(groups)} parameter groups, expected {len(self.param_groups)}")
        found = [saved[i] for i in ids if i in saved]
        if found and len(found) != len(ids):
            raise ValueError(f"the state has moments of {len(found)} of {len(ids)} parameters, expected all or none")
        pairs = []
        for number, (i, p) in enumerate(zip(ids, mine, strict=True)):
            pairs += self._fitting(number, p, saved[i]) if found else []
        plain = {id(p) for number in self._plain for p in self.param_groups[number]["params"]}
        steps = {int(saved[i]["step"]) for i, p in zip(ids, mine, strict=True) if found and id(p) not in plain}
        if len(steps) > len(self._members):
            raise ValueError(f"the parameters of an SAE made {sorted(steps)} steps, expected one number for all")
        for group in groups:
            betas, eps = tuple(group.get("betas", (0.0, 0.0))), group.get("eps", 0.0)
            checks.optimizer(self.kind, betas, eps, group.get("weight_decay", 0.0), group["lr"])
            wrong = [name for name in ("maximize", "amsgrad") if group.get(name)]
            if wrong:
                raise ValueError(f"the state is of an optimizer with {', '.join(wrong)}, which fastsae.optim lacks")
        if len(groups) == len(self.param_groups):
            for group, theirs in zip(self.param_groups, groups, strict=True):
                self._load_group(group, theirs)
        elif len(groups) == 1:  # a torch optimizer over sae.parameters()
            for group in self.param_groups:
                kept = group["weight_decay"]
                self._load_group(group, groups[0])
                group["weight_decay"] = groups[0].get("weight_decay", kept) if kept else kept
        if not found:
            for member in self._members:
                self._begin_state(member.parameters(), member.dictionaries)
            for p in (p for number in self._plain for p in self.param_groups[number]["params"]):
                self._begin_state({None: p})
        for ours, theirs in pairs:
            as_bits = ours.dtype == torch.float8_e4m3fn
            ours.view(torch.uint8 if as_bits else ours.dtype).copy_(theirs.view(torch.uint8) if as_bits else theirs)
        for member in self._members:
            member.ledger.clear()
            member.ledger.drop()

    def _load_group(self, group: dict[str, Any], theirs: Mapping[str, Any]) -> None:
        for key, value in theirs.items():
            if key == "lr" and isinstance(group["lr"], Tensor):
                group["lr"].fill_(float(value))
            elif key == "betas":
                group["betas"] = tuple(value)
            elif key != "params" and (key in group or key == "initial_lr"):  # a scheduler adds that
                group[key] = value

    def _fitting(self, number: int, p: Tensor, saved: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """Our tensors and theirs. Raises ValueError where they do not fit."""
        pairs = []
        for key, ours in self.state[p].items():
            if key not in saved:
                raise ValueError(
                    f"parameter {number} of the state has {sorted(saved)}, expected {sorted(self.state[p])}"
                )
            theirs = saved[key]
            if not isinstance(theirs, Tensor):
                theirs = torch.tensor(theirs, dtype=ours.dtype, device="cpu")
            if theirs.is_meta and not ours.is_meta:
                raise ValueError(f"{key} of parameter {number} of the state is on the meta device and has no values")
            if theirs.shape != ours.shape or (key != "step" and theirs.dtype != ours.dtype):
                raise ValueError(
                    f"{key} of parameter {number} is {theirs.dtype} {tuple(theirs.shape)}, expected {ours.dtype} "
                    f"{tuple(ours.shape)}; was it saved with other moments, or for another SAE?"
                )
            pairs.append((ours, theirs))
        if extra := set(saved) - set(self.state[p]):
            raise ValueError(
                f"parameter {number} of the state also has {sorted(extra)}, which {type(self).__name__} with "
                f"moments={self.moments!r} does not keep"
            )
        return pairs

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "an optimizer of fastsae.optim belongs to its module and cannot be copied or pickled; save its "
            "state_dict(), and load it into a new one made for the copied module"
        )


def _split(group: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A group whose params is a module that holds SAEs, as one for each SAE and one of its other parameters."""
    module = group["params"]
    if not isinstance(module, nn.Module) or isinstance(module, (SparseAutoencoder, HasDictionaries)):
        return [group]
    saes = [m for m in module.modules() if isinstance(m, (SparseAutoencoder, HasDictionaries))]
    if not saes:
        return [group]  # add_param_group refuses it
    held = {id(p) for sae in saes for p in sae.parameters()}
    others = [p for p in module.parameters() if p.requires_grad and id(p) not in held]
    return [{**group, "params": one} for one in (*saes, *([others] if others else []))]


def _square(factor: Tensor | None) -> Tensor | float:
    return 1.0 if factor is None else factor * factor


class Adam(FusedOptimizer):
    """torch.optim.Adam's formula, without weight decay (Kingma & Ba 2015). Settings: `FusedOptimizer`."""

    kind = "adam"

    def __init__(
        self, params: Any, lr: float | Tensor = 2e-4, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, **settings: Any,
    ):  # fmt: skip
        super().__init__(params, lr, betas, eps, weight_decay, **settings)


class AdamW(FusedOptimizer):
    """torch.optim.AdamW's formula: decay separate from the gradient (Loshchilov & Hutter 2019)."""

    kind = "adamw"

    def __init__(
        self, params: Any, lr: float | Tensor = 2e-4, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, **settings: Any,
    ):  # fmt: skip
        super().__init__(params, lr, betas, eps, weight_decay, **settings)


class Lion(FusedOptimizer):
    """p -= lr · sign(β₁ m + (1-β₁) g), with decay like AdamW's (Chen et al. 2023, arXiv 2302.06675)."""

    kind = "lion"

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-4, betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0, **settings: Any,
    ):  # fmt: skip
        super().__init__(params, lr, betas, 0.0, weight_decay, **settings)


class SignSGD(FusedOptimizer):
    """p -= lr · sign(g), with decay like AdamW's; it keeps no moments."""

    kind = "signsgd"

    def __init__(self, params: Any, lr: float | Tensor = 1e-4, weight_decay: float = 0.0, **settings: Any):
        super().__init__(params, lr, (0.0, 0.0), 0.0, weight_decay, **settings)


OPTIMIZERS: dict[str, type[FusedOptimizer]] = {cls.kind: cls for cls in (Adam, AdamW, Lion, SignSGD)}
"""By the names that TrainConfig and `FusedTrainStep` take."""

__all__ = ["OPTIMIZERS", "Adam", "AdamW", "Dictionaries", "FusedOptimizer", "Lion", "SignSGD"]
