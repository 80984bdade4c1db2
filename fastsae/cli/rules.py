"""The options of `fastsae train` that choose an activation rule, made from the fields of every registered rule.

Rules share names (k, weights). Each name is one option; its help says which rules have it, its meaning for each, and
its defaults. An option that is left out is None, and the rule's own default applies. So an option that the chosen rule
does not have is detected and refused.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import typing
from collections.abc import Callable, Collection
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import tyro

from fastsae.model.rules import Activation, variants

DEFAULT = "topk"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuleOptions:
    """The rule that selects latents. The help of each setting names the rules that have it."""

    activation: str = DEFAULT
    settings: ClassVar[dict[str, str]] = {}
    """The rules' field of each option."""

    def rule(self) -> Activation:
        """The activation rule. Raises ValueError for a setting that is missing, invalid, or of another rule."""
        rule, parts = variants()[self.activation]
        owners = _owners(rule, parts)
        given: dict[type[Activation], dict[str, Any]] = {owner: {} for owner in (rule, *parts.values())}
        for option, setting in self.settings.items():
            value = getattr(self, option)
            if value is not None and setting not in owners:
                raise ValueError(f"{option} is {value}, but {self.activation} has no such setting; leave it out")
            if value is not None:
                given[owners[setting].owner][setting] = value
        for option, setting in self.settings.items():
            if setting in owners and owners[setting].required and setting not in given[owners[setting].owner]:
                raise ValueError(f"{self.activation} needs --{option.replace('_', '-')}")
        return rule(**{name: part(**given[part]) for name, part in parts.items()}, **given[rule])


def rule_options(taken: Collection[str]) -> type[RuleOptions]:
    """RuleOptions with an option for each setting of each registered rule.

    taken: the names of other options. A setting with one of these names becomes activation_NAME.
    """
    owned = {variant: _owners(*found) for variant, found in variants().items()}
    names = list(dict.fromkeys(name for settings in owned.values() for name in settings))
    options: list[tuple[str, Any, Any]] = [
        ("activation", Annotated[Literal[*owned], tyro.conf.arg(help="The rule.")], dataclasses.field(default=DEFAULT))
    ]
    settings = {}
    for name in names:
        having = {variant: found[name] for variant, found in owned.items() if name in found}
        option = f"activation_{name}" if name in taken or name == "activation" else name
        settings[option] = name
        kinds = tuple(dict.fromkeys(setting.type for setting in having.values()))
        described = tyro.conf.arg(help=_help(having), help_behavior_hint=f"(default: {_defaults(having)})")
        options.append((option, Annotated[typing.Union[*kinds, None], described], dataclasses.field(default=None)))
    return dataclasses.make_dataclass(
        "RuleOptions", options, bases=(RuleOptions,), namespace={"settings": settings, "__doc__": RuleOptions.__doc__},
        frozen=True, kw_only=True,
    )  # fmt: skip


def settings_of(options: type[RuleOptions], activation: str) -> dict[str, str]:
    """What a rule's own options mean, with their defaults, by option; those that must be given come first."""
    owned = _owners(*variants()[activation])
    having = sorted((not owned[name].required, option) for option, name in options.settings.items() if name in owned)
    found = {}
    for _, option in having:
        setting = owned[options.settings[option]]
        default = "must be given" if setting.required else f"default: {_shown(setting.default)}"
        found[f"--{option.replace('_', '-')}"] = f"{setting.help.rstrip('.')} ({default})"
    return found


@dataclasses.dataclass(frozen=True)
class _Setting:
    """A field of a rule's class: its type, its docstring, and its default if it has one."""

    owner: type[Activation]
    type: Any
    help: str
    required: bool
    default: Any


def _owners(rule: type[Activation], parts: dict[str, type[Activation]]) -> dict[str, _Setting]:
    """The settings of a variant by name: those of its parts, overridden by the rule's own."""
    found: dict[str, _Setting] = {}
    for owner in (*parts.values(), rule):
        hints, docs = typing.get_type_hints(owner), _docstrings(owner)
        for field in dataclasses.fields(owner):  # type: ignore[arg-type]
            if owner is rule and field.name in parts:
                continue
            made = field.default_factory
            default = field.default if made is dataclasses.MISSING else made()
            required = default is dataclasses.MISSING
            found[field.name] = _Setting(owner, hints[field.name], docs.get(field.name, ""), required, default)
    return found


@functools.cache  # one command reads them several times, which takes a second
def _docstrings(owner: type) -> dict[str, str]:
    """The docstring under each field of a class and its bases; none if the source is not available."""
    found: dict[str, str] = {}
    for cls in reversed(owner.__mro__[:-1]):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
        except (OSError, TypeError):
            continue
        for field, text in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found


def _help(having: dict[str, _Setting]) -> str:
    """ "topk, matryoshka: Active latents per token. group_max: Groups ...": each text once, after its rules."""
    return " ".join(f"{', '.join(kinds)}: {text}" for text, kinds in _grouped(having, lambda s: s.help).items())


def _defaults(having: dict[str, _Setting]) -> str:
    """ "32", or "5.0 of relu, 1.0 of gated"."""
    groups = _grouped(having, lambda s: "must be given" if s.required else _shown(s.default))
    return next(iter(groups)) if len(groups) == 1 else ", ".join(f"{v} of {', '.join(k)}" for v, k in groups.items())


def _shown(default: Any) -> str:
    return "none" if default is None or default == () else str(default)


def _grouped(having: dict[str, _Setting], key: Callable[[_Setting], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for variant, setting in having.items():
        groups.setdefault(key(setting), []).append(variant)
    return groups
