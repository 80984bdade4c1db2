"""Board state in the residual stream of a small Othello model: system.py is the recipe, figures.py its tables.

game.py plays, language.py is the model, probes.py and saes.py are what reads its activations, metrics.py scores them.
"""
