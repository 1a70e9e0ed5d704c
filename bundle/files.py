"""Folders and files that are whole or not there: atomic writes, SHA-256, verification."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reelrt.errors import InputError, IntegrityError

BLOCK_BYTES = 1 << 20

OWN = ("manifest.json", "quality.json", "calibration-request.json", "*.cache")
"""What may lie in one of our folders without being in its manifest."""
MARKS = ("schedules.safetensors", "settings.json")
"""Files that tell one of our folders whose manifest is damaged."""


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


def check_replaceable(shown: Path, kind: str) -> None:
    """Refuse, before any work, a place where `atomic_folder` would refuse to write.

    Args:
        shown: The folder, as the user named it.
        kind: What shall be written there.

    Raises:
        InputError: The message names what is in the way.
    """
    target = shown.resolve()
    if not target.exists():
        return
    other = "Name another folder, or remove it yourself."
    if not target.is_dir():
        raise InputError(f"{shown} is a file, where a folder shall be written.", other)
    if target.is_mount() or Path.cwd().is_relative_to(target):
        raise InputError(f"{shown} cannot be replaced as a whole: it is in use.", "Name a folder in it.")
    if not any(target.iterdir()):
        return
    manifest = _manifest(target)
    if manifest is None or manifest.get("kind", kind) != kind:
        holds = "" if manifest is None else f" ({manifest['kind']!r})"
        raise InputError(f"{shown} exists{holds} and is not {_called(kind)} to replace.", other)
    listed = manifest.get("files", {})
    for path in sorted(path for path in target.rglob("*") if path.is_file()):
        name = path.relative_to(target).as_posix()
        if listed and not (name in listed or any(path.match(own) for own in OWN)):
            raise InputError(
                f"{shown} holds {name}, which is no part of it and would be deleted.", "Move it elsewhere."
            )


@contextmanager
def atomic_folder(target: Path, kind: str) -> Iterator[Path]:
    """Write a folder as a whole: into a temporary sibling that takes its place at the end.

    Whatever stops the block (an error, Ctrl-C, a full disk) leaves the target as it was and
    removes the sibling. A link to a folder stays, and what it leads to is replaced.

    Args:
        target: Where the folder shall be. An existing folder is replaced, but only if it is
            empty or its `manifest.json` is of the same kind and nothing of somebody else's lies
            beside it: nobody's photos are ever deleted.
        kind: What the folder's manifest says it is: `bundle` or `engines`, say.

    Yields:
        The temporary folder to write into.

    Raises:
        InputError: The target exists and is not ours to replace, or cannot be created.
    """
    shown, target = target, target.resolve()
    check_replaceable(shown, kind)
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
        for path in paths:  # before the first is replaced
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        for source, path in zip(partial, paths, strict=True):
            source.replace(path)
    finally:
        for source in partial:
            source.unlink(missing_ok=True)


def _called(kind: str) -> str:
    return {"engines": "an engine set"}.get(kind, f"a {kind}")


def _manifest(folder: Path) -> dict[str, Any] | None:
    """A folder's manifest as far as it can be read; None when there is none or it is somebody else's."""
    if not (folder / "manifest.json").is_file():
        return None
    try:
        data = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        damaged = not isinstance(data["kind"], str) or not isinstance(data["files"], dict)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        damaged, data = True, {}
    if not damaged:
        return dict(data)
    # A damaged one of ours has our files beside it; a web page's has not.
    return {} if any((folder / mark).is_file() for mark in MARKS) else None


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
