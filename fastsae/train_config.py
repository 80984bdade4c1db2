"""TrainConfig: every setting of a training run, typed and documented; `fastsae train --help` is made from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .schedules import Schedule


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Raises ValueError at construction for values that do not fit."""

    steps: int | None = None
    """Updates to make. Left out: as many as `tokens` needs, or else one pass through the data."""
    tokens: int | None = None
    """Tokens to train on, rounded up to whole batches; the data is repeated when there is less of it."""
    batch_size: int = 4096
    """Tokens per update."""
    lr: float = 2e-4
    """Peak learning rate of Adam."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's two decay rates."""
    eps: float = 1e-8
    """Adam's epsilon."""
    warmup: int = 0
    """Updates over which the learning rate rises linearly from 0."""
    decay: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate falls at the end. Only a "constant" run can be given more steps later."""
    decay_fraction: float = 0.2
    """Share of the updates, at the end, over which it falls to 0."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Adam's moments: fp32, or bf16 with stochastic rounding, which takes half the memory."""
    fused: bool = True
    """One fused call per update. Off: autograd and torch.optim.Adam, slower, the same curve."""
    backend: str | None = None
    """Who computes the ops, see `fastsae info`. Left out: the fastest that supports them."""
    init_b_dec: Literal["mean", "geometric_median", "zero"] = "mean"
    """Where b_dec starts: at the centre of the first batch, or at zero. A b_dec that is not zero is kept."""
    seed: int = 0
    """Seeds torch's generator and the stochastic rounding. The module and the source have seeds of their own."""
    threads: int | None = None
    """CPU threads of torch and of the engine, whose results do not depend on it. Left out: as torch has it."""
    log_every: int = 10
    """Updates per line of metrics.jsonl."""
    eval_every: int = 500
    """Updates per evaluation on the held-out rows; there is one at the end too. 0: never."""
    checkpoint_every: int = 500
    """Updates per checkpoint; there is one at the end too."""
    keep: int = 2
    """Newest checkpoints that stay on the disk."""
    tensorboard: bool = True
    """Write TensorBoard events under tensorboard/."""
    progress: bool = True
    """Show a progress bar on stderr."""

    def __post_init__(self) -> None:
        for name in ("steps", "tokens", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1, or none")
        for name, least in (("batch_size", 1), ("log_every", 1), ("eval_every", 0), ("checkpoint_every", 1),
                            ("keep", 1), ("warmup", 0), ("seed", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")
        if self.steps is not None and self.tokens is not None:
            raise ValueError(f"steps is {self.steps} and tokens is {self.tokens}; give one of them")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr is {self.lr}, expected a number above 0")
        if self.moments == "bf16" and not self.fused:
            raise ValueError(
                "moments='bf16' needs fused=True: torch.optim.Adam keeps its moments in the weights' dtype"
            )

    def total_steps(self, n_tokens: int | None) -> int:
        """The updates of a whole run on a source of `n_tokens` rows (None: endless, and the length must be set)."""
        if self.steps is not None:
            return self.steps
        tokens = self.tokens or n_tokens
        if tokens is None:
            raise ValueError("the source is endless and says no length; set steps or tokens")
        return math.ceil(tokens / self.batch_size)

    def schedule(self, total: int) -> Schedule:
        """The learning rate's multiplier over `total` updates. Raises ValueError where the warm-up is longer."""
        return Schedule(total, self.warmup, self.decay, self.decay_fraction)

    def free_settings(self) -> set[str]:
        """Names that may change when a run goes on: the weights do not depend on them.

        (On the number of threads only torch's own products do, in the last bits: those of fused=False and of a model
        whose activations are taken live.)
        """
        free = {"threads", "log_every", "eval_every", "checkpoint_every", "keep", "tensorboard", "progress"}
        # With a decay, the rate of every step so far may depend on where the end lies.
        return free | {"steps", "tokens"} if self.decay == "constant" else free
