"""The interface of an activation rule, and what the rules share.

A rule is a small frozen dataclass whose fields are its settings. It says which latents are considered (`select`,
sparse, and `dense`, for the reference), how strong they are (`activate`, elementwise), what is penalized (`sparsity`,
elementwise, and `penalty`), and which parts of a code must reconstruct on their own (`parts`). The elementwise methods
work on the slots of a code and on the dense (N, M), so a rule's mathematics is written once: autograd, the fused step
and the dense reference all use it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from fastsae import ops, reference
from fastsae.codes import Screen, SparseCodes
from fastsae.model.placement import Placement
from fastsae.ops import HeldScreen

RuleState = Mapping[str, Tensor]
"""A rule's parameters and buffers by name, and b_enc; "norms" too where it `selects_by_norm`."""

ACTIVATIONS: dict[str, type[Activation]] = {}
"""Every rule by its `kind`. A rule is registered when its class is defined."""

ROOM = 256
"""Initial capacity of a threshold's code, in activations per token; if it is too small, encoding repeats with more."""


class Selected(NamedTuple):
    """codes: the pre-acts of the latents considered; overflow: 0-d bool, whether a given capacity was too small."""

    codes: SparseCodes
    overflow: Tensor | None = None


class Sample(NamedTuple):
    """Statistics of the first training batch's pre-acts at random directions, for `Activation.start`.

    mean, std (M,) float64: of each latent's pre-acts. bar(l0): the threshold, in standard deviations above each
    latent's mean, that l0 latents exceed on average over the batch.
    """

    mean: Tensor
    std: Tensor
    bar: Callable[[float], float]


@dataclass(frozen=True)
class EncodeOptions:
    """How an encoder computes: arguments of the encoders of fastsae.ops. Not settings of a rule, and not saved.

    pre_bias (D,): b_dec, where x is x₀ - b_dec and the encoder computes b_dec's gradient.
    placement: W is a part of the dictionary, or x of the batch, and latents compete with those of other processes.
    """

    screen: Screen | HeldScreen | None = None
    precision: str = "exact"
    backend: str | None = None
    pre_bias: Tensor | None = None
    placement: Placement | None = None

    def arguments(self) -> dict[str, Any]:
        names = ("screen", "precision", "backend", "pre_bias")
        return {name: getattr(self, name) for name in names}


