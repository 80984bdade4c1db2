"""The house rules, checked on the source: imports only go down, and what no file may do.

The floors (a module imports from lower floors, or from its own without a cycle):

    F0  reference, codes, env, atomic               the mathematics, the data types, whole files: torch only
    F1  backends, kernels, csrc                     the computation; backends/gpu and kernels/ import little
    F2  ops                                         public function, schema, checks and backward of each op
    F3  model                                       the nn.Module, its rules and losses
    F4  training                                    optimizers and training steps
        hosts                                       SAEs as other libraries know them
    F5  data, runs                                  activations; whole runs, their files and their evaluation
        interop                                     checkpoints of other libraries
        swapped                                     SAEs and trainers of other libraries, computed by the ops
    F6  report, systems                             reports and reproductions, made from runs
    F7  cli                                         the command line
    F8  fastsae/__init__.py                         the public face, which no module inside imports

A new folder needs a floor: these tests fail until FLOORS lists it.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS = {
    "reference": 0, "codes": 0, "env": 0, "atomic": 0, "warn": 0, "progress": 0,
    "backends": 1, "kernels": 1, "_cpu": 1, "_cuda": 1,
    "ops": 2,
    "model": 3,
    "training": 4, "optim": 4, "hosts": 4, "parallel": 4,
    "data": 5, "runs": 5, "interop": 5, "swapped": 5,
    "report": 6, "systems": 6,
    "cli": 7, "__main__": 7,
}  # fmt: skip
PUBLIC_FACE = 8
EXTENSIONS = ("fastsae._cpu", "fastsae._cuda")
LONG_FILES: dict[str, str] = {}
"""Files of more than 700 lines, each with the reason why it is one file."""

MAX_LINES = 700
SOURCE_FOLDERS = ("fastsae", "csrc", "bench", "tests")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """The dotted name under which a file is imported."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in python_files("fastsae")}


def floor(module: str) -> int:
    """The floor of a dotted name inside fastsae. Raises LookupError for one that FLOORS does not place."""
    parts = module.split(".")
    if len(parts) == 1:
        return PUBLIC_FACE
    if parts[1] not in FLOORS:
        raise LookupError(f"{module} stands on no floor: add {parts[1]!r} to FLOORS in tests/test_floors.py")
    return FLOORS[parts[1]]


def is_in(module: str, parts: set[str]) -> bool:
    """Whether a dotted name is one of the parts, or inside one."""
    return any(module == part or module.startswith(f"{part}.") for part in parts)


def imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import anywhere in the file, in functions and under TYPE_CHECKING too.

    `from a import b` gives a.b where that is a file of ours, or an extension, and a otherwise.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")
                package = package[: len(package) - node.level + is_package]
                base = ".".join([*package, *([base] if base else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield node.lineno, name if name in FILES or name in EXTENSIONS else base


def parsed() -> Iterator[tuple[str, Path, ast.Module]]:
    for module, path in FILES.items():
        yield module, path, tree_of(path)


def test_imports_go_down_only() -> None:
    wrong = []
    for module, path, tree in parsed():
        here = floor(module)
        for line, name in imports(tree, module, path.name == "__init__.py"):
            if name.split(".")[0] == "fastsae" and floor(name) > here:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: F{here} imports {name} of F{floor(name)}")
            if name.split(".")[0] in ("bench", "tests"):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: the package imports {name}, which is not installed")
    assert not wrong, "imports that go up:\n" + "\n".join(wrong)


def test_no_cycle_on_a_floor() -> None:
    graph: dict[str, set[str]] = {}
    for module, path, tree in parsed():
        names = {name for _, name in imports(tree, module, path.name == "__init__.py")}
        graph[module] = {name for name in names if name in FILES and name != module and floor(name) == floor(module)}

    finished: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            cycle = " -> ".join([*trail[trail.index(module) :], module])
            pytest.fail(f"modules of one floor import each other in a cycle: {cycle}")
        if module not in finished:
            for name in sorted(graph[module]):
                visit(name, [*trail, module])
            finished.add(module)

    for module in sorted(graph):
        visit(module, [])
    assert finished == set(FILES)


@pytest.mark.parametrize(
    ("parts", "allowed"),
    [
        (("reference", "codes", "env", "atomic"), {"torch"}),
        (("backends.buffers",), {"torch"}),
        (("backends.blank",), {"torch", "fastsae.backends.buffers"}),
        (
            ("backends.gpu", "backends.contract"),
            {"torch", "fastsae.reference", "fastsae.backends.buffers", "fastsae.backends.blank"},
        ),
        (("kernels",), {"torch", "triton", "fastsae.backends.gpu", "fastsae.backends.buffers"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_the_lowest_floors_import_little(parts: tuple[str, ...], allowed: set[str]) -> None:
    """Each part imports itself and what it is allowed, nothing else."""
    here = {f"fastsae.{part}" for part in parts}
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: imports {name}"
        for module, path, tree in parsed()
        if is_in(module, here)
        for line, name in imports(tree, module, path.name == "__init__.py")
        if not is_in(name, allowed | here) and name.split(".")[0] not in sys.stdlib_module_names
    ]
    assert not wrong, f"{', '.join(sorted(here))} may import {sorted(allowed)} only:\n" + "\n".join(wrong)


def test_environment_variables_are_read_in_one_place() -> None:
    wrong = []
    for path in python_files("fastsae", "bench"):
        if path == ROOT / "fastsae" / "env.py":
            continue
        for node in ast.walk(tree_of(path)):
            attribute = node.attr if isinstance(node, ast.Attribute) else ""
            name = node.name if isinstance(node, ast.alias) else ""
            if {attribute, name} & {"environ", "environb", "getenv", "getenvb", "putenv"}:
                wrong.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', '?')}")
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        if "getenv(" in path.read_text():
            wrong.append(str(path.relative_to(ROOT)))
    assert not wrong, "environment variables are read in fastsae/env.py only, not at:\n" + "\n".join(wrong)


def caught(handler: ast.ExceptHandler) -> set[str]:
    if handler.type is None:
        return {"everything"}
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return {ast.unparse(kind).rsplit(".", 1)[-1] for kind in kinds}


def test_no_broad_except() -> None:
    """`except BaseException` may clean up if it raises again. No handler may swallow an unknown error."""
    wrong = []
    for path in python_files("fastsae", "bench", "tests"):
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            kinds, last = caught(node), node.body[-1]
            raises_again = isinstance(last, ast.Raise) and last.exc is None
            if kinds & {"everything", "Exception"} or ("BaseException" in kinds and not raises_again):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: catches {', '.join(sorted(kinds))}")
    assert not wrong, "name the exceptions that are expected:\n" + "\n".join(wrong)


def import_time(statements: list[ast.stmt]) -> Iterator[ast.AST]:
    """Every node that runs when the module is imported: not the bodies of functions, not `if __name__ == ...`."""
    for statement in statements:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            for decorator in statement.decorator_list:
                yield from ast.walk(decorator)
        elif isinstance(statement, ast.ClassDef):
            yield from import_time(statement.body)
        elif isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test):
            yield from import_time(statement.orelse)
        else:
            for node in ast.walk(statement):
                if not isinstance(node, ast.Lambda):
                    yield node


def test_nothing_is_printed_at_import() -> None:
    wrong = []
    for path in python_files("fastsae", "bench"):
        for node in import_time(tree_of(path).body):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "print", "sys.stdout.write", "sys.stderr.write", "logging.basicConfig", "warnings.warn",
            ):  # fmt: skip
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node.func)}")
    assert not wrong, "an import must print nothing:\n" + "\n".join(wrong)


def test_files_stay_short() -> None:
    suffixes = {".py", ".cpp", ".h", ".hpp", ".cu", ".cuh"}
    files = [path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sorted(files)}
    wrong = [f"{name}: {n} lines" for name, n in lengths.items() if n > MAX_LINES and not LONG_FILES.get(name)]
    assert not wrong, f"over {MAX_LINES} lines; split, or give a reason in LONG_FILES:\n" + "\n".join(wrong)
    needless = [name for name in LONG_FILES if lengths.get(name, 0) <= MAX_LINES]
    assert not needless, f"LONG_FILES lists files that are short enough: {needless}"


def test_the_rules_catch_what_they_forbid() -> None:
    """Each check above finds a planted violation; otherwise an empty list would prove nothing."""
    tree = ast.parse("from fastsae.runs.trainer import Trainer\ndef f():\n    from . import ops\n    import fastsae")
    found = dict(imports(tree, "fastsae.codes", is_package=False))
    assert found[1] == "fastsae.runs.trainer"
    assert floor(found[1]) > floor("fastsae.codes")
    assert found[3] in ("fastsae.ops", "fastsae")
    assert floor(found[4]) == PUBLIC_FACE
    assert list(imports(ast.parse("from .a import b"), "fastsae.data", is_package=True)) == [(1, "fastsae.data.a")]
    with pytest.raises(LookupError, match="stands on no floor"):
        floor("fastsae.surprise")

    handlers = [n for n in ast.walk(ast.parse("try: pass\nexcept (OSError, Exception): pass\nexcept: pass"))
                if isinstance(n, ast.ExceptHandler)]  # fmt: skip
    assert caught(handlers[0]) == {"OSError", "Exception"}
    assert caught(handlers[1]) == {"everything"}

    source = "def f():\n    print(1)\nif __name__ == '__main__':\n    print(2)\nclass A:\n    print(3)"
    calls = [n.lineno for n in import_time(ast.parse(source).body) if isinstance(n, ast.Call)]
    assert calls == [6]


def test_removed_names_point_to_their_replacement() -> None:
    import fastsae

    with pytest.raises(AttributeError, match=r"fastsae.SAEOutput is gone; it is replaced by ForwardResult"):
        _ = fastsae.SAEOutput
    with pytest.raises(AttributeError, match="has no attribute 'surprise'"):
        _ = fastsae.surprise
    for name in ("train", "evaluate", "plain_step"):
        with pytest.raises(ModuleNotFoundError, match=rf"^fastsae\.{name} is gone; it is replaced by fastsae\.\w+\."):
            importlib.import_module(f"fastsae.{name}")
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'fastsae\.surprise'$"):
        importlib.import_module("fastsae.surprise")
    with pytest.raises(ImportError, match="cannot import name 'train'"):
        from fastsae import train  # noqa: F401
    assert callable(fastsae.evaluate)
    there = {path.stem for path in (ROOT / "fastsae").iterdir()}
    assert not there & set(fastsae._REPLACED), "a module that is here was not replaced"
    for where in re.findall(r"fastsae\.\w+\.\w+", " ".join(fastsae._REPLACED.values())):
        assert importlib.util.find_spec(where), where


def test_importing_the_package_imports_little() -> None:
    """So that it takes half a second beyond torch's own import."""
    code = (
        "import sys, torch; before = set(sys.modules); import fastsae\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    found = {name for name in ran.stdout.split() if not name.startswith("_sysconfigdata")}
    assert found <= {"fastsae", "numpy", "safetensors", "triton"}
