"""fastsae: an exact, kernel-backed engine for training and running sparse autoencoders.

    sae = fastsae.SparseAutoencoder(d_in=768, d_sae=24576, activation=fastsae.TopK(32))
    step = fastsae.FusedTrainStep(sae, lr=2e-4)

`fastsae.ops` is the functional face of the engine, `fastsae.backends()` says who computes it on this machine.
"""

from fastsae import autograd, ops
from fastsae.activations import (
    BatchTopK,
    Gated,
    GroupMax,
    HierarchicalTopK,
    JumpReLU,
    Matryoshka,
    ReLU,
    TopK,
)
from fastsae.backends import BackendError, backends
from fastsae.batch import SAEBatch
from fastsae.batch_step import BatchTrainStep
from fastsae.codes import LatentOrder, Screen, SparseCodes, UpdateTerm
from fastsae.latents import resample_
from fastsae.optim import FusedTrainStep
from fastsae.sae import SAEOutput, SparseAutoencoder
from fastsae.schedules import Schedule
from fastsae.serialize import load, save

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BatchTopK",
    "BatchTrainStep",
    "FusedTrainStep",
    "Gated",
    "GroupMax",
    "HierarchicalTopK",
    "JumpReLU",
    "LatentOrder",
    "Matryoshka",
    "ReLU",
    "SAEBatch",
    "SAEOutput",
    "Schedule",
    "Screen",
    "SparseAutoencoder",
    "SparseCodes",
    "TopK",
    "UpdateTerm",
    "autograd",
    "backends",
    "load",
    "ops",
    "resample_",
    "save",
]