class Activation(ABC):
    """The base class. `kind` is the name in saved files; `shaped`: acts are not pre-acts, or there is a penalty.

    coef: the penalty's weight in the loss, if it is fixed (see `weight`). The methods' defaults are those of a rule
    without that feature.
    A subclass with a `kind` is registered under it. Raises TypeError if another rule has that kind.
    """

    kind: ClassVar[str]
    shaped: ClassVar[bool] = False

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "kind" not in cls.__dict__:
            return
        other = ACTIVATIONS.get(cls.kind, cls)
        # Reloading a module or rerunning a notebook cell defines the same class again.
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"{cls.__qualname__} has kind = {cls.kind!r}, but so has {other.__qualname__}; rename one")
        ACTIVATIONS[cls.kind] = cls

    @classmethod
    def variants(cls) -> dict[str, dict[str, type[Activation]]]:
        """The rule's names on the command line; for each, the class of every field that holds a rule."""
        return {cls.kind: {}}

    @property
    def coef(self) -> float:
        return 0.0

    @property
    def needs_norms(self) -> bool:
        """Whether `sparsity` reads the norms of the decoder's rows."""
        return False

    @property
    def selects_by_norm(self) -> bool:
        """Whether `select` and `dense` read those norms, held fixed: "norms" (M,) in their rule_state."""
        return False

    @property
    def penalizes(self) -> bool:
        """Whether the rule defines `sparsity`."""
        return type(self).sparsity is not Activation.sparsity

    @property
    def penalty_is_mean(self) -> bool:
        """Whether `penalty` is the mean itself, so that it may be summed piece by piece."""
        return True

    @property
    def screened(self) -> bool:
        """Whether `select` uses the screen in its options."""
        return True

    @property
    def screen_k(self) -> int | None:
        """Active latents per token, for a backend that chooses its screen by it; None where a threshold decides."""
        return None

    @property
    def asked_l0(self) -> float | None:
        """The target mean L0 at inference, from the settings; None: they set none."""
        return None

    @property
    def from_data(self) -> bool:
        """Whether `start` sets parameters and buffers from the first training batch; there is a buffer `start_done`."""
        return False

    @property
    def mean_k(self) -> int | None:
        """The mean L0 that the buffer `threshold` stands for at inference; None: there is no such threshold."""
        return None

    def apart(self, rule_state: RuleState, training: bool) -> bool:
        """Whether each latent's act depends only on its own pre-act, so that some can be encoded without the others."""
        return False

    def considered(self, pre: Tensor, rows: RuleState) -> Tensor:
        """Which pre-acts `select` returns in training, for a threshold rule: bool. NaN is one of them."""
        return reference.is_above(pre, pre.new_zeros(()))

    @abstractmethod
    def check(self, d_sae: int) -> None:
        """Raises ValueError when the rule does not fit `d_sae` latents."""

    def new_parameters(self, d_sae: int) -> dict[str, Tensor]:
        """The rule's own parameters at the start, by name: float32 (d_sae,)."""
        return {}

    def new_buffers(self) -> dict[str, Tensor]:
        """The rule's buffers at the start, by name: 0-d."""
        return {}

    def with_k(self, k: int) -> Activation:
        """The same rule with another number of active latents, for annealing. Raises ValueError if it has no k."""
        raise ValueError(f"{type(self).__name__} has no k to anneal; TopK, AbsTopK, BatchTopK and Matryoshka have one")

    @abstractmethod
    def select(
        self,
        x: Tensor,
        W: Tensor,
        b: Tensor,
        rule_state: RuleState,
        training: bool,
        options: EncodeOptions,
        capacity: int | None = None,
    ) -> Selected:
        """The pre-acts that matter in forward or backward, for x (N, D), W (M, D), b (M,); differentiable in all three.

        capacity: slots of a threshold's ragged code; None: as many as needed, which is a host sync.
        """

    def per_latent(self, rule_state: RuleState) -> dict[str, Tensor]:
        """The per-latent inputs of `activate` and `sparsity`: (M,) each."""
        return {}

    def activate(self, pre: Tensor, rows: RuleState) -> Tensor:
        """acts from pre-acts, elementwise; rows: `per_latent`, each broadcast to pre."""
        return pre

    def sparsity(self, pre: Tensor, acts: Tensor, rows: RuleState, norms: Tensor) -> Tensor | None:
        """What the penalty sums over latents, elementwise; norms: those of the decoder's rows."""
        return None

    def penalty(self, mean: Tensor) -> Tensor:
        """The penalty, before its coefficient, from `sparsity` summed over latents and averaged over tokens."""
        return mean

    def gate(self, pre: Tensor) -> Tensor | None:
        """Acts that must reconstruct the target too, with the decoder held fixed."""
        return None

    def parts(self, codes: SparseCodes, rule_state: RuleState) -> list[tuple[SparseCodes, float]]:
        """Disjoint parts of a code, each with a weight: that of the error of this and all earlier parts together."""
        return [(codes, 1.0)]

    def measure(self, codes: SparseCodes) -> Tensor | None:
        """The statistic of a training batch's code that `observe` needs: 0-d float32, infinite if there is none; None
        for a rule that needs none. It is averaged over processes. No gradient, no host sync.
        """
        return None

    def observe(self, measured: Tensor | None, rule_state: RuleState, made: Tensor) -> None:  # noqa: B027 (most have none)
        """Updates the rule's buffers in place when a training batch counts; no gradient, no host sync.

        measured: from `measure`. made: bool on the device, whether the batch counts; if not, the buffers do not change.
        """

    def weight(self, rule_state: RuleState) -> Tensor | float:
        """The penalty's weight in the loss: `coef`, or a 0-d tensor if the rule adjusts it."""
        return self.coef

    def start(self, rule_state: RuleState, sample: Sample) -> None:
        """Sets b_enc and the rule's parameters, in place, from the first batch; see `from_data`."""
        raise NotImplementedError(f"{type(self).__name__} does not start from data")

    @property
    def rescales(self) -> bool:
        """Whether W_enc may be rescaled when the rule starts from data."""
        return True

    def stretch(self, rule_state: RuleState, factor: float) -> None:
        """Multiplies b_enc and the rule's parameters, in place, so that factor · W_enc gives factor · acts."""
        raise NotImplementedError(f"{type(self).__name__} does not start from data")

    def start_weight(self, rule_state: RuleState, zero: float, penalty: float) -> None:
        """Sets the first `weight`. zero: the loss of reconstructing the mean alone; penalty: before its weight."""
        raise NotImplementedError(f"{type(self).__name__} does not start from data")

    def steer(self, rule_state: RuleState, l0: Tensor, made: Tensor) -> None:  # noqa: B027 (most drive nothing)
        """Updates the weight of the penalty in place after a training batch of that mean L0, 0-d float64.

        made: as for `observe`. No host sync.
        """

    @abstractmethod
    def dense(self, pre: Tensor, rows: RuleState, rule_state: RuleState, training: bool) -> Tensor:
        """A (*B, N, M) from all pre-acts: the dense reference of `select` and `activate`."""

    def dense_parts(self, A: Tensor, rule_state: RuleState) -> list[tuple[Tensor, float]]:
        """`parts` of a dense code."""
        return [(A, 1.0)]

    def config(self) -> dict[str, Any]:
        """The settings as JSON, with `kind`; `activation_from_config` reads it back."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {"kind": self.kind} | {
            name: value.config() if isinstance(value, Activation) else value for name, value in values.items()
        }


def select_topk(x: Tensor, W: Tensor, b: Tensor, k: int, options: EncodeOptions, **more: Any) -> SparseCodes:
    """`ops.encode_topk`, among the latents of all processes if they share the dictionary; more: its `rows`."""
    placement = options.placement
    if placement is None or placement.latents.size == 1:
        return ops.encode_topk(x, W, b, k, **more, **options.arguments())
    most = placement.local_k(k)
    own: dict[str, Any] = {**options.arguments(), **more, "pre_bias": None}

    def chosen(x: Tensor, W: Tensor, b: Tensor) -> SparseCodes:
        return placement.topk(ops.encode_topk(x, W, b, most, **own), k)

    return ops.encode_by(chosen, x, W, b, pre_bias=options.pre_bias, backend=options.backend)


def whole_number(rule: str, name: str, value: object) -> None:
    """Raises ValueError unless value is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{rule} has {name} = {value!r}, expected a whole number of at least 1")


