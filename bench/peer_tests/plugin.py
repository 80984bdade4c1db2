"""A pytest plugin for another library's tests: writes a line for each, and accelerates what they make if --peer-swap.

An object is given to `fastsae.accelerate` when its class's `__init__` is done, wherever it is made: in a test, a
fixture, a loader or a trainer. So `type(x)` is the swapped class, and all names are the library's. Without --peer-swap
fastsae is not imported.

The lines are JSON: the test, its outcome, why, the objects accelerated and the calls of fastsae's ops meanwhile.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.peer_tests import stand_in
from bench.peer_tests.libraries import Library, named

OPS = ("encode_topk", "encode_above", "encode_batch_topk", "decode", "active_dot")


class Tally:
    """What happened since the last line."""

    def __init__(self) -> None:
        self.objects: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.ops = 0

    def take(self) -> dict[str, Any]:
        found = {"objects": dict(self.objects), "refused": dict(self.refused), "ops": self.ops}
        self.__init__()  # type: ignore[misc]
        return found


class Counted:
    """An op of fastsae that counts its calls."""

    def __init__(self, op: Any, tally: Tally) -> None:
        self._op, self._tally = op, tally

    def __call__(self, *args: Any, **settings: Any) -> Any:
        self._tally.ops += 1
        return self._op(*args, **settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._op, name)


def swap(package: str, tally: Tally) -> None:
    """Makes every class of a library that fastsae swaps accelerate its objects."""
    importlib.import_module(package)
    import fastsae
    from fastsae.swapped import Unsupported, swaps

    def accelerating(kind: Any) -> None:
        begin = kind.__init__

        @functools.wraps(begin)
        def __init__(self: Any, *args: Any, **settings: Any) -> None:
            begin(self, *args, **settings)
            if type(self) is not kind:  # of a subclass, or accelerated already
                return
            try:
                fastsae.accelerate(self)
            except Unsupported as error:
                tally.refused[str(error)] += 1
            else:
                tally.objects[kind.__name__] += 1

        kind.__init__ = __init__

    for kind in swaps():
        if kind.__module__.split(".")[0] == package:
            accelerating(kind)
    for name in OPS:
        setattr(torch.ops.fastsae, name, Counted(getattr(torch.ops.fastsae, name), tally))


def adapt(library: Library) -> None:
    """The changes that both runs get."""
    if library.bare:
        spec: Any = importlib.util.find_spec(library.package)
        sys.modules[library.package] = importlib.util.module_from_spec(spec)
    for place, given in library.defaults.items():
        module, name = place.split(":")
        kind: Any = getattr(importlib.import_module(module), name)
        kind.__init__ = _with_defaults(kind.__init__, given)
    for place, now in library.renamed.items():
        module, name = place.split(":")
        setattr(importlib.import_module(module), name, getattr(importlib.import_module(module), now))
    if library.no_hub:
        stand_in.no_hub()
    if library.models_on_cpu:
        move: Any = torch.nn.Module.to

        @functools.wraps(move)
        def to(self: Any, *args: Any, **settings: Any) -> Any:
            return move(self, *("cpu" if one == "cuda" else one for one in args), **settings)

        torch.nn.Module.to = to  # type: ignore[method-assign]


def _with_defaults(begin: Any, given: Any) -> Any:
    @functools.wraps(begin)
    def __init__(self: Any, *args: Any, **settings: Any) -> None:
        begin(self, *args, **{**given, **settings})

    return __init__


class Seeds:
    """Both runs get the same random numbers in a test, whatever those before it took."""

    @pytest.hookimpl(tryfirst=True)  # before its fixtures
    def pytest_runtest_setup(self) -> None:
        torch.manual_seed(0)


class Log:
    """Writes the lines."""

    def __init__(self, path: Path, tally: Tally) -> None:
        self.path, self.tally = path, tally
        self.reports: list[pytest.TestReport] = []

    def write(self, test: str, reports: list[Any]) -> None:
        failed = next((one for one in reports if one.failed), None)
        outcome = "failed" if failed else "skipped" if any(one.skipped for one in reports) else "passed"
        line = {"test": test, "outcome": outcome, "why": _why(failed), **self.tally.take()}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.write(nodeid, self.reports)
        self.reports = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(report.nodeid, [report])


def _why(report: Any) -> str | None:
    """The first line of what a report says went wrong."""
    if report is None:
        return None
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr).strip().rpartition("\n")[2]
    return str(text).split("\n")[0]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("peers")
    group.addoption("--peer", help="the library, by its variable")
    group.addoption("--peer-log", type=Path, help="the file to write lines to")
    group.addoption("--peer-swap", action="store_true", help="accelerate what the tests make")


def pytest_configure(config: pytest.Config) -> None:
    library, tally = named(config.getoption("peer")), Tally()
    adapt(library)
    if config.getoption("peer_swap"):
        swap(library.package, tally)
    if library.seeded:
        config.pluginmanager.register(Seeds(), "peer-seeds")
    config.pluginmanager.register(Log(config.getoption("peer_log"), tally), "peer-log")
