"""Which backend computes an op: the registry of backends, and the choice among them.

A backend is a module with one function per raw op (same name, same arguments without `backend`; update_latents_ takes
them as one fastsae.backends.contract.UpdateArguments), and
    available() -> str | None               the reason why it cannot run here, or None
    detail() -> dict                        what `fastsae info` prints about it
    supports(op, *tensors, **info) -> str | None    the reason why it cannot serve this call, or None; tensors are the
                                            op's tensors in schema order (absent ones left out, lists flattened),
                                            info its other arguments by name
    by_name_only() -> bool                  whether it serves only calls with backend=<its name>, as an interpreter does
    prepare_screen(W, b, x, k) -> Screen | None    its low-precision copy of an encoder, or None if it uses none
and, if copies are worth holding between calls,
    hold_screen(held, W, b, x, k) -> (Held, Screen | None)    the copy for encoding x, from what the last call held

If backend=None takes a slower backend than the tensors' device could have, a BackendWarning says so once, with the
reason and a remedy.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastsae import env
from fastsae.backends import extension, reference, versions
from fastsae.backends.errors import BackendError, BackendWarning
from fastsae.warn import warn


def _built_cpu() -> ModuleType | str:
    try:
        extension.load("_cpu", env.cpu_build())
    except ImportError as error:
        return f"the C++ extension cannot be used ({error}); with a C++ compiler installed, run: {extension.command()}"
    from fastsae.backends import cpu

    return cpu


def _built_triton() -> ModuleType | str:
    try:
        from fastsae.backends import triton
    except ImportError as error:
        return f"Triton is not installed ({error}); torch's CUDA builds include it, or run: pip install triton"
    return triton


def _built_cuda() -> ModuleType | str:
    try:
        from fastsae.backends import cuda
    except ImportError as error:
        build = extension.command("FASTSAE_CUDA=require")
        return f"the CUDA extension cannot be used ({error}); with nvcc, the CUDA compiler, installed, run: {build}"
    return cuda


# Fastest first. A string instead of a module is the reason why the backend is absent.
_REGISTRY: tuple[tuple[str, ModuleType | str], ...] = (
    ("cuda", _built_cuda()),
    ("triton", _built_triton()),
    ("cpu", _built_cpu()),
    ("reference", reference),
)


OF_DEVICE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
"""The backends that are made for a device; another one is slower there."""

__all__ = ["BackendError", "BackendWarning", "backends", "check_name", "choose"]

_said: set[tuple[str, str]] = set()
versions.warn_of("torch", torch.__version__)


def backends() -> dict[str, dict[str, Any]]:
    """Every backend by name, fastest first: {"available": bool, "reason": str | None, "detail": dict}."""
    table = {}
    for name, module in _REGISTRY:
        reason = module if isinstance(module, str) else module.available()
        detail = {} if isinstance(module, str) or reason else module.detail()
        table[name] = {"available": reason is None, "reason": reason, "detail": detail}
    return table


def check_name(backend: str | None) -> None:
    """Raises ValueError for a backend name that does not exist."""
    names = [name for name, _ in _REGISTRY]
    if backend is not None and backend not in names:
        raise ValueError(f"backend is {backend!r}, expected None or one of {names}")


def choose(op: str, backend: str | None, *tensors: Tensor, **info: Any) -> ModuleType:
    """The module that serves this call: the named backend, or the fastest that can serve it.

    Raises ValueError for an unknown name and BackendError, with the reason, if the named backend cannot serve it.
    """
    backend = backend or env.default_backend()
    check_name(backend)
    reasons: list[tuple[str, str]] = []
    # `rows` of encode_topk: Triton's product reads those that are listed, cuBLAS needs a copy of the whole capacity.
    has_rows = op == "encode_topk" and any(t.dtype == torch.int32 and t.ndim == 1 for t in tensors)
    for name, module in sorted(_REGISTRY, key=lambda entry: has_rows and entry[0] != "triton"):
        if backend not in (None, name):
            continue
        reason: str | None
        if isinstance(module, str):
            reason = module
        else:
            # With backend=None check the tensors first, so that CPU tensors do not initialize the CUDA driver.
            reason = module.supports(op, *tensors, **info) if backend is None else module.available()
            reason = reason or (module.available() if backend is None else module.supports(op, *tensors, **info))
            if reason is None and backend is None and module.by_name_only():
                reason = f"it serves only calls with backend={name!r}"
            if reason is None:
                if backend is None:
                    _say_slower(op, name, reasons, tensors)
                return module
        reasons.append((name, reason))
    advice = "; pass backend=None to let it choose" if backend else ""
    said = "; ".join(f"{name}: {reason}" for name, reason in reasons)
    raise BackendError(f"no backend can serve fastsae.{op} here ({said}){advice}")


def _say_slower(op: str, chosen: str, reasons: list[tuple[str, str]], tensors: tuple[Tensor, ...]) -> None:
    """Warns, once for each reason, that a backend made for the tensors' device was skipped. reasons: those of the
    backends that were tried before the chosen one."""
    made_for_it = OF_DEVICE.get(tensors[0].device.type, ()) if tensors else ()
    passed = [(name, reason) for name, reason in reasons if name in made_for_it]
    fresh = {(name, reason.replace(op, "")) for name, reason in passed} - _said
    if not fresh:
        return
    _said.update(fresh)
    slow = ", dense PyTorch and many times slower" if chosen == "reference" else ""
    warn(
        f"fastsae.{op} runs on the {chosen} backend{slow}: "
        + "; ".join(f"{name}: {reason}" for name, reason in passed)
        + f". Pass backend={chosen!r} to choose it without this warning.",
        BackendWarning,
    )
