"""Command line of bench.peer_tests."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import peer_tests
from bench.peer_tests import page
from bench.peer_tests.libraries import LIBRARIES, Library, named
from bench.peer_tests.run import archive, run_library, unavailable


def sources(library: Library, given: dict[str, str]) -> Path | str:
    """Where a library's tests are; or why it is skipped, in a line that says how to get them."""
    if reason := unavailable(library):
        return reason
    if path := given.get(library.variable):
        return Path(path).expanduser().resolve()
    if library.home is not None:
        return f"git clone {library.home}, and give the folder: {library.variable}=..."
    try:
        return archive(library)
    except RuntimeError as error:
        return f"{error}; unpack its source archive, and give the folder: {library.variable}=..."


def pair(text: str) -> tuple[str, str]:
    variable, _, path = text.partition("=")
    try:
        return named(variable).variable, path
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peer_tests", description=peer_tests.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--tests", nargs="*", type=pair, default=[], metavar="LIBRARY=FOLDER", help="clones to read")
    parser.add_argument("--only", nargs="+", choices=[one.variable for one in LIBRARIES], help="these libraries only")
    parser.add_argument("--files", help="only the test files with this in their path; not with --store")
    parser.add_argument("--store", action="store_true", help="renew the stored result and docs/interop.md")
    parser.add_argument("--draw", action="store_true", help="only renew docs/interop.md, from the stored result")
    options = parser.parse_args(arguments)
    if options.store and options.files:
        parser.error("--store keeps whole libraries, and --files leaves tests out")
    if options.draw:
        page.renew()
        return 0
    found = {}
    for library in LIBRARIES:
        if options.only and library.variable not in options.only:
            continue
        place = sources(library, dict(options.tests))
        if isinstance(place, str):
            print(f"{library.variable} skipped: {place}")
            continue
        found[library.variable] = run_library(library, place, options.files or "", lambda text: print(text, flush=True))
    if found:
        print(page.shown(found))
    if options.store:
        page.store(found)
        page.renew()
    wrong = page.unexplained(found)
    for line in wrong:
        print(f"passes with theirs, fails with ours: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
