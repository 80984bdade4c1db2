"""Self-contained HTML pages: templates that extend base.html, which has the style sheet, and tables of settings."""

from __future__ import annotations

import importlib.resources
import json
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup


def render(package: str, template: str, **values: Any) -> str:
    """The HTML of a template of that package. Values are escaped; a name that is not given raises UndefinedError."""

    def read(name: str) -> str:
        folder = __package__ if name == "base.html" else package
        return (importlib.resources.files(folder) / name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, loader=jinja2.FunctionLoader(read)
    )
    return environment.get_template(template).render(css=Markup(style()), **values)


def style() -> str:
    """The style sheet of all pages and pictures."""
    return (importlib.resources.files(__package__) / "style.css").read_text(encoding="utf-8")


def visible(text: str) -> str:
    """Text with visible symbols for line breaks and control characters, so that a passage is one paragraph."""
    text = text.replace("\r\n", "⏎").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() or c == " " else "·" for c in text)


@dataclass(frozen=True)
class SettingsGroup:
    """One table of settings."""

    name: str
    rows: list[tuple[str, str]]


def flat(section: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as rows of "outer.inner" and value: text as it is, anything else as JSON."""
    rows: list[tuple[str, str]] = []
    for key, value in section.items():
        if isinstance(value, dict) and value:
            rows += flat(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return rows
