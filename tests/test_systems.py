"""The page of a system: everything on it once and escaped; and what is stored, documented and shown in the README."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import systems as bench
from bench.plot import with_numbers
from fastsae.systems import SYSTEMS, system
from fastsae.systems.page import About, grouped, render
from fastsae.systems.results import FILE, Results, Table, markdown
from fastsae.systems.runner import System, publish, reproduce, stored_run
from tests.html_case import HOSTILE, Page

NAMES = [name for name in SYSTEMS if (bench.RESULTS / name / FILE).exists()]
PNG = b"\x89PNG no picture, but bytes"
ABOUT = About(
    title=f"A title {HOSTILE}",
    sources={"The source": "https://example.org/source?a=1&b=2"},
    claim=f"It works {HOSTILE}.",
    here="Small numbers.",
    pictures={"all.png": f"All of them {HOSTILE}", "one.png": "One of them", "never.png": "Never drawn"},
    unverified=["Whether it matters."],
    result=lambda records: f"{len(records)} came out." if records else "",
)


def perform(experiment, seeds, advance, folder):
    advance()
    return {"values": [experiment * seed for seed in seeds], "note": HOSTILE}, None


def tables(records):
    lines = [[name, "7 (published)", str(max(record["values"]))] for name, record in records.items()]
    return [f"Scale {HOSTILE}", Table([f"largest value {HOSTILE}", "published", "ours"], lines)] if lines else []


def experiments(quick=False, size=10):
    return {"small": 1, "middle": 5, "large": size, f"odd {HOSTILE}": 2}


TOY = System(
    about=ABOUT,
    experiments=experiments,
    settings=lambda experiment: {"recipe": {"factor": experiment, "rate": 0.5}},
    ticks=lambda experiment, seeds: 1,
    perform=perform,
    draw_one=lambda name, experiment, shown, folder: (folder / "one.png").write_bytes(PNG),
    draw_all=lambda records, folder: (folder / "all.png").write_bytes(PNG[::-1]),
    tables=tables,
    seeds=3,
    scale={"size": 10},
    seconds=lambda experiment, seeds: 3600.0 * experiment,
)


def checked(source: str) -> Page:
    """The page, after the checks that hold for every one: balanced, no scripts, nothing loaded from elsewhere."""
    page = Page(source)
    assert not page.wrong
    assert not page.open
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base", "form"), tag
        assert not [name for name in attributes if name.startswith("on")]
        assert tag != "img" or (attributes["src"] or "").startswith("data:image/png;base64,")
    assert "https://" not in source.split("<style>")[1].split("</style>")[0]
    return page


def run(folder: Path, *only: str, **more) -> str:
    return reproduce("toy", TOY, folder, only=only, progress=False, **more)


def test_a_page_has_everything_and_says_what_is_missing(tmp_path: Path) -> None:
    printed = run(tmp_path, "small", "large", seeds=2, scale={"size": 20})
    page = checked((tmp_path / "page.html").read_text())
    text = " ".join(" ".join(page.text).split())

    assert page.count("h1") == 1
    assert text.count(HOSTILE) >= 4  # title, claim, paragraph, header: shown as text
    assert ("a", {"href": "https://example.org/source?a=1&b=2"}) in page.tags
    assert "2 came out." in text
    assert "Whether it matters." in text

    # The table, with its figures in cells of their own, is that of table.md.
    assert page.count("table", "numbers") == 1
    cells = [cell.strip() for cell in page.text if cell.strip()]
    for row in (["small", "7 (published)", "1"], ["large", "7 (published)", "20"]):
        assert any(cells[i : i + 3] == row for i in range(len(cells)))
    assert (tmp_path / "table.md").read_text() == printed + "\n"
    assert "| large " in printed

    # The pictures there are, in the order of the captions, with these as text.
    images = [a for tag, a in page.tags if tag == "img"]
    assert [base64.b64decode(a["src"].partition(",")[2]) for a in images] == [PNG[::-1], PNG]
    assert [a["alt"] for a in images] == [f"All of them {HOSTILE}", "One of them"]
    assert "Never drawn" not in text

    # What it is a part of, how long the rest would take, and the command that gives it.
    assert "A part: 2 of 4 experiments were run. Missing, which would take about 7 hours on one core: middle" in text
    assert "fastsae reproduce toy --scale size=20 --seeds 2 --experiments small large" in text

    # Settings: the usual values once, and where an experiment differs.
    assert "recipe.rate 0.5" in text
    assert "recipe.factor 1" in text
    assert "large 0.0 s, recipe.factor = 20" in text


def test_a_whole_run_is_called_nothing_else(tmp_path: Path) -> None:
    run(tmp_path)
    page = checked((tmp_path / "page.html").read_text())
    text = " ".join(" ".join(page.text).split())
    assert page.count("ul", "notes") == 0
    assert "fastsae reproduce toy This gives" in text


def test_what_else_a_reader_must_know(tmp_path: Path) -> None:
    """A quick run is called one; a record of other settings than the newest run's is named."""
    run(tmp_path, scale={"size": 20})
    run(tmp_path, "small", quick=True)
    text = " ".join(" ".join(checked((tmp_path / "page.html").read_text()).text).split())
    assert "its figures mean nothing" in text
    assert "Run with other settings than the rest: large" in text
    assert "A part" not in text
    assert json.loads((tmp_path / "results.json").read_text())["asked"] == {"quick": True, "scale": {}}


