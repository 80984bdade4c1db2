"""TrainConfig: every setting of a training run, typed and documented; `fastsae train --help` is made from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fastsae.runs.boards import check_wandb
from fastsae.runs.schedules import AnnealK, Schedule, inverse_sqrt_lr


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Raises ValueError at construction for values that do not fit."""

    steps: int | None = None
    """Number of updates, skipped ones included. Left out: as many as `tokens` needs, or else one pass over the data."""
    tokens: int | None = None
    """Tokens to train on, rounded up to whole batches; the data repeats if it is shorter."""
    batch_size: int = 4096
    """Tokens per update."""
    lr: float = 2e-4
    """Peak learning rate."""
    lr_rule: Literal["fixed", "inverse_sqrt"] = "fixed"
    """Use lr as given, or multiply it by √(2¹⁴ / d_sae): an lr chosen for 16,384 latents, scaled to other sizes."""
    optimizer: Literal["adam", "adamw", "lion", "signsgd"] = "adam"
    """The optimizer. With fused off, only adam and adamw."""
    betas: tuple[float, float] = (0.9, 0.999)
    """The two decay rates of Adam, AdamW or Lion."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay, for every optimizer except adam."""
    clip_norm: float | None = None
    """Clip the norm of all gradients together to this; costs a second backward pass. Left out: no clipping."""
    clip_rows: float | None = None
    """Clip the norm of each latent's gradient in each dictionary to this. Left out: no clipping."""
    penalty_warmup: int = 0
    """Updates over which the activation's penalty (L1, L0) rises linearly from 0."""
    k_start: int | None = None
    """K of the first update, annealed to the activation's own over `k_anneal` updates. Left out: no annealing."""
    k_anneal: int = 1000
    """Updates over which K is annealed."""
    resample_at: tuple[int, ...] = ()
    """Updates after which dead latents are resampled at badly reconstructed inputs."""
    resample_rows: int = 65_536
    """Number of upcoming rows to choose from when resampling; training uses them again afterwards."""
    warmup: int = 0
    """Updates over which the learning rate rises linearly from 0."""
    decay: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate falls at the end. Only a "constant" run can be extended later."""
    decay_fraction: float = 0.2
    """Share of the updates, at the end, over which the learning rate falls to 0."""
    moments: Literal["fp32", "bf16", "8bit"] = "fp32"
    """The optimizer's moments: fp32, or with stochastic rounding bf16 (half the memory) or 8bit (a quarter)."""
    fused: bool = True
    """Use one fused call per update. Off: autograd and torch.optim, slower, with the same learning curve."""
    backend: str | None = None
    """Backend of the ops, see `fastsae info`. Left out: the fastest that supports them."""
    init_b_dec: Literal["mean", "geometric_median", "zero"] = "mean"
    """Initial b_dec: the centre of the first batch, or zero. A b_dec that is already not zero is kept."""
    seed: int = 0
    """Seed of torch's generator and the stochastic rounding. The module and the source have their own seeds."""
    threads: int | None = None
    """CPU threads of torch and of the engine; the engine's results do not depend on it. Left out: torch's default."""
    log_every: int = 10
    """Updates per line of metrics.jsonl."""
    eval_every: int = 500
    """Updates per evaluation on the held-out rows; also one at the end. 0: never."""
    checkpoint_every: int = 500
    """Updates per checkpoint; also one at the end."""
    keep: int = 2
    """How many of the newest checkpoints to keep."""
    tensorboard: bool = True
    """Write TensorBoard events under tensorboard/."""
    wandb: str | None = None
    """Weights & Biases project to log the metrics to; needs the package wandb. Left out: none."""
    progress: bool = True
    """Show a progress bar on stderr."""

    def __post_init__(self) -> None:
        for name in ("steps", "tokens", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1, or none")
        for name, least in (("batch_size", 1), ("log_every", 1), ("eval_every", 0), ("checkpoint_every", 1),
                            ("keep", 1), ("warmup", 0), ("seed", 0), ("penalty_warmup", 0), ("k_anneal", 1),
                            ("resample_rows", 1)):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")
        check_wandb(self.wandb)
        if self.steps is not None and self.tokens is not None:
            raise ValueError(f"steps is {self.steps} and tokens is {self.tokens}; give one of them")
        for name in ("clip_norm", "clip_rows"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}, expected a number above 0, or none")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr is {self.lr}, expected a number above 0")
        if not self.fused:
            if self.moments != "fp32":
                raise ValueError(
                    f"moments={self.moments!r} needs fused=True: torch.optim.Adam keeps them in the weights' dtype"
                )
            if self.optimizer not in ("adam", "adamw"):
                raise ValueError(f"optimizer={self.optimizer!r} needs fused=True; without it, use adam or adamw")
            if self.clip_rows is not None:
                raise ValueError(f"clip_rows={self.clip_rows} needs fused=True; without it, use clip_norm")
        if self.k_start is not None and self.k_start < 1:
            raise ValueError(f"k_start is {self.k_start}, expected at least 1, or none")
        if any(at < 1 for at in self.resample_at):
            raise ValueError(f"resample_at is {self.resample_at}, expected updates from 1 on")

    def total_steps(self, n_tokens: int | None) -> int:
        """The number of updates of a whole run on `n_tokens` rows (None: endless, so steps or tokens must be set)."""
        if self.steps is not None:
            return self.steps
        tokens = self.tokens or n_tokens
        if tokens is None:
            raise ValueError("the source is endless, so the number of updates is unknown; set steps or tokens")
        return math.ceil(tokens / self.batch_size)

    def schedule(self, total: int) -> Schedule:
        """The learning rate's multiplier over `total` updates. Raises ValueError if the warm-up is longer."""
        return Schedule(total, self.warmup, self.decay, self.decay_fraction)

    def penalty_schedule(self) -> Schedule | None:
        """The penalty's multiplier, or None if it is always 1."""
        return Schedule(self.penalty_warmup, self.penalty_warmup) if self.penalty_warmup else None

    def rate(self, d_sae: int) -> float:
        """The peak learning rate for d_sae latents."""
        return self.lr if self.lr_rule == "fixed" else inverse_sqrt_lr(self.lr, d_sae)

    def k_schedule(self, k: int | None) -> AnnealK | None:
        """K over the updates, down or up to k. Raises ValueError for a rule without K."""
        if self.k_start is None:
            return None
        if k is None:
            raise ValueError(f"k_start is {self.k_start}, but the activation has no K to anneal; leave k_start out")
        return AnnealK(self.k_start, k, self.k_anneal)

    def why_not_free(self) -> dict[str, str]:
        """For some of the settings that may not change when a run resumes: why not, and what would allow it."""
        if self.decay == "constant":
            return {}
        what = (
            f"with decay = {self.decay} the learning rate of every step depends on the length of the whole run, so it "
            "cannot be made longer or shorter; only a run started with --decay constant can"
        )
        return {"train.steps": what, "train.tokens": what}

    def free_settings(self) -> set[str]:
        """Names of settings that may change when a run resumes: the weights do not depend on them.

        (Only torch's own products depend on the number of threads, in the last bits: those of fused=False, of a
        threshold rule's dense steps, of a skip connection, and of a live language model.)
        """
        free = {"threads", "log_every", "eval_every", "checkpoint_every", "keep", "tensorboard", "wandb", "progress"}
        # With a decay, the rate of every step so far may depend on the total.
        return free | {"steps", "tokens"} if self.decay == "constant" else free
