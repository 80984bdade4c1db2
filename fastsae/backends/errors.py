"""The error of a backend that cannot serve a call."""

from __future__ import annotations


class BackendError(RuntimeError):
    """No backend can serve the call, or the device refused it; the message says why."""
