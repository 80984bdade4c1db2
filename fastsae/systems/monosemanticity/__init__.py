"""The recipe of Scaling Monosemanticity: recipe.py trains and measures, causes.py, steering.py and meaning.py look at
single latents, system.py lists the experiments, figures.py makes tables and pictures."""
