"""`python -m bench.family`: see the package's docstring."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import bench.family as package
from bench import machine
from bench.family import draw, quality, speed
from bench.family.store import Store
from bench.plot import PAGE
from bench.results import RESULTS


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs both parts, or one; then draws. Returns 1 if a result was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.family", description=package.__doc__)
    parser.add_argument("--part", choices=("speed", "quality", "draw"), help="one part only; left out: all")
    parser.add_argument("--only", nargs="+", default=(), metavar="RULE", help="only these rules, such as ReLU")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to try the script; figures mean nothing")
    parser.add_argument("--fresh", action="store_true", help="measure again what is already there")
    parser.add_argument(
        "--wait", type=float, default=0.0, help="seconds to wait for a quiet machine before each timing"
    )
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path, help="folder of the results; left out: bench/results/<device>/family")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    folder = options.out or RESULTS / machine.device_folder() / "family"
    known = {name for names in (speed.TIMED, quality.rules(4096)) for name in names} | {"crossing", "ragged"}
    unknown = sorted(set(options.only) - known)
    if unknown:
        parser.error(f"unknown rules {', '.join(unknown)}, expected some of {', '.join(sorted(known))}")
    if options.quick and options.out is None:
        parser.error("--quick measures nothing worth keeping; name another folder: --out")
    wrong: list[str] = []
    if options.part in (None, "quality"):
        settings = quality.quick(quality.Settings()) if options.quick else quality.Settings()
        wrong += quality.run(Store(folder, "quality", fresh=options.fresh), settings, options.only)
    if options.part in (None, "speed"):
        timed = speed.Settings(wait=options.wait)
        timed = speed.quick(timed) if options.quick else timed
        wrong += speed.run(Store(folder, "speed", fresh=options.fresh), timed, options.only)
    for path in draw.draw(folder):
        print(path)
    if options.out is None:
        draw.renew_page(RESULTS, PAGE)
    if wrong:
        print(f"wrong: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
