"""circuit-tracer's SingleLayerTranscoder and CrossLayerTranscoder: their acts are found without all pre-acts.

`encode_sparse`, on which attribution is built, never makes a dense tensor; `encode` gives lazy acts, which `decode`
takes as the code they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from circuit_tracer.transcoder.activation_functions import JumpReLU, TopK, rectangle
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder
from torch import Tensor, nn

from fastsae import ops
from fastsae.codes import SparseCodes
from fastsae.ops.products import per_latent
from fastsae.swapped.base import EncoderInputs, OverModule, Swapped, Unsupported, coo, decoded, hooked, traced
from fastsae.swapped.lazy import LazyActs, kept_of, spread

RELUS = torch.relu, nn.functional.relu


class SwappedTranscoder(Swapped):
    """What both classes share."""

    __slots__ = ()

    def trains_threshold(self) -> bool:
        """Whether a backward pass wants the threshold's gradient, which every pre-act near it has a part in."""
        rule = self.activation_function  # type: ignore[attr-defined]
        return torch.is_grad_enabled() and isinstance(rule, JumpReLU) and rule.threshold.requires_grad

    def is_dense(self, x: Tensor, dims: tuple[int, ...]) -> bool:
        """Whether the library's own path has to answer: it is traced, refuses the input, or a hook wants dense acts."""
        refused = x.ndim not in dims or not x.is_floating_point()
        module: Any = self
        if traced() or refused or self.was_changed():
            return True
        return hooked(module, (module.activation_function,), "activation_function")


class SwappedSingleLayerTranscoder(OverModule, SwappedTranscoder, SingleLayerTranscoder):
    """SingleLayerTranscoder."""

    roles: ClassVar[dict[str, str]] = {"W_enc": "W_enc", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}

    @classmethod
    def check(cls, module: Any) -> None:
        rule = module.activation_function
        if type(rule) not in (nn.ReLU, JumpReLU, TopK) and rule not in RELUS:
            name = getattr(rule, "__name__", type(rule).__name__)
            raise Unsupported(
                f"activation_function of the SingleLayerTranscoder is {name}, expected ReLU, or JumpReLU or TopK of "
                "circuit_tracer"
            )
        if type(rule) is JumpReLU and rule.threshold.shape not in ((), (module.d_transcoder,)):
            got = tuple(rule.threshold.shape)
            raise Unsupported(f"the threshold of JumpReLU has shape {got}, expected () or ({module.d_transcoder},)")

    def lacks(self) -> tuple[str, ...]:
        lazy = {"W_enc": self.lazy_encoder, "W_dec": self.lazy_decoder}  # read from a file at each use
        return tuple(role for role in lazy if lazy[role])

    def takes_pre_bias(self) -> bool:
        return False

    def latents_per_token(self) -> int | None:
        return int(self.activation_function.k) if isinstance(self.activation_function, TopK) else None

    def found(self, flat: Tensor) -> SparseCodes | None:
        """The acts of x (N, D) that are not 0, without the threshold's gradient; None where they cannot go sparsely."""
        encoder = self.encoder_inputs(flat.to(self.dtype))
        rule = self.activation_function
        if isinstance(rule, JumpReLU):
            return encoder.passing(rule.threshold)
        if not isinstance(rule, TopK):
            return encoder.above(0.0)
        if not 1 <= rule.k <= self.d_transcoder:
            return None
        codes = encoder.topk(rule.k)  # the library's k largest may be negative: those are not found here
        return codes if bool((codes.acts.detach() != 0).all()) else None

    def encode(self, input_acts: Tensor, apply_activation_function: bool = True) -> Tensor:
        dims = tuple(range(1, input_acts.ndim + 1))
        if apply_activation_function and not self.trains_threshold() and not self.is_dense(input_acts, dims):
            codes = self.found(input_acts.reshape(-1, input_acts.shape[-1]))
            if codes is not None:
                return spread(codes, (*input_acts.shape[:-1], codes.d_sae), codes)
        return super().encode(input_acts, apply_activation_function)

    def decode(self, acts: Tensor, input_acts: Tensor | None = None) -> Tensor:
        codes = kept_of(acts)
        if codes is None:
            return super().decode(acts, input_acts)
        found = decoded(codes, self.rows("W_dec"), acts.shape) + self.b_dec
        if self.W_skip is None:
            return found
        assert input_acts is not None, "a transcoder with a skip connection decodes with its input_acts"
        return found + self.compute_skip(input_acts)

    def encode_sparse(self, input_acts: Tensor, zero_positions: Any = slice(0, 1)) -> tuple[Tensor, Tensor]:
        """The library's coalesced tensor and encoder vectors; positions that are zeroed are not encoded."""
        if self.is_dense(input_acts, (2,)):
            return super().encode_sparse(input_acts, zero_positions)
        kept = kept_positions(input_acts, zero_positions)
        codes = self.found(input_acts[kept])
        if codes is None:
            return super().encode_sparse(input_acts, zero_positions)
        if self.trains_threshold():
            codes = with_threshold(codes, self.activation_function)
        sparse = coo(in_all(codes, kept), (len(kept), codes.d_sae), coalesced=True)
        return sparse, self.W_enc[sparse.indices()[1]]


