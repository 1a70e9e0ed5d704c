"""A folder that one process at a time may use."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from reelrt.errors import StorageError
from reelrt.service.disk import unusable


class FolderLock:
    """A lock on a folder; the system lets go of it when the process ends, however it ends.

    Args:
        folder: The folder; made if missing, for its owner alone: prompts are private.

    Raises:
        StorageError: Another process has it, or it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise unusable(folder, error) from error
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._handle)
            raise StorageError(
                f"another service uses {folder}.", "Stop it, or name another folder."
            ) from error

    def release(self) -> None:
        """Let go of it; may be called twice."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
