"""SAEs that find known directions: toy.py is the recipe, metrics.py the comparison, figures.py tables and pictures."""
