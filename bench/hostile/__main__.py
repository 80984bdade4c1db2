"""See the package."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

from bench.hostile import run
from bench.hostile.calls import RAW_OPS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.hostile", description="hostile calls of every raw op")
    parser.add_argument("--ops", default=",".join((*RAW_OPS, run.STRUCTS)), help="raw ops and structs, with commas")
    parser.add_argument("--seed", type=int, default=0, help="0")
    parser.add_argument("--first", type=int, default=0, help="number of the first call (0)")
    parser.add_argument("--calls", type=int, default=2000, help="calls of each op (2000)")
    parser.add_argument("--minutes", type=float, default=0.0, help="go on with the next seeds for so long")
    parser.add_argument("--backend", help="the backend of every call; without it each call draws one")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    ops = given.ops.split(",")
    if given.work:
        return run.work(run.Plan(**json.loads(given.work[1])), Path(given.work[0]))
    end, failed = time.monotonic() + 60 * given.minutes, False
    for seed in itertools.count(given.seed):
        start, calls = time.perf_counter(), (given.first, given.first + given.calls)
        for op, found in run.hunt(run.Plan(seed, {op: calls for op in ops}, given.backend)).items():
            print(
                f"{op} seed {seed}: {found.calls} calls, {found.right} right, {found.refused} refused, "
                f"{len(found.wrong)} wrong"
            )
            for number, what in found.wrong[:20]:
                print(f"  {what}\n    {run.again(op, seed, number, given.backend)}")
            failed |= bool(found.wrong)
        print(f"seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
        if time.monotonic() >= end:
            break
    sys.exit(failed)


if __name__ == "__main__":
    main()
