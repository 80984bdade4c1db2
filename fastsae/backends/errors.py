"""What a backend says when it cannot."""

from __future__ import annotations


class BackendError(RuntimeError):
    """The backend that was asked for cannot serve the call, or was refused by the device; the message says why."""
