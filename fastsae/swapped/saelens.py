"""SAELens' classes after training, TopK, Standard, JumpReLU, Gated and transcoders, and what those in training share.

The base class's methods run, on acts that are lazy. What is replaced is where they would read all (N, M) of them: the
encoder and the decoder.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from sae_lens.saes.gated_sae import GatedSAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.standard_sae import StandardSAE
from sae_lens.saes.topk_sae import TopK, TopKSAE
from sae_lens.saes.transcoder import JumpReLUSkipTranscoder, JumpReLUTranscoder, SkipTranscoder, Transcoder
from torch import Tensor

from fastsae.codes import SparseCodes
from fastsae.ops.products import per_latent
from fastsae.swapped.base import OverModule, Swapped, Unsupported, decoded, hooked, scaled, traced
from fastsae.swapped.lazy import LazyActs, Source, lazy_pre_acts, spread


class SwappedSAE(Swapped):
    """What SAELens' classes share. A lazy tensor of acts keeps the code that is decoded: the raw pre-acts."""

    __slots__ = ()
    roles: ClassVar[dict[str, str]] = {"W_enc": "W_enc", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
    transposed = ("W_enc",)
    cfg: Any

    def takes_pre_bias(self) -> bool:
        return bool(self.cfg.apply_b_dec_to_input)

    def densely(self) -> bool:
        """Whether the library's own path has to answer: hooks want dense acts, or it is traced."""
        if traced() or self.was_changed():
            return True
        module: Any = self
        points = (module.hook_sae_acts_pre, module.hook_sae_acts_post, module.activation_fn)
        return hooked(module, points, "hook_sae_acts_pre, hook_sae_acts_post or activation_fn")

    def sae_input(self, x: Tensor) -> Tensor:
        """process_sae_in, before b_dec is subtracted."""
        x = self.reshape_fn_in(x.to(self.dtype))  # type: ignore[attr-defined]
        return self.run_time_activation_norm_fn_in(self.hook_sae_input(x))  # type: ignore[attr-defined]

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        """The library's, but for an input that went through `sae_input` already: see `on_seen`."""
        seen = self.__dict__.get("_seen")
        return super().process_sae_in(sae_in) if seen is None else self.centred(seen)  # type: ignore[misc]

    def on_seen(self, seen: Tensor, run: Any, x: Tensor) -> Any:
        """run(x), a method of the library's that begins with process_sae_in, whose hooks saw x already."""
        self.__dict__["_seen"] = seen
        try:
            return run(x)
        finally:
            del self.__dict__["_seen"]

    def norms(self) -> Tensor | None:
        """(M,): what the library multiplies pre-acts with before it selects, and divides acts by; None: nothing."""
        return self.rows("W_dec").norm(dim=-1) if getattr(self.cfg, "rescale_acts_by_decoder_norm", False) else None

    def select(self, flat: Tensor, scale: Tensor | None) -> SparseCodes:
        """The code of raw pre-acts of x (N, D)."""
        raise NotImplementedError

    def encoded(self, x: Tensor) -> tuple[Tensor, Tensor, Source]:
        """The acts of x (*batch, D), lazily, x as the encoder gets it, and what it is made of."""
        x = self.sae_input(x)
        source = Source(x.reshape(-1, x.shape[-1]), self.norms())
        raw = self.select(source.x, source.scale)
        seen = raw if source.scale is None else scaled(raw, source.scale)
        # Acts times decoder norms are divided by them again: raw is what this decoder takes, as long as it is the same.
        owner = None if source.scale is None else self.decoder_now()
        return spread(seen, (*x.shape[:-1], raw.d_sae), raw, owner), x, source

    def hidden_pre(self, x: Tensor, source: Source) -> Tensor:
        """The pre-acts (*batch, M), lazily."""
        W, b = self.rows("W_enc"), self.rows_of_bias()
        shape = (*x.shape[:-1], W.shape[0])
        return lazy_pre_acts(self.centred(source.x), W, b, source.scale, False, shape, source)

    def recons(self, raw: SparseCodes, shape: torch.Size) -> Tensor:
        """The reconstruction of a code of raw pre-acts, in the decoder's own units."""
        out = decoded(raw, self.rows("W_dec"), shape) + self.parameter("b_dec")
        return self.hook_sae_recons(out)  # type: ignore[attr-defined]

    def decoded(self, raw: SparseCodes, shape: torch.Size) -> Tensor:
        """The same as the library's decode gives it."""
        out = self.run_time_activation_norm_fn_out(self.recons(raw, shape))  # type: ignore[attr-defined]
        return self.reshape_fn_out(out, self.d_head)  # type: ignore[attr-defined]

    def encode(self, x: Tensor) -> Tensor:
        if self.densely():
            return super().encode(x)  # type: ignore[misc]
        return self.hook_sae_acts_post(self.encoded(x)[0])  # type: ignore[attr-defined]

    def decoder_now(self) -> tuple[Any, ...]:
        """What tells this decoder, as it is now, from others."""
        W = self.parameter("W_dec")
        return id(self), W.data_ptr(), 0 if W.is_inference() else W._version

    def own_code(self, acts: Tensor) -> SparseCodes | None:
        """The code of raw pre-acts behind these acts, where it is what this decoder takes."""
        if not isinstance(acts, LazyActs) or acts.owner not in (None, self.decoder_now()):
            return None
        found: SparseCodes | None = acts.kept
        return found

    def decode(self, feature_acts: Tensor) -> Tensor:
        raw = self.own_code(feature_acts)
        if raw is None:
            return super().decode(feature_acts)  # type: ignore[misc]
        return self.decoded(raw, feature_acts.shape)

    # safetensors writes contiguous tensors only.
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)  # type: ignore[misc]
        make_contiguous(state_dict)