def test_results_without_a_record_of_what_was_asked_are_of_the_whole(tmp_path: Path) -> None:
    run(tmp_path)
    stored = json.loads((tmp_path / "results.json").read_text())
    del stored["asked"]
    (tmp_path / "results.json").write_text(json.dumps(stored))
    found = stored_run("toy", TOY, Results(tmp_path, "toy"))
    assert (found.quick, found.scale, found.missing, found.stale) == (False, {}, [], [])


def test_a_page_of_nothing_yet(tmp_path: Path) -> None:
    text = "".join(checked(render(ABOUT, [], stored_run("toy", TOY, Results(tmp_path, "toy")), tmp_path)).text)
    assert "0 of 4 experiments were run" in text
    assert "came out" not in text


def test_publishing_runs_nothing_and_is_the_same_again(tmp_path: Path) -> None:
    run(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in ("page.html", "table.md"):
        (tmp_path / name).unlink()

    def refuse(*arguments):
        raise AssertionError("an experiment was run")

    publish("toy", replace(TOY, perform=refuse, draw_all=refuse), Results(tmp_path, "toy"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# -- what is stored, and shown in docs/systems/ and the README --------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_documentation_is_that_of_the_stored_results(name: str) -> None:
    found, results = bench.stored()[name]
    folder, parts = bench.RESULTS / name, found.tables(results.experiments)
    assert (folder / "table.md").read_text() == markdown(parts) + "\n", "run python -m bench.systems"
    checked(render(found.about, parts, stored_run(name, found, results), folder))
    documented = (bench.DOCS / f"{name}.md").read_text()
    text = bench.document(name, found, results)
    assert with_numbers(documented, text, bench.BEGIN, bench.END) == documented, "run python -m bench.systems"
    assert results.data["asked"]["quick"] is False


@pytest.mark.parametrize("name", NAMES)
def test_every_stored_picture_has_a_caption(name: str) -> None:
    about = system(name).about
    assert {path.name for path in (bench.RESULTS / name).glob("*.png")} <= set(about.pictures)
    assert about.result(bench.stored()[name][1].experiments)


def test_the_readme_has_a_row_for_each_system() -> None:
    readme = bench.README.read_text()
    assert with_numbers(readme, bench.overview(), bench.BEGIN, bench.END) == readme, "run python -m bench.systems"
    rows = [line for line in readme.splitlines() if "](docs/systems/" in line]
    assert len(rows) == len(NAMES)
    for row in rows:
        picture = row.split('<img src="')[1].split('"')[0]
        assert (bench.ROOT / picture).read_bytes().startswith(b"\x89PNG")


def test_missing_experiments_are_named_in_few_words() -> None:
    grid = [f"grid-{i}" for i in range(4)]
    known = ["one", *grid, "pair-1", "pair-2"]
    assert grouped(["one", *grid, "pair-1", "pair-2"], known) == ["one", "grid-*", "pair-1", "pair-2"]
    assert grouped(grid[1:], known) == grid[1:], "so few are named"
    assert grouped(grid, [*grid, "grid-4"]) == ["grid-* (4 of 5)"], "one of the grid was run"


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_missing_package_is_known_before_the_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a line from `lacking`, half an hour of other experiments could come first. --quick needs no package."""

    def absent(package: str) -> Path:
        raise ValueError(f"the package {package!r} is not installed")

    monkeypatch.setattr("fastsae.systems.material.package_folder", absent)
    found = system(name)
    quick = {one: found.lacking(experiment) for one, experiment in found.experiments(quick=True).items()}
    assert not any(quick.values()), quick
    full = {found.lacking(experiment) for experiment in found.experiments().values()} - {None}
    packages = {value for value in found.scale.values() if str(value).startswith("package:")}
    assert bool(full) == bool(packages)
    assert all("pip install --no-deps" in line for line in full)
