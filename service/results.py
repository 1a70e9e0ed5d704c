"""The folder of results: files that are whole or not there, counted against a quota.

Only their sum is kept in memory, however many there are.

    results/ID/video.mp4, thumbnail.jpg, spritesheet.jpg    of completed jobs
    partial/ID/…                                            being written; removed at a start

Files are written into `partial`, synchronised to the disk, and renamed as a folder. Knows nothing of
jobs but their ids.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from reelrt.errors import StorageError
from reelrt.service.disk import refused, unusable
from reelrt.service.jobs import Variant

PICTURES: Mapping[Variant, str] = {"thumbnail": "thumbnail.jpg", "spritesheet": "spritesheet.jpg"}


class Results:
    """Finished files, by job.

    Args:
        folder: The service's folder.
        quota: Most bytes of results.
        reserve: Bytes of the disk that stay free.

    Raises:
        StorageError: The folder cannot be made.
    """

    def __init__(self, folder: Path, quota: int, reserve: int) -> None:
        self._done, self._partial = folder / "results", folder / "partial"
        self.quota, self._reserve = quota, reserve
        self._lock = threading.Lock()
        try:
            for each in (self._done, self._partial):
                each.mkdir(parents=True, exist_ok=True)
            self._bytes = sum(map(_size, self._done.iterdir()))
        except OSError as error:
            raise unusable(folder, error) from error

    @property
    def bytes(self) -> int:
        """Size of all results."""
        return self._bytes

    @property
    def free(self) -> int:
        """Free bytes of the disk."""
        return shutil.disk_usage(self._done).free

    def check_room(self, size: int = 0) -> None:
        """Refuse what would not fit.

        Args:
            size: Bytes that shall be added; 0 asks whether anything fits at all.

        Raises:
            StorageError: The quota is used up, or the disk is nearly full.
        """
        if (used := self.bytes) + max(size, 1) > self.quota:
            raise StorageError(
                f"the results take {used} bytes of {self.quota}.",
                "Delete some, or wait until some expire.",
                "quota_exceeded",
            )
        if (free := self.free) < self._reserve + size:
            raise StorageError(f"the disk has {free} bytes left.", "Free some space.", "disk_full")

    @contextmanager
    def writing(self, job_id: str) -> Iterator[Path]:
        """A folder to write a job's files into. It becomes the result when the block ends well.

        Raises:
            StorageError: The quota or the disk is full.
        """
        partial = self._partial / job_id
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            yield partial
            for path in (*partial.iterdir(), partial):
                synchronise(path)
            size = _size(partial)
            self.check_room(size)
            with self._lock:
                partial.rename(self._done / job_id)
                self._bytes += size
            synchronise(self._done)
        except OSError as error:
            raise refused("the video's files cannot be written", partial, error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def copy(self, job_id: str, other: str) -> dict[Variant, int]:
        """Give a job the files of another one; they share the disk's space where it can be shared.

        Returns:
            Variant to size in bytes.

        Raises:
            FileNotFoundError: The other one's files are gone.
            StorageError: The quota or the disk is full.
        """
        sources = sorted((self._done / other).iterdir())
        with self.writing(job_id) as partial:
            for source in sources:
                link(source, partial / source.name)
        return self.files(job_id)

    def files(self, job_id: str) -> dict[Variant, int]:
        """Variant to size of a job's files, as they lie there."""
        return {variant: path.stat().st_size for variant, path in self._paths(job_id)}

    def path(self, job_id: str, variant: Variant) -> Path | None:
        """Where a file of a job is, if it is there."""
        return dict(self._paths(job_id)).get(variant)

    def _paths(self, job_id: str) -> Iterator[tuple[Variant, Path]]:
        names: dict[str, Variant] = {name: variant for variant, name in PICTURES.items()}
        folder = self._done / job_id
        for path in folder.iterdir() if folder.is_dir() else ():
            yield names.get(path.name, "video"), path

    def remove(self, job_id: str) -> None:
        """Remove a job's files, if there are any."""
        folder = self._done / job_id
        with self._lock:  # of two who remove it, one takes its size off
            size = _size(folder)
            shutil.rmtree(folder, ignore_errors=True)
            self._bytes -= size - _size(folder)

    def keep_only(self, ids: Iterable[str]) -> int:
        """Remove what is half-written, and the files of all other jobs; how many of both there were."""
        kept = set(ids)
        stray = [*self._partial.iterdir(), *(each for each in self._done.iterdir() if each.name not in kept)]
        for path in stray:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        self._bytes = sum(map(_size, self._done.iterdir()))
        return len(stray)


def link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where a file system has no links.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: The system refused it.
    """
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)


def synchronise(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _size(folder: Path) -> int:
    """Bytes of a folder's files; of one that is not there none."""
    return sum(path.stat().st_size for path in folder.glob("*"))