def make_contiguous(state_dict: dict[str, Any]) -> None:
    for name, value in state_dict.items():
        state_dict[name] = value.contiguous()


def check_activation(module: Any, activation: type) -> None:
    """Raises Unsupported where the module's activation_fn is of another class."""
    if type(module.activation_fn) is not activation:
        raise Unsupported(
            f"activation_fn of {type(module).__name__} is a {type(module.activation_fn).__name__}, expected the "
            f"library's own {activation.__name__}"
        )


class SwappedTopK(SwappedSAE):
    __slots__ = ()

    @classmethod
    def check(cls, module: Any) -> None:
        check_activation(module, TopK)

    def latents_per_token(self) -> int:
        return int(self.activation_fn.k)  # type: ignore[attr-defined]

    def select(self, flat: Tensor, scale: Tensor | None) -> SparseCodes:
        return self.encoder_inputs(flat).topk(self.latents_per_token(), scale)


class SwappedTopKSAE(OverModule, SwappedTopK, TopKSAE):
    """TopKSAE."""


# -- inference: every latent above a bar ------------------------------------------------------------------------------


class SwappedThreshold(SwappedSAE):
    """Every latent above its bar. Where many are, the library's dense path answers."""

    __slots__ = ()

    @classmethod
    def check(cls, module: Any) -> None:
        check_activation(module, torch.nn.ReLU)

    def bar(self) -> Tensor | float:
        return 0.0

    def found(self, flat: Tensor) -> SparseCodes | None:
        return self.above(flat, self.bar())

    def encode(self, x: Tensor) -> Tensor:
        dense = super(SwappedSAE, self).encode  # type: ignore[misc]
        if self.densely():
            return dense(x)
        seen = self.sae_input(x)
        codes = self.found(seen.reshape(-1, seen.shape[-1]))
        if codes is None:
            return self.on_seen(seen, dense, x)
        return self.hook_sae_acts_post(spread(codes, (*seen.shape[:-1], codes.d_sae), codes))  # type: ignore[attr-defined]


class SwappedStandardSAE(OverModule, SwappedThreshold, StandardSAE):
    """StandardSAE."""


class JumpReLUBar:
    __slots__ = ()

    def bar(self: Any) -> Tensor:
        return self.threshold.clamp(min=0)  # below 0 is the ReLU's


class SwappedJumpReLUSAE(OverModule, JumpReLUBar, SwappedThreshold, JumpReLUSAE):
    """JumpReLUSAE."""


class SwappedGatedSAE(OverModule, SwappedThreshold, GatedSAE):
    """GatedSAE: x Wᵀ of the open gates, from which their size is made."""

    roles: ClassVar[dict[str, str]] = {"W_enc": "W_enc", "W_dec": "W_dec", "b_enc": "b_gate", "b_dec": "b_dec"}

    def found(self, flat: Tensor) -> SparseCodes | None:
        codes = self.above(flat, 0.0, biased=False)  # b_gate has no gradient
        if codes is None:
            return None
        size = codes.acts * per_latent(self.r_mag.exp(), codes) + per_latent(self.b_mag, codes)
        codes = replace(codes, acts=size.relu())
        return codes.keep(codes.acts != 0)


class SwappedTranscoding(SwappedThreshold):
    """Transcoders: no b_dec in the input, no normalization of the output."""

    __slots__ = ()

    def takes_pre_bias(self) -> bool:
        return False

    def sae_input(self, x: Tensor) -> Tensor:
        return self.process_sae_in(x)  # type: ignore[attr-defined]

    def decoded(self, raw: SparseCodes, shape: torch.Size) -> Tensor:
        return self.recons(raw, shape)


class SwappedTranscoder(OverModule, SwappedTranscoding, Transcoder):
    """Transcoder."""


class SwappedSkipTranscoder(OverModule, SwappedTranscoding, SkipTranscoder):
    """SkipTranscoder."""


class SwappedJumpReLUTranscoder(OverModule, JumpReLUBar, SwappedTranscoding, JumpReLUTranscoder):
    """JumpReLUTranscoder."""


class SwappedJumpReLUSkipTranscoder(OverModule, JumpReLUBar, SwappedTranscoding, JumpReLUSkipTranscoder):
    """JumpReLUSkipTranscoder."""


SWAPS: dict[type, type] = {
    TopKSAE: SwappedTopKSAE,
    StandardSAE: SwappedStandardSAE,
    JumpReLUSAE: SwappedJumpReLUSAE,
    GatedSAE: SwappedGatedSAE,
    Transcoder: SwappedTranscoder,
    SkipTranscoder: SwappedSkipTranscoder,
    JumpReLUTranscoder: SwappedJumpReLUTranscoder,
    JumpReLUSkipTranscoder: SwappedJumpReLUSkipTranscoder,
}
