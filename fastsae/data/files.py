"""Files that are either whole or not there: atomic writes, checksums, and the error a damaged file raises."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path

TEMPORARY = ".partial"  # suffix of a file that is still being written; a later run removes what a killed one left


class ShardError(ValueError):
    """A stored file is missing, truncated, altered or not what the manifest says; the message names it."""


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in pieces so that no file has to fit into memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, data: bytes) -> str:
    """Write `data` so that `path` holds all of it or is left as it was, even if the machine stops; returns its sha256.

    Temporary file in the same folder, fsync, rename, fsync of the folder.
    Raises: OSError (same errno) saying what could not be written, how much room there is and what to do; the
    temporary file is removed and everything written before stays.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _write_error(path, len(data), error) from error
    sync_folder(path.parent)
    return hashlib.sha256(data).hexdigest()


def sync_folder(folder: Path) -> None:
    """fsync a folder, without which a rename inside it can be lost with the power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Remove what a killed writer left half-written. Only while holding the folder's lock."""
    for leftover in folder.glob("*" + TEMPORARY):
        leftover.unlink(missing_ok=True)


def _write_error(path: Path, size: int, error: OSError) -> OSError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    message = f"could not write {path} ({size:,} bytes): {reason}; nothing saved before it is lost"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(path.parent).free
        message += f". {free:,} bytes are free there: make room (or raise the limit) and run the same command again"
    return OSError(error.errno, message)
