"""The published systems that `fastsae reproduce` runs, each a recipe: data, model, loss, schedule and metric.

A system is a package of that name: one file has the recipe, another its tables and pictures. runner.py runs it and says
what a system must provide, results.py stores the results, page.py puts everything on one HTML page. `SYSTEMS` lists
systems by name; `system` imports one on demand.
"""

from __future__ import annotations

from importlib import import_module

SYSTEMS = {
    "clustering": "fastsae.systems.clustering.figures",
    "dictionary_comparison": "fastsae.systems.dictionary_comparison.figures",
    "interpretable_directions": "fastsae.systems.interpretable_directions.figures",
    "monosemanticity": "fastsae.systems.monosemanticity.figures",
    "othello": "fastsae.systems.othello.figures",
}
"""Each system's name and the module that defines its SYSTEM."""


def system(name: str):  # type: ignore[no-untyped-def]
    """The runner.System of that name. Raises ValueError for an unknown one."""
    if name not in SYSTEMS:
        raise ValueError(f"no system {name!r}; expected one of {', '.join(SYSTEMS)}")
    return import_module(SYSTEMS[name]).SYSTEM
