"""fastsae.optim: the fused update as torch optimizers; training/optimizers.py has them."""

from fastsae.training.optimizers import Adam, AdamW, Dictionaries, FusedOptimizer, Lion, SignSGD

__all__ = ["Adam", "AdamW", "Dictionaries", "FusedOptimizer", "Lion", "SignSGD"]
