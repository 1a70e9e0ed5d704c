"""Folders and files that are whole or not there: atomic writes, SHA-256, verification."""

from __future__ import annotations

import hashlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from reelrt.errors import InputError, IntegrityError

BLOCK_BYTES = 1 << 20


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def hash_folder(folder: Path, without: tuple[str, ...] = ("manifest.json",)) -> dict[str, str]:
    """Hash every file of a folder, at any depth.

    Returns:
        Path relative to the folder (with forward slashes) to hex SHA-256, sorted.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: sha256(path) for name, path in names.items() if name not in without}


def verify(folder: Path, files: Mapping[str, str]) -> None:
    """Check that a folder holds the files its manifest lists, unchanged.

    Raises:
        IntegrityError: A file is missing or its hash is another; the message names it.
    """
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise IntegrityError(f"{path} is missing.", "Build this folder again.")
        found = sha256(path)
        if found != expected:
            raise IntegrityError(
                f"{path} is damaged: its SHA-256 is {found[:12]}..., the manifest says {expected[:12]}....",
                "Build this folder again.",
            )


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Write a folder as a whole: into a temporary sibling that takes its place at the end.

    Whatever stops the block (an error, Ctrl-C, a full disk) leaves the target as it was and
    removes the sibling.

    Args:
        target: Where the folder shall be. An existing folder is replaced, but only if it is
            empty or holds a `manifest.json`: nobody's photos are ever deleted.

    Yields:
        The temporary folder to write into.

    Raises:
        InputError: The target exists and is not ours to replace, or cannot be created.
    """
    if target.exists() and not _is_ours(target):
        raise InputError(
            f"{target} exists and is neither empty nor a bundle or engine set.",
            "Name another folder, or remove it yourself.",
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise InputError(f"cannot write to {target.parent}: {error.strerror}.") from error
    try:
        yield partial
        partial.chmod(0o755)
        _replace(partial, target)
    finally:
        _remove(partial)


@contextmanager
def atomic_files(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Write files as a whole: into temporary siblings that take their places at the end.

    Whatever stops the block leaves the files as they were and removes the siblings.

    Args:
        paths: Where the files shall be; their folders exist.

    Yields:
        The path to write to for each, with its extension in lower case.
    """
    token = secrets.token_hex(4)
    partial = [path.with_name(f".{path.stem}.{token}{path.suffix.lower()}") for path in paths]
    try:
        yield partial
        for source, path in zip(partial, paths, strict=True):
            source.replace(path)
    finally:
        for source in partial:
            source.unlink(missing_ok=True)


def _is_ours(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    return (folder / "manifest.json").is_file() or not any(folder.iterdir())


def _replace(source: Path, target: Path) -> None:
    if not target.exists():
        source.rename(target)
        return
    aside = source.with_suffix(".old")
    try:
        target.rename(aside)
        source.rename(target)
    finally:
        if not target.exists():
            aside.rename(target)  # the new one did not come; Ctrl-C between the two, say
        _remove(aside)


def _remove(folder: Path) -> None:
    """Remove a folder; nor does a second Ctrl-C leave half of it."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
