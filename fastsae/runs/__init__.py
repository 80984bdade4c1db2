"""Whole training runs: the trainer, its settings, checkpoints, logs and evaluation."""
