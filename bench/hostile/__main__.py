"""See the package."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import bench.hostile
from bench.hostile import page, run
from bench.results import RESULTS

CASES = {"calls": 2000, "modules": 300, "files": 100, "interruptions": 10}
"""Of each kind of a part, without --minutes and --cases."""
TURN = 60.0
"""Seconds for which a part runs before the next one's turn, so that a run that is stopped has covered all parts."""


def places(asked: str) -> dict[str, list[str]]:
    """The kinds of each requested part, as "part/kind". Raises ValueError for unknown ones."""
    found: dict[str, list[str]] = {}
    for one in asked.split(","):
        name, _, kind = one.partition("/")
        if name not in run.PARTS:
            raise ValueError(f"there is no part {name!r}; there are {', '.join(run.PARTS)}")
        kinds = run.part(name).KINDS
        if kind and kind not in kinds:
            raise ValueError(f"there is no kind {kind!r} in {name}; there are {', '.join(kinds)}")
        found.setdefault(name, []).extend(f"{name}/{k}" for k in ([kind] if kind else kinds))
    return found


def turns(asked: dict[str, list[str]], first: int, cases: int | None, minutes: float) -> Iterator[dict[str, range]]:
    """The numbers of the next cases. With minutes, those of the part with the least time so far."""
    if not minutes:
        yield from ({p: range(first, first + (cases or CASES[name])) for p in kinds} for name, kinds in asked.items())
        return
    begun, spent, number = time.monotonic(), dict.fromkeys(asked, 0.0), dict.fromkeys(asked, first)
    size = {name: max(1, CASES[name] // 5) for name in asked}
    while (left := 60 * minutes - (time.monotonic() - begun)) > 0:
        name = min(spent, key=lambda one: spent[one])
        start = time.monotonic()
        yield {place: range(number[name], number[name] + size[name]) for place in asked[name]}
        took = time.monotonic() - start
        spent[name] += took
        number[name] += size[name]
        size[name] = max(1, int(min(4 * size[name], size[name] * min(TURN, left) / took)))


def main(arguments: list[str] | None = None) -> None:
    shown = ", ".join(f"{number:,} of {name}" for name, number in CASES.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench.hostile",
        description=bench.hostile.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", default=",".join(run.PARTS), help="parts, or kinds as part/kind, with commas (all)")
    parser.add_argument("--minutes", type=float, default=0.0, help="run for this long, and store the result")
    parser.add_argument("--seed", type=int, default=0, help="seed of all cases (0)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (0)")
    parser.add_argument("--cases", type=int, help=f"cases of each kind, without --minutes ({shown})")
    parser.add_argument("--backend", help="backend of every call and module; without it each draws one")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of stored results (bench/results)")
    parser.add_argument("--draw", action="store_true", help="only renew docs/reliability.md from the stored results")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.work:
        return run.work(run.Plan(**json.loads(given.work)))
    if given.draw:
        return page.renew(given.results)
    try:
        asked = places(given.parts)
    except ValueError as error:
        parser.error(str(error))
    begun, found = time.monotonic(), {place: run.Tally() for kinds in asked.values() for place in kinds}
    for turn in turns(asked, given.first, given.cases, given.minutes):
        now = run.hunt(run.Plan(given.seed, {p: (r.start, r.stop) for p, r in turn.items()}, given.backend))
        for place, tally in now.items():
            found[place].add(tally)
            bad = [("wrong", *one) for one in tally.wrong] + [("crashed", *one) for one in tally.crashed]
            for how, number, what in bad[:20]:
                print(f"{place} {how}: {what}\n    {run.again(place, given.seed, number, given.backend)}", flush=True)
        name = next(iter(turn)).split("/")[0]
        print(f"{(time.monotonic() - begun) / 60:6.1f} min  {page.line(name, page.parts(found)[name])}", flush=True)
        if given.minutes:
            page.store(given.results, found, given.seed, (time.monotonic() - begun) / 60)
    print(page.table(page.parts(found)))
    if given.minutes:
        page.renew(given.results)
    sys.exit(any(tally.wrong or tally.crashed for tally in found.values()))


if __name__ == "__main__":
    main()
