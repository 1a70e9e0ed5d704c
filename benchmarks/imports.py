"""The runtime in a new environment that holds its dependencies and nothing else: size and import time.

Knows nothing of models; needs a package index, or a folder of wheels, that pip can reach.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
IMPORTS = (
    "import reelrt.runtime",
    "import reelrt; reelrt.load",
    "import reelrt; reelrt.load; import reelrt.runtime.ort",
)
EXPORTERS = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "polygraphy")
IMPORT_SCRIPT = """
import json, sys, time
began = time.perf_counter()
{statement}
seconds = time.perf_counter() - began
print(json.dumps([seconds, sorted({exporters!r} & set(sys.modules))]))
"""


def measure_imports(repeats: int) -> dict[str, Any]:
    """Install the runtime into a new environment and time its imports there.

    Returns:
        Per statement the median seconds of the import and of the whole process; and what the
        environment holds.
    """
    with tempfile.TemporaryDirectory(prefix="reelrt-import-") as scratch:
        # A copy, because an install leaves its build files where the sources are.
        ours = ("reelrt", "bundle", "calibration", "engines", "export", "jetson", "runtime", "service")
        source = Path(scratch) / "source"
        for name in ours:
            skipped = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skipped)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        place = Path(scratch) / "venv"
        venv.create(place, with_pip=True)
        python = place / "bin" / "python"
        install = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", str(source)]
        subprocess.run(install, check=True, env=_bare())
        statements = {statement: _import(python, statement, repeats) for statement in IMPORTS}
        return {**_environment(python, place), "statements": statements}


def _bare() -> dict[str, str]:
    """The environment without what would let another installation in."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def _import(python: Path, statement: str, repeats: int) -> dict[str, Any]:
    script = IMPORT_SCRIPT.format(statement=statement, exporters=set(EXPORTERS))
    runs, processes, heavy = [], [], []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        done = subprocess.run(
            [python, "-c", script], cwd="/", env=_bare(), capture_output=True, text=True, check=True
        )
        processes.append(time.perf_counter() - began)
        seconds, heavy = json.loads(done.stdout)
        runs.append(seconds)
    return {
        "first_seconds": runs[0],
        "seconds": statistics.median(runs[1:]),
        "process_seconds": statistics.median(processes[1:]),
        "exporters_loaded": heavy,
    }


def _environment(python: Path, place: Path) -> dict[str, Any]:
    """The packages beside pip in an environment, and the bytes they take."""
    command = [str(python), "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    listed = json.loads(subprocess.run(command, env=_bare(), capture_output=True, check=True).stdout)
    packages = {each["name"]: each["version"] for each in listed if each["name"] not in ("pip", "setuptools")}
    own = {"pip", "setuptools", "_distutils_hack", "pkg_resources"}
    files = [path for path in place.glob("lib/python*/site-packages/**/*") if path.is_file()]
    size = sum(path.stat().st_size for path in files if _package(path).partition("-")[0] not in own)
    return {"packages": packages, "size_bytes": size}


def _package(path: Path) -> str:
    parts = path.parts
    return parts[parts.index("site-packages") + 1]
