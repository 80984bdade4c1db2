"""The options of `python -m bench.gpu`."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.gpu import plan
from bench.gpu.plan import Settings

DESCRIPTION = """Checks and times the engine on this GPU, unattended and within a time budget: every op of every backend
against float64, the device's peak rates, every op and whole training step against dense PyTorch, torch.sparse and
public libraries, the host's cost of a call, compute-sanitizer, sweeps over N, D, M and K."""

EPILOG = """examples:
  python -m bench.gpu                                   everything that fits into eight minutes
  python -m bench.gpu --budget 3600                     everything
  python -m bench.gpu --only check ceilings             only correctness and the device's rates
  python -m bench.gpu --only steps-big --items fastsae "dense bf16 compiled"
  python -m bench.gpu --report-only --out FOLDER        tables and plots again, from the files
  python -m bench.gpu --device cpu --size toy           the same path without a GPU, within a minute
  TRITON_INTERPRET=1 python -m bench.gpu --device cpu --size toy --backends triton

exit codes: 0 done, or the budget was used up; 1 a result is wrong or a case crashed; 2 wrong usage or no such
device; 130 interrupted. Files: <job>.json, results.csv, summary.md, *.svg and *.png, logs/<job>.log."""


def parser() -> argparse.ArgumentParser:
    """Uses argparse, not tyro: the command must start on a machine that has torch and little else."""
    p = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="time for everything (default: 480)")
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="default: cuda")
    p.add_argument("--size", choices=list(plan.CASES), default="full", help="toy: milliseconds a case (default: full)")
    p.add_argument("--out", type=Path, metavar="FOLDER", help="default: bench/results/<device>/gpu")
    p.add_argument("--fresh", action="store_true", help="measure again what the folder already holds")
    p.add_argument("--only", nargs="+", default=[], metavar="JOB", help="jobs by the start of their name, see --list")
    p.add_argument("--items", nargs="+", default=[], metavar="ITEM", help="only these items of the jobs, see --list")
    p.add_argument(
        "--backends", nargs="+", default=None, metavar="NAME",
        help="backends to check; all but the reference are timed too; one that does not work here is left out, with "
        "the reason (default: cuda, triton and reference on cuda, cpu and reference on cpu)",
    )  # fmt: skip
    p.add_argument("--list", action="store_true", help="print the jobs and their items, in order, and stop")
    p.add_argument("--report-only", action="store_true", help="measure nothing; write CSV, summary and plots again")
    p.add_argument(
        "--plant", metavar="OP:FAULT",
        help="break an op on purpose, to test that it is noticed: decode:wrong (or raise, crash, hang); results say so",
    )  # fmt: skip
    return p  # fmt: skip


def settings_of(options: argparse.Namespace) -> Settings:
    default = Settings.backends if options.device == "cuda" else ("cpu", "reference")
    return Settings(options.device, options.size, tuple(options.backends or default), options.plant)
