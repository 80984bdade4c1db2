"""`python -m bench.systems`: the pages and tables of reproduced systems, drawn only from bench/results/systems/.

Writes each system's table.md and page.html, the generated part of docs/systems/NAME.md, and the README's table, with
a row for each system that has results. `fastsae reproduce NAME --out bench/results/systems/NAME` makes those results.
Pages are not committed: docs/systems/ says the same.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench.machine import ROOT
from bench.plot import with_numbers
from fastsae.atomic import replace_file
from fastsae.systems import SYSTEMS, system
from fastsae.systems.page import Run
from fastsae.systems.results import FILE, Results, markdown
from fastsae.systems.runner import System, publish, stored_run

RESULTS = ROOT / "bench" / "results" / "systems"
DOCS = ROOT / "docs" / "systems"
README = ROOT / "README.md"
BEGIN, END = "<!-- systems: begin (python -m bench.systems) -->", "<!-- systems: end -->"


def stored() -> dict[str, tuple[System, Results]]:
    """Every system with stored results, in the order of `SYSTEMS`."""
    return {name: (system(name), Results(RESULTS / name, name)) for name in SYSTEMS if (RESULTS / name / FILE).exists()}


def document(name: str, found: System, results: Results) -> str:
    """The generated part of docs/systems/NAME.md: the text of the page, its tables, and links to its pictures."""
    # Without the time that the rest would take, which is measured again on every machine.
    about, run = found.about, replace(stored_run(name, found, results), to_come=None)
    folder = Path("../..") / RESULTS.relative_to(ROOT) / name
    sources = "; ".join(f"[{title}]({url})" for title, url in about.sources.items())
    shown = about.result(run.records)
    return markdown([
        f"# {about.title}", f"After {sources}.",
        f"**Published.** {about.claim}", *([f"**Here.** {shown}"] if shown else []),
        "## What runs here", about.here, *_notes(run),
        f"```bash\n{run.command}\n```", _how(run),
        "## Results", *found.tables(run.records),
        "## Pictures", *(f"![{caption}]({folder / file})\n\n*{caption}*" for file, caption in about.pictures.items()
                         if (RESULTS / name / file).exists()),
        "## Not verified", "\n".join(f"- {one}" for one in about.unverified),
    ])  # fmt: skip


def _notes(run: Run) -> list[str]:
    return [f"{text} {', '.join(f'`{name}`' for name in names)}" for text, names in run.notes]


def _how(run: Run) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.made_with.items())
    whole = f" `fastsae reproduce {run.name}` runs every experiment." if run.missing or run.scale else ""
    return f"This gives the results below and took {run.took} ({versions}).{whole}"


def overview() -> str:
    """The README's table: for each system a picture, a sentence with its result, the command and where more is said."""
    rows = []
    for name, (found, results) in stored().items():
        about = found.about
        picture = next(file for file in about.pictures if (RESULTS / name / file).exists())
        image = f'<img src="{(RESULTS / name / picture).relative_to(ROOT)}" width="260" alt="{about.title}">'
        more = f"`fastsae reproduce {name}`, [more](docs/systems/{name}.md)"
        rows.append([f"[{about.title}](docs/systems/{name}.md)", image, about.result(results.experiments), more])
    header = ["system", "picture", "result", "command"]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def main() -> None:
    argparse.ArgumentParser(prog="python -m bench.systems", description=__doc__).parse_args()
    texts = {README: overview()}
    for name, (found, results) in stored().items():
        publish(name, found, results)
        texts[DOCS / f"{name}.md"] = document(name, found, results)
    for path, text in texts.items():
        old = path.read_text() if path.exists() else f"{BEGIN}\n{END}\n"
        renewed = with_numbers(old, text, BEGIN, END)
        replace_file(path, partial(Path.write_text, data=renewed))


if __name__ == "__main__":
    main()
