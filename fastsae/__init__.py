"""fastsae: an exact, kernel-backed engine for training and running sparse autoencoders.

    sae = fastsae.SparseAutoencoder(d_in=768, d_sae=24576, activation=fastsae.TopK(32))
    step = fastsae.FusedTrainStep(sae, lr=2e-4)

`fastsae.ops` is the functional interface; `fastsae.backends()` lists the backends that work on this machine.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from fastsae import ops, optim, parallel
from fastsae.backends import BackendError, backends
from fastsae.codes import LatentOrder, Screen, SparseCodes, UpdateTerm
from fastsae.interop.registry import load, push_to_hub, save
from fastsae.model.cross_layer import CrossLayerTranscoder
from fastsae.model.resample import resample_
from fastsae.model.rules import AbsTopK, BatchTopK, Gated, GroupMax, HierarchicalTopK, JumpReLU, Matryoshka, ReLU, TopK
from fastsae.model.sae import ForwardResult, SparseAutoencoder
from fastsae.runs.schedules import Schedule
from fastsae.training.batch import BatchTrainStep, SAEBatch
from fastsae.training.step import FusedTrainStep

if TYPE_CHECKING:
    from fastsae.data.splice import splice, steer
    from fastsae.hosts import as_saebench, as_saelens, register_saelens, split_signs
    from fastsae.runs.evaluate import evaluate
    from fastsae.runs.spliced import spliced_loss
    from fastsae.swapped import accelerate, unaccelerate

__version__ = "0.2.0"

_LATER = {
    "accelerate": "fastsae.swapped",
    "as_saebench": "fastsae.hosts",
    "as_saelens": "fastsae.hosts",
    "evaluate": "fastsae.runs.evaluate",
    "register_saelens": "fastsae.hosts",
    "splice": "fastsae.data.splice",
    "split_signs": "fastsae.hosts",
    "spliced_loss": "fastsae.runs.spliced",
    "steer": "fastsae.data.splice",
    "unaccelerate": "fastsae.swapped",
}
"""Names that are imported when they are first used, so that training alone does not import what reads text or models.
"""

_REPLACED = {
    "SAEOutput": "ForwardResult, whose first field is loss",
    "autograd": "fastsae.ops: each op has its backward pass beside it",
    "activations": "fastsae.model.rules",
    "sae": "fastsae.model.sae",
    "losses": "fastsae.model.losses",
    "latents": "fastsae.resample_ (fastsae.model.resample)",
    "serialize": "fastsae.save and fastsae.load (fastsae.model.files)",
    "plain_step": "fastsae.training.step",
    "batch": "fastsae.training.batch",
    "batch_step": "fastsae.training.batch",
    "normalize": "fastsae.model.norm",
    "train": "fastsae.runs.trainer",
    "train_config": "fastsae.runs.config",
    "checkpoint": "fastsae.runs.checkpoint",
    "evaluate": "fastsae.runs.evaluate",  # the module; fastsae.evaluate is its function
    "schedules": "fastsae.runs.schedules",
}


class _Replaced:
    """The last finder of imports, asked when all others found nothing: says what replaced `import fastsae.train`."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        parent, _, last = name.rpartition(".")
        if parent == __name__ and last in _REPLACED:
            raise ModuleNotFoundError(f"{name} is gone; it is replaced by {_REPLACED[last]}", name=name)


sys.meta_path.append(_Replaced)  # type: ignore[arg-type]


def __getattr__(name: str) -> Any:
    """Imports a name of `_LATER`, or says what replaced a name that was here before."""
    if name in _LATER:
        found = globals()[name] = getattr(importlib.import_module(_LATER[name]), name)
        return found
    if name in _REPLACED:
        raise AttributeError(f"fastsae.{name} is gone; it is replaced by {_REPLACED[name]}")
    raise AttributeError(f"module 'fastsae' has no attribute {name!r}")


__all__ = [
    "AbsTopK", "BackendError", "BatchTopK", "BatchTrainStep", "CrossLayerTranscoder", "ForwardResult",
    "FusedTrainStep", "Gated", "GroupMax", "HierarchicalTopK", "JumpReLU", "LatentOrder", "Matryoshka", "ReLU",
    "SAEBatch", "Schedule", "Screen", "SparseAutoencoder", "SparseCodes", "TopK", "UpdateTerm", "accelerate",
    "as_saebench", "as_saelens", "backends", "evaluate", "load", "ops", "optim", "parallel", "push_to_hub",
    "register_saelens", "resample_", "save", "splice", "spliced_loss", "split_signs", "steer", "unaccelerate",
]  # fmt: skip
