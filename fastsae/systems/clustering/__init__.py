"""SAEs that cluster 2D points: system.py is the recipe, figures.py its tables and pictures, points.py the data."""
