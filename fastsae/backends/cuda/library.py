"""The compiled CUDA extension, and where its ops run.

csrc/cuda is built as fastsae._cuda if there is an nvcc. For tests the same sources are also built for the CPU, where
fibers stand for a GPU's threads (tests/emulation). FASTSAE_CUDA_EMULATION selects that build.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import torch
from torch import Tensor

from fastsae import env

NAME = "fastsae._cuda"


def _load() -> ModuleType:
    path = env.cuda_emulation()
    if path is None:
        return importlib.import_module(NAME)
    spec = importlib.util.spec_from_file_location(NAME, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"FASTSAE_CUDA_EMULATION is {path!r}, expected an extension module built from csrc/cuda")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module
    return module


library = _load()
EMULATED: bool = library.emulated


def where(t: Tensor) -> object:
    """t's device and the caller's current stream there."""
    if EMULATED:
        return library.Where(-1, 0)
    stream = torch.cuda.current_stream(t.device)
    return library.Where(stream.device_index, stream.cuda_stream)
