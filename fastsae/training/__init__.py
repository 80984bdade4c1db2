"""Training steps: the optimizers, the ten-line step, CUDA graphs, batches of small SAEs."""