class SwappedCrossLayerTranscoder(OverModule, SwappedTranscoder, CrossLayerTranscoder):
    """CrossLayerTranscoder: one code for all layers, whose tokens are the positions of the first, then of the next."""

    @classmethod
    def check(cls, module: Any) -> None:
        rule = module.activation_function
        if type(rule) not in (nn.ReLU, JumpReLU) and rule not in RELUS:
            name = getattr(rule, "__name__", type(rule).__name__)
            raise Unsupported(
                f"activation_function of the CrossLayerTranscoder is {name}, expected ReLU, or JumpReLU of "
                "circuit_tracer"
            )

    def lacks(self) -> tuple[str, ...]:
        return "W_enc", "W_dec", "b_enc", "b_dec"  # one Parameter of theirs holds all layers

    def found(self, layer: int, x: Tensor) -> SparseCodes | None:
        """The acts of one layer's x (N, D) that are not 0; None where they are too many."""
        encoder = EncoderInputs(x, self._get_encoder_weights(layer), self.b_enc[layer], None, None, None)
        rule = self.activation_function
        return encoder.passing(rule.threshold[layer].view(-1)) if isinstance(rule, JumpReLU) else encoder.above(0.0)

    def is_dense(self, x: Tensor, dims: tuple[int, ...]) -> bool:
        return super().is_dense(x, dims) or x.dtype != self.dtype

    def of_layers(self, x: Tensor, kept: Tensor) -> SparseCodes | None:
        """The acts of x (L, N, D) at the kept positions."""
        if len(x) != self.n_layers:
            return None
        parts = []
        for layer in range(self.n_layers):
            codes = self.found(layer, x[layer][kept])
            if codes is None:
                return None
            codes = in_all(codes, kept).trimmed()
            assert codes.offsets is not None
            parts.append((codes.acts, codes.indices, codes.offsets.diff()))
        acts, indices, lengths = (torch.cat(part) for part in zip(*parts, strict=True))
        return SparseCodes(acts, indices, self.d_transcoder, starts(lengths))

    def encode(self, x: Tensor) -> Tensor:
        if not self.is_dense(x, (3,)) and not self.trains_threshold():
            codes = self.of_layers(x, kept_positions(x[0], slice(0)))
            if codes is not None:
                return spread(codes, (*x.shape[:-1], codes.d_sae), codes)
        return super().encode(x)

    def encode_layer(self, x: Tensor, layer_id: int, apply_activation_function: bool = True) -> Tensor:
        if apply_activation_function and not self.is_dense(x, tuple(range(2, x.ndim + 1))):
            codes = self.found(layer_id, x.reshape(-1, x.shape[-1]))
            if codes is not None:
                return spread(codes, (*x.shape[:-1], codes.d_sae), codes)
        return super().encode_layer(x, layer_id, apply_activation_function)

    def encode_sparse(self, x: Tensor, zero_positions: Any = slice(0, 1)) -> tuple[Tensor, Tensor]:
        """The library's coalesced tensor and encoder vectors; positions that are zeroed are not encoded."""
        codes = None if self.is_dense(x, (3,)) else self.of_layers(x, kept_positions(x[0], zero_positions))
        if codes is None:
            return super().encode_sparse(x, zero_positions)
        sparse = coo(codes, (*x.shape[:-1], codes.d_sae), coalesced=True)
        layers, _, latents = sparse.indices()
        ends = layers.bincount(minlength=self.n_layers).tolist()
        weights = map(self._get_encoder_weights, range(self.n_layers))
        return sparse, torch.cat([W[ids] for W, ids in zip(weights, latents.split(ends), strict=True)])

    def decode(self, features: Tensor, input_acts: Tensor | None = None) -> Tensor:
        """The library's, without the scaled decoder vectors of each act.

        As there, positions after the last one that has an act are left out.
        """
        codes = None if self.lazy_decoder or traced() else self.code_of(features)
        if codes is None or not codes.acts.numel():
            return super().decode(features, input_acts)
        assert codes.offsets is not None
        assert self.W_dec is not None
        offsets = codes.offsets.view(-1)[: self.n_layers * features.shape[1] + 1]
        lengths = offsets.diff().view(self.n_layers, -1)
        last = int(lengths.any(0).nonzero().max()) + 1
        recon = codes.acts.new_zeros(self.n_layers, last, self.d_model)
        begin = 0
        for layer, (row, W) in enumerate(zip(lengths[:, :last], self.W_dec, strict=True)):
            end = begin + int(row.sum())
            part = SparseCodes(codes.acts[begin:end], codes.indices[begin:end], self.d_transcoder, starts(row))
            out = ops.decode(part, W.flatten(1).to(self.dtype)).view(last, -1, self.d_model)
            recon[layer:] += out.transpose(0, 1)
            begin = end
        recon = recon + self.b_dec[:, None]
        if self.W_skip is None:
            return recon
        assert input_acts is not None, "a transcoder with a skip connection decodes with its input_acts"
        return recon + input_acts @ self.W_skip

    def code_of(self, features: Tensor) -> SparseCodes | None:
        """The code of acts (L, N, M) that are lazy or a coalesced sparse tensor; None of others."""
        if features.ndim != 3 or len(features) != self.n_layers:
            return None
        if isinstance(features, LazyActs):
            found: SparseCodes | None = features.kept
            return found
        if not features.is_sparse or not features.is_coalesced() or features.dtype != self.dtype:
            return None
        layers, positions, latents = features.indices()
        n = features.shape[1]
        lengths = (layers * n + positions).bincount(minlength=self.n_layers * n)
        return SparseCodes(features.values(), latents.int(), self.d_transcoder, starts(lengths))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.W_skip is not None else self.decode(self.encode(x))


