"""The raw ops of a GPU backend, made of its stages: each call runs on its tensors' device.

Nothing here reads a value from the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsae.backends.contract import UpdateArguments
from fastsae.backends.gpu.active_outer import active_outer
from fastsae.backends.gpu.by_latent import by_latent
from fastsae.backends.gpu.encode_above import encode_above
from fastsae.backends.gpu.encode_batch_topk import encode_batch_topk
from fastsae.backends.gpu.encode_topk import encode_topk
from fastsae.backends.gpu.narrow import WIDEST, Narrow, narrowed, padded_width
from fastsae.backends.gpu.stages import Stages
from fastsae.backends.gpu.stored_update import update_storing_gradients
from fastsae.backends.gpu.update_latents import update_latents

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(op: str, tensors: Iterable[Tensor], device: str) -> str | None:
    """The reason why stages that compute on `device` ("cuda", "cpu") cannot run an op on these tensors, or None."""
    for t in tensors:
        if t.device.type != device:
            return f"it computes on {device} tensors here, and a tensor is on {t.device}"
        eight_bit = op == "update_latents_" and t.dtype == torch.float8_e4m3fn  # a moment
        if t.is_floating_point() and t.dtype not in DTYPES and t.ndim and not eight_bit:
            return f"{op} has no kernel for {t.dtype}; cast to {' or '.join(map(str, DTYPES))}"
        if op.startswith(("encode", "prepare")) and t.ndim == 2 and t.shape[1] > WIDEST:
            return f"a row has {t.shape[1]} columns, and the screen's scale allows {WIDEST}"
    return None


def on_device(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches go to t's device; torch's current stream of it is the caller's."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def _kept(screen: list[Tensor] | None, W: Tensor) -> Narrow | None:
    """The kept copy. Raises ValueError if it is not a copy of W: kernels get it as addresses."""
    if not screen:
        return None
    rows = (W.shape[0],)
    expected = [(torch.float16, (*rows, padded_width(W.shape[1]))), *[(torch.float32, rows)] * 3]
    got = [(t.dtype, tuple(t.shape)) for t in screen]
    if got != expected or not all(t.is_contiguous() and t.device == W.device for t in screen):
        raise ValueError(
            f"the screen is {got} on {screen[0].device}, expected contiguous tensors {expected} on {W.device} for W "
            f"{tuple(W.shape)}; it was made of another dictionary: use ops.prepare_screen(W, b)"
        )
    return Narrow(*screen)


def _op(run: Callable[..., Any]) -> Callable[..., Any]:
    """A method for an op, run(stages, its arguments in order), on the device of the first tensor among them."""

    def method(self: RawOps, *args: Any) -> Any:
        with on_device(next(t for t in args if isinstance(t, Tensor))):
            return run(self.stages, *args)

    return method


def _encoder(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same for an op that takes x and W first, and last a screen, here made the kept copy, and the precision."""

    def checked(stages: Stages, x: Tensor, W: Tensor, *args: Any) -> Any:
        *rest, screen, precision = args
        return run(stages, x, W, *rest, _kept(screen, W), precision)

    return _op(checked)


@dataclass(frozen=True)
class RawOps:
    """A backend's functions, as fastsae.backends describes them, over its stages."""

    stages: Stages

    encode_topk = _encoder(encode_topk)
    encode_above = _encoder(encode_above)
    encode_batch_topk = _encoder(encode_batch_topk)
    decode = _op(lambda stages, *args: stages.decode(*args))
    decode_error = _op(lambda stages, *args: stages.decode_error(*args))
    active_dot = _op(lambda stages, *args: stages.active_dot(*args))
    active_outer = _op(active_outer)
    by_latent = _op(by_latent)

    def update_latents_(self, call: UpdateArguments) -> Tensor:
        widest, limit = max(call.W_dec.shape[1], call.encoder.shape[1]), self.stages.ROW_LIMIT
        is_fused = limit is None or widest <= limit
        with on_device(call.W_dec):
            _kept(call.screen, call.encoder)
            stats = (update_latents if is_fused else update_storing_gradients)(self.stages, call)
            if call.screen and not call.norms_only:
                self._refresh(call.screen, call.encoder)
        return stats

    def screen(self, W: Tensor) -> list[Tensor]:
        """The tensors of a narrow copy of W, as the encoders and update_latents_ take them."""
        with on_device(W):
            return narrowed(self.stages, W.contiguous()).tensors()

    def _refresh(self, screen: list[Tensor], W: Tensor) -> None:
        """Makes the kept copy one of the new W. If that fails, the stale copy must not be trusted: its residual norms
        become infinite, so that no bound excludes a latent, and every token is scored from W itself."""
        made = False
        try:
            self.stages.narrow_rows(W, *screen)
            made = True
        finally:
            if not made:
                screen[3].fill_(float("inf"))
