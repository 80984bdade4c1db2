"""The error if no backend can serve a call, and the warning if a slower one serves it."""

from __future__ import annotations


class BackendError(RuntimeError):
    """No backend can serve the call, or the device refused it; the message says why."""


class BackendWarning(UserWarning):
    """A slower backend than the device could have serves the call; the message says why, and what to do."""
