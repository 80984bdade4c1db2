"""Files of stored activations: how they are written, and the error for damaged ones."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path

from fastsae.atomic import replace_file


class ShardError(ValueError):
    """A stored file is missing, truncated, altered or does not match the manifest; the message names it."""


def write_atomically(path: Path, data: bytes) -> str:
    """Writes `data` so that `path` holds all of it or stays unchanged, even if the machine stops; returns its sha256.

    Raises: OSError (same errno) saying what could not be written, how much space is free and what to do. Earlier files
    are not touched.
    """
    try:
        replace_file(path, lambda partial: partial.write_bytes(data))
    except OSError as error:
        raise _write_error(path, len(data), error) from error
    return hashlib.sha256(data).hexdigest()


def _write_error(path: Path, size: int, error: OSError) -> OSError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    message = f"could not write {path} ({size:,} bytes): {reason}; nothing saved before it is lost"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(path.parent).free
        message += f". {free:,} bytes are free there: make room (or raise the limit) and run the same command again"
    return OSError(error.errno, message)
