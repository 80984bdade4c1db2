"""The command `python -m bench.gpu`. Uses argparse, not tyro: a machine that has torch and little else must run it."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.gpu import plan, run
from bench.gpu.plan import Settings

DESCRIPTION = """Times the engine on this GPU, unattended and within a time budget, after a selection of its tests has
passed there: the device's peak rates, the kernels of a step, whole training steps against dense PyTorch and public
libraries, and every op. Each result is written at once; the same command goes on from there."""

EPILOG = """examples:
  python -m bench.gpu --archive gpu.tar.gz         what fits into eight minutes, and all files in one
  python -m bench.gpu --archive gpu.tar.gz --all   later, on another machine of the kind: unpacks it, and goes on
  python -m bench.gpu --only profile steps         only these jobs
  python -m bench.gpu --rehearse --out FOLDER      the same path on a CPU, at toy sizes, in seconds

exit codes: 0 done, or the budget was used up; 1 a result is wrong or a case crashed; 2 wrong usage, no such device, or
no backend that works; 130 interrupted. Files: results.json, summary.md, logs/<job>.log."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="time for everything (default: 480)")
    p.add_argument("--all", action="store_true", help="also sweeps, codes of every layout, and what is of less weight")
    p.add_argument("--out", type=Path, metavar="FOLDER", help="default: bench/results/<device>/gpu")
    p.add_argument(
        "--archive", type=Path, metavar="FILE.tar.gz",
        help="pack the folder into this file after every job; unpack it first where it is there",
    )  # fmt: skip
    p.add_argument("--fresh", action="store_true", help="measure again what the folder already holds")
    p.add_argument("--only", nargs="+", default=[], metavar="JOB", help="jobs by the start of their name, see --list")
    p.add_argument("--backends", nargs="+", metavar="NAME", help="default: cuda and triton; cpu in a rehearsal")
    p.add_argument("--rehearse", action="store_true", help="on the CPU at toy sizes: figures mean nothing")
    p.add_argument("--list", action="store_true", help="print the jobs and their items, in order, and stop")
    return p


def settings_of(options: argparse.Namespace) -> Settings:
    backends = tuple(options.backends or (("cpu",) if options.rehearse else Settings.backends))
    if options.rehearse:
        return Settings("cpu", "toy", backends, options.all)
    return Settings(backends=backends, everything=options.all)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    settings = settings_of(options)
    try:
        jobs = plan.chosen(plan.jobs(settings), options.only)
        if options.list:
            for job in jobs:
                print(f"{job.name:20} {', '.join(job.items)}")
            return 0
        return run.everything(settings, options.only, options.budget, options.out, options.archive, options.fresh)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unwinds like Ctrl-C, so that the archive is written
    sys.exit(main())
