"""Fixtures for the whole suite, and Triton's interpreter where there is no GPU.

With FASTSAE_CUDA_EMULATION the CUDA kernels run on the CPU (tests/emulation), with another thread order in each test.

TRITON_INTERPRET has to be set before anything imports Triton, and processes that tests start inherit it. Where Triton
is of a version that the mended interpreter does not know, its tests are skipped as on a machine without Triton.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from tests.on_device import OnDevice

not_interpreted: str | None = None
"""Why the tests of Triton's kernels are skipped, where Triton is there."""
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        from tests import interpreter

        try:
            interpreter.mend()
        except ImportError as error:
            not_interpreted = f"the tests of Triton's kernels are skipped: {error}"
            del os.environ["TRITON_INTERPRET"]  # so that the backend is not available, here and in processes of tests


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not_interpreted:
        terminalreporter.write_line(not_interpreted)


# Interpreted kernels run a thousand times slower than compiled ones, emulated ones hardly faster. So every case runs
# in float32 with one threshold and one precision, and only these cases run with all dtypes, thresholds and precisions.
# On a GPU everything runs.
IN_FULL = ("odd", "norms", "nan", "no-tokens", "one-token", "strided")
QUICK = ("odd", "nan", "no-tokens", "one-token", "strided", "few-ties")
"""Of these, in float32, `make test` runs; the others are long. LOG.md says which cases have found what."""
OTHER = {"dtype": torch.float32, "precision": "exact", "kind": "one", "biased": True, "regrouped": False}


FIRST = (
    "parallel_runs", "parallel", "feeders", "kill_resume", "parallel_proof", "parallel_faults", "library", "family",
    "bench_gpu", "bench_parallel", "border", "ddp", "hostile", "compiled", "fallback", "gpu_skip",
)  # fmt: skip
"""Files of few tests that take long, most of them in processes of their own. Workers get whole files: one of these at
the end would leave the other cores idle. Files of more tests come before those of fewer.
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also what takes long, as `make test-all` does")
    parser.addoption("--all-interpreted", action="store_true", help="every case of kernels on a CPU; takes an hour")


def _left_out(item: pytest.Item) -> bool:
    given = item.callspec.params if hasattr(item, "callspec") else {}
    case = given.get("case", given.get("name"))
    if given.get("backend") not in ("cuda", "triton"):
        return False
    if (mark := item.get_closest_marker("few_cases")) and str(case) not in (mark.args or QUICK):
        return True
    if case is None or str(case) in IN_FULL:
        return False
    return any(given.get(name, usual) != usual for name, usual in OTHER.items())


def _is_long(item: pytest.Item) -> bool:
    if item.get_closest_marker("long"):
        return True
    given = item.callspec.params if hasattr(item, "callspec") else {}
    if given.get("backend") != "triton" or torch.cuda.is_available():
        return False
    if item.get_closest_marker("long_interpreted"):
        return True
    return str(given.get("case", given.get("name", "odd"))) not in QUICK or given.get("dtype") == torch.bfloat16


@pytest.hookimpl(tryfirst=True)  # before -m, which may choose by the marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    interpreted = torch.cuda.is_available() or config.getoption("all_interpreted")
    named = any("::" in argument for argument in config.args)  # a test that is named runs
    kept: list[pytest.Item] = []
    out: list[pytest.Item] = []
    for item in items:
        is_long = _is_long(item)
        if is_long:
            item.add_marker("long")
        left_out = (not interpreted and _left_out(item)) or (is_long and not named and not config.getoption("long"))
        (out if left_out else kept).append(item)
    if out:
        config.hook.pytest_deselected(items=out)
    count = Counter(item.path for item in kept)
    order = [f"test_{name}" for name in FIRST]
    places = {path: order.index(path.stem) if path.stem in order else len(order) for path in count}
    items[:] = sorted(kept, key=lambda item: (places[item.path], -count[item.path], item.path))


@pytest.fixture(autouse=True, scope="module")
def own_graphs() -> None:
    """Each file of tests begins with what torch.compile begins with: it compiles a function eight times, and a test
    that comes after those of another file would get the ordinary function without a word.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def shuffled_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Shuffles the emulated threads and blocks of the CUDA kernels: each test has its own order, the same every run."""
    from fastsae import env  # imported late: Triton's interpreter has to be on first

    if env.cuda_emulation() is None:
        yield
        return
    from fastsae.backends.cuda.library import library

    library.emulate(seed=zlib.crc32(request.node.nodeid.encode()))
    yield
    library.emulate()


@pytest.fixture(autouse=True)
def narrow_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cpu backend's narrow copies, for a few tokens too: tests are small, and would meet none. test_few_tokens.py
    holds both ways against each other.
    """
    import fastsae  # late, as above

    if fastsae.backends()["cpu"]["available"]:
        from fastsae.backends.cpu import screen

        monkeypatch.setattr(screen, "FEW", 0)
        monkeypatch.setattr(screen, "FEW_KEPT", 0)


@pytest.fixture(autouse=True)
def on_its_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where there is a GPU, a test of one of its backends makes its tensors there, and all others on the CPU."""
    from fastsae import env  # late, as above

    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if given.get("backend") in ("cuda", "triton") and torch.cuda.is_available() and env.cuda_emulation() is None:
        with OnDevice("cuda"):
            yield
    else:
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for a test of many tiny ops: on a busy machine, threads that wait for each other make it ten times
    slower. Other tests check that the number of threads changes no result.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
