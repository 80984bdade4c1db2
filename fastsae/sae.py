"""SparseAutoencoder: x̂ = A W_dec + b_dec,  A = activation((x - b_dec) W_encᵀ + b_enc), as an ordinary `nn.Module`.

Both dictionaries are stored (M, D), one latent per contiguous row. The module works on normalised inputs, and its
loss is measured there; `recon` is in the caller's units. Nothing in a forward pass reads a number back from the device.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsae import losses, ops
from fastsae.activations import Activation, activation_from_config
from fastsae.codes import SparseCodes
from fastsae.initial import geometric_median, unit_rows
from fastsae.normalize import InputNorm, TokenStats

DECODER_NORMS = ("unit", "free")
_SETTINGS = ("d_in", "d_sae", "d_out", "pre_bias", "decoder_norm", "tied", "aux_k", "aux_coef", "dead_after", "loss")


class SAEOutput(NamedTuple):
    """What `sae(x)` returns.

    recon (*batch, d_out) in the units of the target; loss: 0-d, what to minimise; losses: its parts before their
    coefficients ("mse" or "fvu", and "aux" when training with AuxK).
    """

    recon: Tensor
    codes: SparseCodes
    loss: Tensor
    losses: dict[str, Tensor]


class Inputs(NamedTuple):
    """x made ready: encoder_input = x_normalised - b_dec (pre-bias), target normalised, and the way back."""

    encoder_input: Tensor
    target: Tensor
    stats: TokenStats | None


class SparseAutoencoder(nn.Module):
    """A sparse autoencoder of `d_sae` latents; with `target=` in its call, a transcoder.

    activation    the rule that picks latents, e.g. `TopK(32)`.
    d_out         width of the target; None: d_in.
    pre_bias      subtract b_dec from the input before encoding; needs d_out == d_in.
    decoder_norm  "unit": rows of W_dec have norm 1. They start so and the fused step keeps them so; with a torch
                  optimizer call `project_gradients_()` before and `normalize_decoder_()` after its step. "free": no
                  constraint, and both helpers do nothing.
    normalize     "none"; "constant": one factor making the mean of ‖x‖² equal d_in (`calibrate_`); "layer_norm": each
                  token, undone in the reconstruction.
    tied          the encoder reads the decoder's rows: `W_enc` is None and `encoder_weight` is W_dec.
    aux_k         latents per token in the AuxK loss on dead latents; None: no such loss. aux_coef: its weight.
    dead_after    tokens without firing after which a latent counts as dead.
    loss          "mse": mean over tokens of the summed squared error; "fvu": the same over the batch's variance.
    seed          of the initial weights; None: torch's global generator.

    Parameters: W_enc (M, d_in), W_dec (M, d_out), b_enc (M,), b_dec (d_out,). Buffer: tokens_since_fired (M,) int64.
    `backend` and `precision` are plain attributes handed to the ops; they are choices of a run and are not saved.
    Raises ValueError for settings that do not fit together.
    """

    W_enc: nn.Parameter | None
    tokens_since_fired: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        activation: Activation,
        *,
        d_out: int | None = None,
        pre_bias: bool = True,
        decoder_norm: str = "unit",
        normalize: str = "none",
        tied: bool = False,
        aux_k: int | None = None,
        aux_coef: float = 1 / 32,
        dead_after: int = 10_000_000,
        loss: str = "mse",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ):
        super().__init__()
        self.d_in, self.d_sae, self.d_out = d_in, d_sae, d_in if d_out is None else d_out
        self.activation = activation
        self.pre_bias, self.decoder_norm, self.tied = pre_bias, decoder_norm, tied
        self.aux_k, self.aux_coef, self.dead_after, self.loss = aux_k, aux_coef, dead_after, loss
        self._check_settings()
        self.backend: str | None = None
        self.precision = "exact"
        factory: dict[str, Any] = {"dtype": dtype, "device": device}
        self.norm = InputNorm(normalize, **factory)
        self.W_dec = nn.Parameter(torch.empty(d_sae, self.d_out, **factory))
        self.register_parameter("W_enc", None if tied else nn.Parameter(torch.empty(d_sae, d_in, **factory)))
        self.b_enc = nn.Parameter(torch.empty(d_sae, **factory))
        self.b_dec = nn.Parameter(torch.empty(self.d_out, **factory))
        self.register_buffer("tokens_since_fired", torch.zeros(d_sae, dtype=torch.int64, device=device))
        self.reset_parameters(seed)

    def _check_settings(self) -> None:
        for name in ("d_in", "d_sae", "d_out", "dead_after"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1")
        for name in ("pre_bias", "tied"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected True or False")
        if not isinstance(self.activation, Activation):
            raise ValueError(f"activation is {self.activation!r}, expected a rule such as fastsae.TopK(32)")
        self.activation.check(self.d_sae)
        if self.decoder_norm not in DECODER_NORMS:
            raise ValueError(f"decoder_norm is {self.decoder_norm!r}, expected one of {', '.join(DECODER_NORMS)}")
        if self.loss not in losses.LOSSES:
            raise ValueError(f"loss is {self.loss!r}, expected one of {', '.join(losses.LOSSES)}")
        if self.d_out != self.d_in:
            sizes = f"d_in = {self.d_in} and d_out = {self.d_out}"
            if self.tied:
                raise ValueError(f"tied weights need one width, got {sizes}; pass tied=False")
            if self.pre_bias:
                raise ValueError(f"the pre-bias subtracts b_dec from x, got {sizes}; pass pre_bias=False")
        if self.aux_k is not None and not 1 <= self.aux_k <= self.d_sae:
            raise ValueError(f"aux_k is {self.aux_k}, expected 1 <= aux_k <= d_sae = {self.d_sae}, or None")
        if not (math.isfinite(self.aux_coef) and self.aux_coef >= 0):
            raise ValueError(f"aux_coef is {self.aux_coef}, expected a number of at least 0")

    # -- construction -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """W_dec: random directions of norm 1; W_enc: the same rows (its own where the widths differ); biases 0.

        Drawn on the CPU, so that a seed means the same weights on every device. Source: Gao et al. 2024, section 2.4.
        """
        nn.init.zeros_(self.b_enc)
        nn.init.zeros_(self.b_dec)
        self.tokens_since_fired.zero_()
        if self.W_dec.is_meta:
            return
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.W_dec.copy_(unit_rows(self.d_sae, self.d_out, self.W_dec.dtype, generator))
        if self.W_enc is not None:
            same = self.d_in == self.d_out
            self.W_enc.copy_(self.W_dec if same else unit_rows(self.d_sae, self.d_in, self.W_enc.dtype, generator))

    @property
    def config(self) -> dict[str, Any]:
        """The settings as JSON: what `from_config` needs to build an SAE that `state_dict()` fits."""
        settings = {name: getattr(self, name) for name in _SETTINGS}
        return settings | {"activation": self.activation.config(), "normalize": self.norm.mode}

    @classmethod
    def from_config(cls, config: dict[str, Any], **factory: Any) -> SparseAutoencoder:
        """An SAE with the settings of `config`; `factory`: dtype, device, seed. Raises ValueError for bad settings."""
        if not isinstance(config, dict) or "activation" not in config:
            raise ValueError(f"got the settings {config!r}, expected an object with d_in, d_sae, activation, ...")
        try:
            return cls(**{**config, "activation": activation_from_config(config["activation"])}, **factory)
        except TypeError as error:
            raise ValueError(f"the settings do not fit a SparseAutoencoder: {error}") from error

    @torch.no_grad()
    def calibrate_(self, x: Tensor) -> SparseAutoencoder:
        """Estimates the factor of normalize="constant" from sample inputs x (n, d_in); nothing in other modes."""
        self.norm.calibrate_(self._checked(x, self.d_in, "x"))
        return self

    @torch.no_grad()
    def init_from_(self, x: Tensor, target: Tensor | None = None, how: str = "mean") -> SparseAutoencoder:
        """Sets b_dec to the centre of sample inputs x (n, d_in), or of their targets: "mean" or "geometric_median".

        Call it after `calibrate_`. Raises ValueError for an empty sample or a centre that is not finite. Syncs.
        """
        if how not in ("mean", "geometric_median"):
            raise ValueError(f"how is {how!r}, expected 'mean' or 'geometric_median'")
        points = self.inputs(x, target).target.double()
        centre = points.mean(0) if how == "mean" else geometric_median(points)
        if not bool(torch.isfinite(centre).all()):
            raise ValueError(f"the {how} of a sample of shape {tuple(x.shape)} is not finite; pass finite activations")
        self.b_dec.copy_(centre)
        return self

    # -- the forward pass -------------------------------------------------------------------------------------------

    @property
    def encoder_weight(self) -> nn.Parameter:
        """The dictionary that the encoder reads (M, d_in): W_enc, or W_dec when tied."""
        return self.W_dec if self.W_enc is None else self.W_enc

    def _checked(self, x: Tensor, width: int, name: str) -> Tensor:
        """x in the weights' dtype. Raises ValueError or TypeError when its shape, dtype or device does not fit."""
        if x.ndim < 2 or x.shape[-1] != width:
            hint = "; for one token pass its row as a batch, x[None]" if x.ndim == 1 else ""
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (*batch, {width}){hint}")
        if not x.is_floating_point():
            raise TypeError(f"{name} has dtype {x.dtype}, expected a floating-point one")
        if x.device != self.W_dec.device:
            raise ValueError(f"{name} is on {x.device}, the SAE on {self.W_dec.device}; move one of them")
        return x.to(self.W_dec.dtype)

    def _normal(self, x: Tensor) -> tuple[Tensor, TokenStats | None]:
        """x (*batch, d_in) as normalised tokens (N, d_in), and their statistics."""
        flat = self._checked(x, self.d_in, "x").reshape(-1, self.d_in)
        stats = self.norm.statistics(flat)
        return self.norm.normalize(flat, stats), stats

    def inputs(self, x: Tensor, target: Tensor | None = None) -> Inputs:
        """x (*batch, d_in) and its target (*batch, d_out; None: x itself), flattened to tokens and made ready."""
        goal, stats = self._normal(x)
        encoder_input = goal - self.b_dec if self.pre_bias else goal
        if target is not None:
            if target.shape[:-1] != x.shape[:-1]:
                raise ValueError(f"target has shape {tuple(target.shape)}, expected {(*x.shape[:-1], self.d_out)}")
            goal = self.norm.normalize(self._checked(target, self.d_out, "target").reshape(-1, self.d_out), stats)
        elif self.d_out != self.d_in:
            raise ValueError(f"d_out = {self.d_out} is not d_in = {self.d_in}; pass target= of shape (*batch, d_out)")
        return Inputs(encoder_input, goal, stats)

    def _encode(self, encoder_input: Tensor) -> SparseCodes:
        return self.activation.encode(
            encoder_input, self.encoder_weight, self.b_enc, precision=self.precision, backend=self.backend
        )

    def encode(self, x: Tensor) -> SparseCodes:
        """The sparse code of x (*batch, d_in)."""
        normal, _ = self._normal(x)
        return self._encode(normal - self.b_dec if self.pre_bias else normal).with_batch(tuple(x.shape[:-1]))

    def decode(self, codes: SparseCodes, like: Tensor | None = None) -> Tensor:
        """The reconstruction (*batch, d_out) of a code.

        like: the input that was encoded; only normalize="layer_norm" needs it, to undo itself token by token.
        """
        stats = None
        if self.norm.mode == "layer_norm" and like is None:
            raise ValueError("normalize='layer_norm' needs the encoded input to undo it: sae.decode(codes, like=x)")
        if self.norm.mode != "none":
            stats = self.norm.statistics(self.b_dec if like is None else self._checked(like, self.d_in, "like"))
        return self.norm.restore(ops.decode(codes, self.W_dec, backend=self.backend) + self.b_dec, stats)

    def forward(self, x: Tensor, target: Tensor | None = None) -> SAEOutput:
        """Encode, decode and measure; in training mode also count which latents fired and add the AuxK term."""
        encoder_input, goal, stats = self.inputs(x, target)
        codes = self._encode(encoder_input)
        recon = ops.decode(codes, self.W_dec, backend=self.backend) + self.b_dec
        over = losses.normaliser(self.loss, goal)
        total = losses.squared_error(recon, goal) / over
        parts = {self.loss: total}
        if self.training:
            self.note_fired_(codes)
            if self.aux_k is not None:
                parts["aux"] = self._aux_loss(encoder_input, goal - recon, over)
                total = total + self.aux_coef * parts["aux"]
        batch = tuple(x.shape[:-1])
        restored = self.norm.restore(recon, stats).reshape(*batch, self.d_out)
        return SAEOutput(restored, codes.with_batch(batch), total, parts)

    def _aux_loss(self, encoder_input: Tensor, error: Tensor, over: Tensor | int) -> Tensor:
        assert self.aux_k is not None
        dead = self.dead
        codes = losses.encode_dead(
            encoder_input, self.encoder_weight, self.b_enc, dead, self.aux_k,
            precision=self.precision, backend=self.backend,
        )  # fmt: skip
        if codes is None:
            return encoder_input.new_zeros(())
        return losses.aux_k(codes, self.W_dec, error, losses.aux_weight(dead, self.aux_k), over)

    # -- dead latents and the decoder's norm --------------------------------------------------------------------------

    @property
    def dead(self) -> Tensor:
        """Latents that have not fired for `dead_after` tokens: bool (M,)."""
        return self.tokens_since_fired >= self.dead_after

    @torch.no_grad()
    def note_fired_(self, codes: SparseCodes) -> None:
        """tokens_since_fired += N, then 0 for every latent that is active in `codes`."""
        active = codes.occupied() & (codes.acts != 0)
        # Empty slots all point one past the last latent. Every write writes True, so their order does not matter.
        fired = torch.zeros(self.d_sae + 1, dtype=torch.bool, device=codes.acts.device)
        fired.index_fill_(0, torch.where(active, codes.indices, self.d_sae).flatten().long(), True)
        self.tokens_since_fired.add_(codes.n_tokens).masked_fill_(fired[:-1], 0)

    @torch.no_grad()
    def project_gradients_(self) -> None:
        """grad_i -= ⟨grad_i, W_dec_i⟩ W_dec_i / ‖W_dec_i‖² where the decoder has unit norm; before optimizer.step()."""
        if self.decoder_norm == "unit" and self.W_dec.grad is not None:
            tiny = torch.finfo(self.W_dec.dtype).tiny
            # A row of 0 has no direction to project away: 0 / tiny leaves its gradient alone.
            squares = torch.linalg.vecdot(self.W_dec, self.W_dec).clamp_min(tiny)
            share = torch.linalg.vecdot(self.W_dec.grad, self.W_dec) / squares
            self.W_dec.grad.addcmul_(self.W_dec, share[:, None], value=-1)

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """W_dec_i /= ‖W_dec_i‖ where the decoder has unit norm; after optimizer.step(). A row of 0 stays 0."""
        if self.decoder_norm == "unit":
            norms = torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True)
            self.W_dec.div_(norms.clamp_min(torch.finfo(norms.dtype).tiny))

    def extra_repr(self) -> str:
        settings = [f"{name}={getattr(self, name)!r}" for name in _SETTINGS]
        return ", ".join([*settings, f"activation={self.activation!r}"])
