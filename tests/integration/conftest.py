"""Engine sets of small random models, made once for all tests that run them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

import reelrt
from reelrt.engines.builder import build_engines
from reelrt.export.exporter import export_bundle
from tests.commands import reelrt as run_reelrt
from tests.models import MODELS, tiny_model

SHIPPED = Path(__file__).parents[2] / "models" / "moving-shapes"
SIZES: dict[str, tuple[int | None, tuple[int, int] | None]] = {
    "tiny": (None, None),
    "small": (16, (64, 64)),
    "odd": (12, (56, 40)),
    SHIPPED.name: (16, (64, 64)),
}
"""Model to its largest video, frames and (width, height); None is the model's own."""

Made = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this test run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def made(shared: Path) -> Made:
    """A model's name to its diffusers folder and its engine set, made when first asked for.

    They are for reading only: each is made once, by whichever process comes first.
    """

    def make(name: str) -> tuple[Path, Path]:
        root = shared / f"made-{name}"
        source = SHIPPED if name == SHIPPED.name else root / "model"
        with FileLock(shared / f"made-{name}.lock"):
            if not (root / "engines").exists():
                root.mkdir(exist_ok=True)
                if source != SHIPPED:
                    MODELS[name](source)
                export_bundle(source, root / "bundle")
                frames, size = SIZES[name]
                engines = root / "engines"
                build_engines(root / "bundle", engines, backend="onnxruntime", size=size, frames=frames)
        return source, root / "engines"

    return make


@pytest.fixture(scope="session")
def small_engines(made: Made) -> Path:
    """The engine set of `tests.models.small_model`."""
    return made("small")[1]


@pytest.fixture(scope="session")
def small_pipe(small_engines: Path) -> reelrt.TextToVideo:
    """The same, loaded."""
    return reelrt.load(small_engines)


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `bundle` and `engines` of the tiniest model, each made by its command."""
    folder = tmp_path_factory.mktemp("work")
    tiny_model(folder / "model")
    exported = run_reelrt("export", "model", "-o", "bundle", "--json", folder=folder)
    assert exported.returncode == 0, exported.stderr
    built = run_reelrt(
        "build", "bundle", "-o", "engines", "--backend", "onnxruntime", "--json", folder=folder
    )
    assert built.returncode == 0, built.stderr
    for made in (exported, built):
        assert set(json.loads(made.stdout)["stages"]) == {"text_encoder", "step", "vae_decoder"}
    return folder


@pytest.fixture(scope="session")
def tiny_engines(made: Made) -> Path:
    """The engine set of `tests.models.tiny_model`."""
    return made("tiny")[1]
