"""Runs test files of a library in processes of their own, and compares each test's two outcomes."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.machine import ROOT, describe
from bench.peer_tests.libraries import Library

ARCHIVES = ROOT / "build" / "peer-tests"
SECONDS = 600
"""For a test file, one way."""
ENDS = (0, 1, 2, 5)
"""pytest's exit statuses of a run to the end: all passed, some failed, a file that cannot be imported, no tests."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_MODE": "disabled"}
"""Without the hub a test that wants it fails at once, on every machine."""


def unavailable(library: Library) -> str | None:
    """Why no test of this library can run here; None if they can."""
    try:
        importlib.metadata.version(library.distribution)
    except importlib.metadata.PackageNotFoundError:
        return f"{library.distribution} is not installed: `make test-peers` installs it into .venv-peers"
    return None


def archive(library: Library) -> Path:
    """The unpacked source archive of the installed version. Raises RuntimeError where pip does not get it."""
    version = importlib.metadata.version(library.distribution)
    folder = ARCHIVES / f"{library.distribution}-{version}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            done = subprocess.run(
                [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", scratch,
                 f"{library.distribution}=={version}"],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            found = list(Path(scratch).glob("*.tar.gz"))
            if done.returncode or len(found) != 1:
                raise RuntimeError(f"pip download: {done.stderr.strip().rpartition(chr(10))[2]}")
            with tarfile.open(found[0]) as packed:
                packed.extractall(Path(scratch) / "out", filter="data")
            (inside,) = (Path(scratch) / "out").iterdir()
            ARCHIVES.mkdir(parents=True, exist_ok=True)
            shutil.copytree(inside, folder)
    return folder


def version_of(sources: Path) -> str:
    """The version that a clone or an archive says it is of."""
    for name, pattern in (("PKG-INFO", r"^Version: (.+)$"), ("pyproject.toml", r'^version\s*=\s*"(.+)"$')):
        path = sources / name
        found = re.search(pattern, path.read_text(), re.MULTILINE) if path.is_file() else None
        if found:
            return found[1]
    return "an unknown version"


def run_file(library: Library, folder: Path, file: str, swapped: bool) -> tuple[dict[str, dict[str, Any]], str | None]:
    """What came of each test of a file, by the test's name without the file's; and what cut the run off, if so."""
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        variables = {**OFFLINE, **library.environment, "PYTHONPATH": str(ROOT)}
        command = [
            "env", *(f"{name}={value}" for name, value in variables.items()),
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.peer_tests.plugin",
            "-c", os.devnull, "--rootdir", str(folder), "--peer", library.variable, "--peer-log", str(log),
            *(["--peer-swap"] if swapped else []), file,
        ]  # fmt: skip
        with subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        ) as process:  # fmt: skip
            try:
                said, _ = process.communicate(timeout=SECONDS)
                cut = None if process.returncode in ENDS else f"exit status {process.returncode}"
            except subprocess.TimeoutExpired:
                cut = f"{SECONDS} s"
                os.killpg(process.pid, signal.SIGKILL)
                said, _ = process.communicate()
        if not log.exists():
            raise RuntimeError(f"{library.variable} {file}: no test was reported; pytest said:\n{said[-2000:]}")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    return {line.pop("test").partition("::")[2]: line for line in lines}, cut


def compare(theirs: dict[str, dict[str, Any]], ours: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A file's entry in the result. Only tests that pass with theirs count; the others did not run here."""
    passed = [test for test, line in theirs.items() if line["outcome"] == "passed"]
    objects: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for line in ours.values():
        objects.update(line["objects"])
        refused.update(line["refused"])
    met = [test for test in passed if test in ours and ours[test]["ops"]]
    differs = {
        test: ours[test]["why"] or ours[test]["outcome"] if test in ours else "it was not reached"
        for test in passed
        if test not in ours or ours[test]["outcome"] != "passed"
    }
    return {
        "theirs": len(passed),
        "ours": len(passed) - len(differs),
        "met": len(met),
        "objects": dict(sorted(objects.items())),
        "refused": dict(sorted(refused.items())),
        "not_run": {test: line["why"] or line["outcome"] for test, line in theirs.items() if test not in passed},
        "differs": differs,
    }


def run_library(library: Library, sources: Path, part: str, say: Callable[[str], None]) -> dict[str, Any]:
    """A library's entry in the result. part: what the paths of the files to run hold."""
    matching = {path.relative_to(sources) for one in library.tests for path in sources.glob(one)}
    files = sorted(path for path in matching if part in str(path))
    if not files and not part:
        raise ValueError(f"{library.variable}: {sources} has none of {', '.join(library.tests)}")
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        # A copy of the tests alone: beside them Python would find the clone's package, not the installed one.
        for top in sorted({path.parts[0] for path in files}):
            shutil.copytree(sources / top, Path(scratch) / top)
        for file in files:
            theirs, ended = run_file(library, Path(scratch), str(file), swapped=False)
            ours, ended_ours = run_file(library, Path(scratch), str(file), swapped=True)
            entry = compare(theirs, ours)
            cut = {way: why for way, why in (("theirs", ended), ("ours", ended_ours)) if why}
            found[str(file)] = {**entry, "cut": cut}
            say(f"{library.variable} {file}: {entry['theirs']} pass with theirs, {entry['ours']} with ours")
            for way, why in cut.items():
                say(f"{library.variable} {file}: {way} was cut off ({why}), and later tests are missing")
    return {
        "distribution": library.distribution,
        "version": importlib.metadata.version(library.distribution),
        "tests_of": version_of(sources),
        "machine": describe(),
        "files": found,
    }
