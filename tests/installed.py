"""`python installed.py FOLDER`: whether the fastsae that is installed in FOLDER, from a wheel, does its work there.

Not a test of the suite, which runs in the clone: `make wheel-check` runs it in an empty folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import fastsae
import fastsae.kernels
from fastsae.cli.main import main


def check(folder: Path) -> None:
    """Trains, measures, shows and reproduces from the installed files alone. Raises AssertionError."""
    for module in (fastsae, fastsae.kernels):
        assert Path(str(module.__file__)).is_relative_to(folder), f"{module.__file__} is not in {folder}"
    assert fastsae.backends()["cpu"]["available"], fastsae.backends()["cpu"]["reason"]
    own = [path for path in folder.rglob("*gomp*") if path.is_file()]
    assert not own, f"the wheel brings an OpenMP runtime, and torch has one: {own}"
    np.save("rows.npy", np.random.default_rng(0).standard_normal((4096, 32)).astype("float32"))
    commands = [
        ["info"],
        ["train", "rows.npy", "--run-dir", "run", "--d-sae", "128", "--k", "8", "--steps", "20", "--batch-size", "256"],
        ["eval", "run"],
        ["report", "run"],
        ["reproduce", "clustering", "--quick", "--out", "clustering"],
    ]
    for command in commands:
        assert main(command) == 0, command
    for page in ("run/report.html", "clustering/page.html"):
        assert "<style>" in Path(page).read_text(), page


if __name__ == "__main__":
    check(Path(sys.argv[1]).resolve())
    print("the wheel works outside the clone")
