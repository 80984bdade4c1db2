"""The command line: fastsae harvest | train | sweep | eval | report | reproduce | convert | info | bench.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 an error (one line on stderr), 2 wrong
usage, 130 Ctrl-C (143 SIGTERM).
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import signal
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

COMMANDS = {
    "harvest": "store a language model's activations over a text as shards on disk",
    "train": "train a sparse autoencoder on activations",
    "sweep": "train rules x L0s x sizes x seeds, and write one table, plot and page for all",
    "eval": "measure a run on held-out rows",
    "report": "write a run's curves and latents into one HTML page",
    "reproduce": "run a published system and print its figures beside the published ones",
    "convert": "read a saved autoencoder in any known format and write it in another",
    "info": "show what is installed and which backends work here",
    "bench": "time a whole training step against dense PyTorch (needs the source repository)",
}

USAGE = "\n".join(
    [
        "usage: fastsae COMMAND [OPTIONS]",
        "",
        "An exact engine for training and running sparse autoencoders.",
        "",
        "commands:",
        *(f"  {name:<10}{text}" for name, text in COMMANDS.items()),
        "",
        "  fastsae COMMAND --help   every option of a command",
        "  fastsae --version        the version",
        "",
        "exit codes: 0 done, 1 error, 2 wrong usage, 130 interrupted",
    ]
)


class UsageError(ValueError):
    """A command line that names no command, or options that do not fit it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; errors that a user can fix are one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    name = f"fastsae {arguments[0]}" if arguments and arguments[0] in COMMANDS else "fastsae"
    try:
        with _plain_messages(debug):
            return run(arguments)
    except KeyboardInterrupt as stop:
        signum = int(getattr(stop, "signal", signal.SIGINT))
        print(f"{name}: {one_line(stop) or 'interrupted'}", file=sys.stderr)
        return 128 + signum
    except BrokenPipeError:
        # The reader (`| head`) has closed the pipe: Python's flush at exit must not write to it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        if debug or not expected(error):
            raise
        print(f"{name}: error: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def expected(error: BaseException) -> bool:
    """Whether an error is about the user's input or machine, not a bug in the program.

    Of RuntimeErrors, only those defined in this package count, because torch raises RuntimeError for its own faults.
    """
    ours = type(error).__module__.split(".")[0] == "fastsae"
    return ours or not isinstance(error, RuntimeError)


def one_line(error: BaseException) -> str:
    """An error's message without line breaks; for a system error the file and the reason."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return " ".join(error.strerror.split())
    return " ".join(str(error).split())


def run(arguments: list[str]) -> int:
    """Parses and runs; imports only what the command needs, because torch alone takes a second."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from fastsae.runs.opening import version

        print(version())
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        raise UsageError(f"no command {command!r}; the commands are {', '.join(COMMANDS)}; see fastsae --help")
    from fastsae.cli import commands
    from fastsae.cli.processes import started_by_torchrun

    if started_by_torchrun() and command not in ("train", "info"):
        raise UsageError(f"torchrun started this, but only fastsae train shares its work; run fastsae {command} alone")
    if command == "bench":
        return commands.bench(rest)
    options = parse(commands.OPTIONS[command], command, rest)
    return 0 if options is None else commands.RUN[command](options)


def parse(options: type, command: str, arguments: list[str]) -> Any:
    """The parsed options, or None after --help. Raises UsageError, in one line, for options that do not parse."""
    import tyro

    from fastsae.cli.options import REPLACED

    for given in arguments if command == "train" else ():
        name = given.partition("=")[0].replace("_", "-")
        if name in REPLACED:
            raise UsageError(f"{name} is now {REPLACED[name]}; see fastsae {command} --help")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                options, prog=f"fastsae {command}", args=arguments, description=described(options, command, arguments)
            )
    except SystemExit as stop:
        if not stop.code:
            return None
        raise UsageError(_flattened(complaint.getvalue(), command)) from None


def described(options: type, command: str, arguments: list[str]) -> str:
    """The text above the options in a command's --help: what the command does, and the options that most calls set."""
    from fastsae.cli.options import rule_settings

    about = inspect.cleandoc(options.__doc__ or "")
    chosen: dict[str, str] = getattr(options, "essential", {})
    if not chosen:
        return about
    told = [about, "", "The options that most calls set; every other one has a default:", *_columns(chosen)]
    if command == "train":
        rule, settings = rule_settings(arguments)
        told += ["", f"Options of the rule {rule} (for another rule: --activation NAME --help):", *_columns(settings)]
    return "\n".join(told)


def _columns(texts: dict[str, str]) -> list[str]:
    width = max(map(len, texts), default=0) + 2
    indent = " " * (width + 2)
    return [
        line
        for name, text in texts.items()
        for line in textwrap.wrap(text, 100, initial_indent=f"  {name:<{width}}", subsequent_indent=indent)
    ]


def _flattened(box: str, command: str) -> str:
    """tyro's boxed error as one line: what is wrong, and a suggestion if tyro makes one."""
    parts: list[list[str]] = [[]]
    for line in box.splitlines()[1:-1]:
        text = line.strip("│|")
        if set(text.strip()) <= set("─-"):
            parts.append([])
        elif len(text) - len(text.lstrip()) < 8:  # deeper lines repeat an option's help
            parts[-1].append(text.strip())
    said = [" ".join(part) for part in parts if part and not part[0].startswith(("For full", "Argument help"))]
    return f"{'; '.join(said)}; see fastsae {command} --help"


@contextlib.contextmanager
def _plain_messages(debug: bool) -> Iterator[None]:
    """Prints warnings and this package's log lines as single lines on stderr while a command runs."""
    logger, handler = logging.getLogger("fastsae"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("fastsae: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    with warnings.catch_warnings():
        if not debug:
            warnings.formatwarning = lambda message, *_: f"fastsae: warning: {' '.join(str(message).split())}\n"
        before = warnings.formatwarning
        try:
            yield
        finally:
            warnings.formatwarning = before
            logger.removeHandler(handler)
            logger.setLevel(level)
