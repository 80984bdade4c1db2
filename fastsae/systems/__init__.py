"""The published systems that `fastsae reproduce` runs, each a recipe: data, model, loss, schedule and metric.

A system is a file of that name with the recipe, and one with its tables and pictures; runner.py runs it, results.py
keeps what comes out. `SYSTEMS` has them by name, loaded when asked for.
"""

from __future__ import annotations

from importlib import import_module

SYSTEMS = {"clustering": "fastsae.systems.clustering.figures"}
"""Each system's name and the module whose SYSTEM it is."""


def system(name: str):  # type: ignore[no-untyped-def]
    """The runner.System of that name. Raises ValueError for an unknown one."""
    if name not in SYSTEMS:
        raise ValueError(f"no system {name!r}; there are {', '.join(SYSTEMS)}")
    return import_module(SYSTEMS[name]).SYSTEM
