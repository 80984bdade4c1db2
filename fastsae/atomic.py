"""Files that are whole or absent, and folders that one process writes: replacement in one step, checksums, locks."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOCK = "LOCK"
_PARTIAL = re.compile(r"\..+\.(\d+)\.partial")  # what replace_file writes to before it renames; the number is its pid


def fsync_path(path: Path) -> None:
    """Blocks until a file's bytes, or a directory's entries, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in pieces so that no file has to fit into memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Replaces `path`: write(temporary name beside it), fsync, rename.

    Raises OSError naming `path`: the file is then unchanged, or, if only the folder's fsync failed, new and complete. A
    process killed in here leaves the temporary file behind; the next lock of the folder removes it (`lock_folder`).
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)
        # Created here, so that it gets the permissions of the user's umask: safetensors would make it private.
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        partial.chmod(mode)
        fsync_path(partial)
        os.replace(partial, path)
    except OSError as error:
        if error.filename is not None:
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        partial.unlink(missing_ok=True)
    fsync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file in one step. Raises OSError; the old file is then untouched."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def is_partial(path: Path) -> bool:
    """Whether this file's name is that of a temporary file of replace_file."""
    return _PARTIAL.fullmatch(path.name) is not None


def lock_folder(folder: Path) -> int:
    """Locks folder/LOCK, creating both, and removes partial files of killed writers; closing the result unlocks.

    The lock is the kernel's (flock) and dies with the process: a file left by `kill -9` blocks no other process.
    The pid inside is for the message only.
    Raises BlockingIOError whose strerror names the process that holds it, as "pid 12 on host"; OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        for path in folder.iterdir():
            match = _PARTIAL.fullmatch(path.name)
            if match is not None and path.is_file() and not _runs(int(match[1])):
                path.unlink(missing_ok=True)
    except BlockingIOError as error:
        holder = os.pread(fd, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(fd)
        raise BlockingIOError(error.errno, holder) from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def _runs(pid: int) -> bool:
    """Whether a process of this pid runs here; our own does, and may be writing in another thread."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass  # of another user, or no valid pid: not ours to clear
    return True
