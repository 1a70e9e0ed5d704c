"""The files that install the service: what systemd says of them, and what Docker would be given."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 has no TOML reader")

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "jetson" / "reelrt.service"


def test_systemd_takes_the_unit_and_finds_it_well_closed(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / UNIT.name
    unit.write_text(re.sub(r"^ExecStart=.*$", "ExecStart=/bin/true", UNIT.read_text(), flags=re.MULTILINE))
    verified = subprocess.run(
        ["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False
    )
    assert (verified.returncode, verified.stderr) == (0, "")
    command = ["systemd-analyze", "security", "--offline=yes", "--threshold=30", str(unit)]
    rated = subprocess.run(command, capture_output=True, text=True, check=False)
    assert rated.returncode == 0, rated.stdout


def test_the_container_is_given_every_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    given = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    folders = set(project["tool"]["setuptools"]["package-dir"].values())
    assert folders | {"pyproject.toml", "README.md", "LICENSE"} == given


def test_neither_runs_as_root() -> None:
    docker = (ROOT / "jetson" / "Dockerfile").read_text()
    assert re.search(r"^USER reelrt$", docker, flags=re.MULTILINE)
    assert docker.index("USER reelrt") < docker.index("ENTRYPOINT")
    assert re.search(r"^DynamicUser=yes$", UNIT.read_text(), flags=re.MULTILINE)
