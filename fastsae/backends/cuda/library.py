"""The compiled CUDA extension, and where its ops run.

csrc/cuda is built as fastsae._cuda if there is an nvcc. For tests the same sources are also built for the CPU, where
fibers stand for a GPU's threads (tests/emulation). FASTSAE_CUDA_EMULATION selects that build.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae import env
from fastsae.backends import extension

library = extension.load("_cuda", env.cuda_emulation())
EMULATED: bool = library.emulated


def where(t: Tensor) -> object:
    """t's device and the caller's current stream there."""
    if EMULATED:
        return library.Where(-1, 0)
    stream = torch.cuda.current_stream(t.device)
    return library.Where(stream.device_index, stream.cuda_stream)