def kept_positions(x: Tensor, zeroed: Any) -> Tensor:
    """The positions of x (N, D) that are not zeroed: (N,) bool."""
    kept = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    kept[zeroed] = False
    return kept


def starts(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def in_all(codes: SparseCodes, kept: Tensor) -> SparseCodes:
    """A code of the kept tokens as one of all tokens, ragged, without zeros; a token that is not kept has no act."""
    codes = codes.keep(codes.acts != 0)
    assert codes.offsets is not None
    lengths = torch.zeros(kept.shape, dtype=torch.int64, device=kept.device).masked_scatter(kept, codes.offsets.diff())
    return SparseCodes(codes.acts, codes.indices, codes.d_sae, starts(lengths))


class _Threshold(torch.autograd.Function):
    """Acts at the slots of a code, unchanged, with JumpReLU's gradient to the thresholds of their latents."""

    @staticmethod
    def forward(ctx: Any, acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(acts, threshold)
        ctx.bandwidth = bandwidth
        return acts.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        acts, threshold = ctx.saved_tensors
        near = rectangle((acts - threshold) / ctx.bandwidth)
        return grads[0], -(threshold / ctx.bandwidth) * near * grads[0], None


def with_threshold(codes: SparseCodes, rule: Any) -> SparseCodes:
    """The code, whose acts are functions of the threshold too. Of a sparse tensor, only what it holds has gradients."""
    at_slots = per_latent(rule.threshold.expand(codes.d_sae), codes)
    return replace(codes, acts=_Threshold.apply(codes.acts, at_slots, rule.bandwidth), made_by=None)


SWAPS: dict[type, type] = {
    SingleLayerTranscoder: SwappedSingleLayerTranscoder,
    CrossLayerTranscoder: SwappedCrossLayerTranscoder,
}
