"""fastsae: an exact, kernel-backed engine for training and running sparse autoencoders.

    sae = fastsae.SparseAutoencoder(d_in=768, d_sae=24576, activation=fastsae.TopK(32))
    step = fastsae.FusedTrainStep(sae, lr=2e-4)

`fastsae.ops` is the functional face of the engine, `fastsae.backends()` says who computes it on this machine.
"""

from fastsae import ops, optim
from fastsae.backends import BackendError, backends
from fastsae.codes import LatentOrder, Screen, SparseCodes, UpdateTerm
from fastsae.model.files import load, save
from fastsae.model.resample import resample_
from fastsae.model.rules import BatchTopK, Gated, GroupMax, HierarchicalTopK, JumpReLU, Matryoshka, ReLU, TopK
from fastsae.model.sae import ForwardResult, SparseAutoencoder
from fastsae.runs.schedules import Schedule
from fastsae.training.batch import BatchTrainStep, SAEBatch
from fastsae.training.step import FusedTrainStep

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BatchTopK",
    "BatchTrainStep",
    "ForwardResult",
    "FusedTrainStep",
    "Gated",
    "GroupMax",
    "HierarchicalTopK",
    "JumpReLU",
    "LatentOrder",
    "Matryoshka",
    "ReLU",
    "SAEBatch",
    "Schedule",
    "Screen",
    "SparseAutoencoder",
    "SparseCodes",
    "TopK",
    "UpdateTerm",
    "backends",
    "load",
    "ops",
    "optim",
    "resample_",
    "save",
]
