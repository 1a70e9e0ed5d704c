"""What the system says of a disk, as errors: with a path at a start, without one for clients."""

from __future__ import annotations

import errno
import logging
import shutil
import sqlite3
from pathlib import Path

from reelrt.errors import StorageError

log = logging.getLogger("reelrt")

LEAST_BYTES = 1 << 20
"""A disk with less is full: SQLite names other reasons when it cannot make its files."""


def is_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if isinstance(error, sqlite3.Error) and "full" in str(error):
            return True
        error = error.__cause__
    return False


def refused(what: str, path: Path, error: OSError | sqlite3.Error) -> StorageError:
    """The error of something that could not be written or read. The path is for the log."""
    log.warning("%s: %s", path, error)
    if is_full(error):
        return StorageError("the disk is full.", "Free some space.", "disk_full")
    return StorageError(f"{what}: {_reason(error)}.")


def unusable(path: Path, error: OSError | sqlite3.Error | StorageError) -> StorageError:
    """Why a service cannot start on its folder, or a file there."""
    folder = path if path.is_dir() else path.parent
    if is_full(error) or (not isinstance(error, StorageError) and not _has_room(folder)):
        remedy = "Free some space there, or name another folder (--data)."
        return StorageError(f"the disk of {folder} is full.", remedy, "disk_full")
    if isinstance(error, StorageError):
        cause = error.__cause__
        if str(path) in str(error) or not isinstance(cause, (OSError, sqlite3.Error)):
            return error
        error = cause
    return StorageError(f"{path} cannot be used: {_reason(error)}.", "Is it writable, and the disk sound?")


def _has_room(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free >= LEAST_BYTES
    except OSError:
        return True


def _reason(error: OSError | sqlite3.Error) -> str:
    return str(error.strerror if isinstance(error, OSError) else error)