def number(rule: str, name: str, value: float, *, positive: bool = False) -> None:
    """Raises ValueError unless value is a finite number of at least 0, or above 0 if positive."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")
    if not good or (positive and value == 0):
        raise ValueError(f"{rule} has {name} = {value!r}, expected a number {'above' if positive else 'of at least'} 0")


def fits(rule: str, name: str, k: int, d_sae: int) -> None:
    """Raises ValueError where k is more than d_sae."""
    if k > d_sae:
        raise ValueError(f"{rule} has {name} = {k}, expected at most d_sae = {d_sae}; lower {name} or widen the SAE")


def select_above(
    x: Tensor, W: Tensor, b: Tensor, threshold: Tensor | float, options: EncodeOptions, capacity: int | None
) -> Selected:
    """`ops.encode_above` with room for everything above, or with `capacity` slots and an overflow flag."""
    if capacity is not None:
        return Selected(*ops.encode_above(x, W, b, threshold, capacity, **options.arguments()))
    most = x.shape[0] * W.shape[0]
    room = min(most, ROOM * x.shape[0])
    while True:
        codes, overflow = ops.encode_above(x, W, b, threshold, room, **options.arguments())
        if room == most or not bool(overflow):  # under torch.compile a graph break
            return Selected(codes.trimmed())
        room = min(most, 8 * room)
