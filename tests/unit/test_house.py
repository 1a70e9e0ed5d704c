"""The layout: links, package map and imports agree; running needs nothing of exporting."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 has no TOML reader")

ROOT = Path(__file__).parents[2]
HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "onnx",
    "onnxscript",
    "onnxslim",
    "polygraphy",
    "tensorrt",
    "tensorrt_bindings",
    "tensorrt_rtx",
    "tensorrt_rtx_bindings",
    "cuda",
    "pycuda",
    "modelopt",
)

# Refuses the modules that a runtime install does not have, as a bare environment would.
BARE = f"""
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refuse())
"""


def run_bare(code: str) -> subprocess.CompletedProcess[str]:
    script = BARE + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_links_package_map_and_packages_list_agree(project: dict) -> None:
    links = {
        path.name: path.readlink().as_posix() for path in (ROOT / "reelrt").iterdir() if path.is_symlink()
    }
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"reelrt", "tests"}
    setuptools = project["tool"]["setuptools"]
    assert links == {folder: f"../{folder}" for folder in folders}
    assert setuptools["package-dir"] == {"reelrt": "reelrt", **{f"reelrt.{name}": name for name in folders}}
    assert setuptools["packages"] == ["reelrt", *sorted(f"reelrt.{name}" for name in folders)]


def test_no_package_has_folders_that_an_install_would_leave_out(project: dict) -> None:
    folders = project["tool"]["setuptools"]["package-dir"].values()
    inner = [path for name in folders for path in (ROOT / name).rglob("*.py") if path.parent.name != name]
    assert [path for path in inner if not path.is_relative_to(ROOT / "reelrt")] == []


def test_ruff_bans_a_bare_import_of_every_folder(project: dict) -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"reelrt", "tests"}
    assert set(project["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]) == folders


def test_every_folder_has_import_rules(project: dict) -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"reelrt", "tests"}
    contracts = {contract["id"] for contract in project["tool"]["importlinter"]["contracts"]}
    assert folders <= contracts


def test_runtime_dependencies_name_one_onnx_runtime_and_nothing_heavy(project: dict) -> None:
    names = {line.split(">")[0].split("=")[0].strip() for line in project["project"]["dependencies"]}
    assert names & {"onnxruntime", "onnxruntime-gpu"} == {"onnxruntime"}
    assert not names & set(HEAVY)


def test_every_dependency_is_bounded_on_both_sides(project: dict) -> None:
    extras = project["project"]["optional-dependencies"].values()
    lines = [*project["project"]["dependencies"], *(line for extra in extras for line in extra)]
    assert [line for line in lines if not ((">=" in line and "<" in line) or "==" in line)] == []


@pytest.mark.parametrize("code", ["import reelrt.runtime", "import reelrt; reelrt.load", "import reelrt.cli"])
def test_importing_the_runtime_needs_nothing_heavy(code: str) -> None:
    result = run_bare(code)
    assert result.returncode == 0, result.stderr


def test_importing_the_runtime_does_not_even_try_heavy_modules() -> None:
    code = f"""
        import sys
        there = set(sys.modules)  # cuda-bindings 12.9 has the interpreter itself import a part of it
        sys.meta_path[0].find_spec = lambda *args, **options: None
        import reelrt.runtime, reelrt.runtime.pipeline, reelrt.runtime.video, reelrt.cli
        print([name for name in {HEAVY!r} if name in sys.modules and name not in there])
    """
    result = run_bare(code)
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr


def test_the_guard_of_these_tests_refuses() -> None:
    assert "No module named 'onnx'" in run_bare("import onnx").stderr


def test_help_loads_no_engine_library() -> None:
    code = """
        import sys
        from reelrt.cli import main
        sys.argv = ["reelrt", "--help"]
        try:
            main()
        finally:
            print([name for name in ("onnxruntime", "av", "numpy") if name in sys.modules], file=sys.stderr)
    """
    result = run_bare(code)
    assert result.returncode == 0
    assert result.stderr.strip() == "[]"
