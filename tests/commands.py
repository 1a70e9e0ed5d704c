"""The command line as a user runs it: in a process of its own, in a folder of their own."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    import pytest

# The commands run in other folders, and must find this checkout where it is not installed.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
PROMPT = "a red circle moving right"
MARK = "REELRT_TEST_MARK"


def reelrt(*words: object, folder: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `reelrt` with some words, in a folder, with further environment variables."""
    command = [sys.executable, "-m", "reelrt", *map(str, words)]
    environment = {**ENVIRONMENT, **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@dataclass(frozen=True, slots=True)
class Stopped:
    """A command that was sent a signal: its exit code, standard error, and processes it left behind."""

    code: int
    errors: str
    left: list[psutil.Process]


def stop(
    *words: object, folder: Path, when: Callable[[str], bool], number: signal.Signals, times: int = 1
) -> Stopped:
    """Run `reelrt` and send it a signal as soon as something holds of its standard error or the disk."""
    mark = secrets.token_hex(8)
    command = [sys.executable, "-m", "reelrt", *map(str, words)]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:

        def told() -> str:
            errors.seek(0)
            return errors.read()

        process = subprocess.Popen(
            command, cwd=folder, env={**ENVIRONMENT, MARK: mark}, stdout=subprocess.DEVNULL, stderr=errors
        )
        while process.poll() is None and not when(told()):
            time.sleep(0.05)
        for _ in range(times):
            process.send_signal(number)
            time.sleep(0.02)
        code = process.wait()
        # One that was only just started notices by itself that nobody talks to it.
        _, left = psutil.wait_procs([each for each in psutil.process_iter() if _mark(each) == mark], 10)
        return Stopped(code, told(), left)


def _mark(process: psutil.Process) -> str:
    try:
        return str(process.environ().get(MARK, ""))
    except psutil.Error:
        return ""


def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[str]]:
    """The processes that this one starts from now on."""
    found, popen = [], subprocess.Popen

    def start(*words: Any, **options: Any) -> subprocess.Popen[str]:
        found.append(popen(*words, **options))
        return found[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    return found


SMALL_DISK = """
mount -t tmpfs -o size="$1" tmpfs "$2" || exit 99
place=$2
shift 2
"$@"
code=$?
find "$place" -mindepth 1
exit $code
"""


def on_small_disk(size: str, place: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run `reelrt` where a folder is a file system of a given size, such as `400k`.

    Returns:
        The finished process; its standard output ends with what is left on the small disk. Its exit
        code is 99 where this user may not mount anything.
    """
    place.mkdir(exist_ok=True)
    unshare = [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        SMALL_DISK,
        "sh",
        size,
        str(place),
    ]
    command = [*unshare, sys.executable, "-m", "reelrt", *map(str, words)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def may_mount() -> bool:
    """Whether this user may mount a small disk in a name space of their own."""
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def tree(folder: Path) -> dict[str, str]:
    """Every file of a folder by its path, with its hash."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths
    }
