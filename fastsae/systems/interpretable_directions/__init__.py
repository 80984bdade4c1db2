"""SAEs that find known directions, and directions of language models: data, metrics, experiments, tables and pictures.

toy.py: known directions. frontier.py: residual streams, of the models of models.py, by the SAEs of saes.py. ioi.py:
which latents decide about a name, by the patching of patching.py, on the prompts of prompts.py. system.py lists all
experiments, figures.py has tables and pictures.
"""
