"""`python -m bench.synth`: SynthSAEBench-16k, whose true features are known, with fastsae and SAELens side by side.

16,384 features in 768 dimensions, SAEs of 4,096 latents at L0 25, batches of 1,024, learning rate 3e-4, as published
(Chanin & Garriga-Alonso 2026, arXiv 2602.14687). Generator, metrics and one of the two trainers are SAELens's, which
is not a dependency of fastsae and has an environment of its own, .venv-peers. Both trainers start from the same
weights, get the same batches in the same order and take turns. `make synth` installs and runs it with 5M samples, which
two cores can handle. On a GPU, the published length on the published samples:

    make synth ARGS='--samples 200000000 --device cuda --autocast --world decoderesearch/synth-sae-bench-16k-v2'

A run that was stopped continues where it was. Results, table and plot: bench/results/<device>/synth.
"""
