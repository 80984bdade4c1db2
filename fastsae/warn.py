"""Warnings that point at the line of the user's code that caused them."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from types import FrameType

import torch

_PASSED = (
    os.path.dirname(os.path.abspath(__file__)) + os.sep,
    os.path.dirname(os.path.abspath(torch.__file__)) + os.sep,
    contextlib.__file__,  # a context manager may be a decorator, whose call is a frame there
    functools.__file__,
    "<frozen ",  # imports
)


def warn(message: str, category: type[Warning]) -> None:
    """`warnings.warn`, pointing at the nearest caller outside fastsae and torch, or at the outermost frame.

    Python 3.12 has skip_file_prefixes for this; 3.11 does not.
    """
    frame = outermost = sys._getframe(1)
    found: FrameType | None = frame
    while found is not None and found.f_code.co_filename.startswith(_PASSED):
        outermost, found = found, found.f_back
    frame = found or outermost
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__", "<unknown>"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
        source=None,
    )
