"""Two published recipes on the same rows: recipes.py has the SAEs, system.py the experiments, figures.py the tables."""
