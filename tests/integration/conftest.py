"""Engine sets of small random models, made once for all tests that run them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import reelrt
from reelrt.engines.builder import build_engines
from reelrt.export.exporter import export_bundle
from tests.commands import reelrt as run_reelrt
from tests.models import MODELS, tiny_model

SHIPPED = Path(__file__).parents[2] / "models" / "moving-shapes"
SIZES = {"small": (16, 64, 64), "odd": (12, 56, 40), SHIPPED.name: (16, 64, 64)}
"""Model to its largest video: frames, width, height."""

Made = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model's name to its diffusers folder and its engine set, made when first asked for."""
    folders: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in folders:
            root = tmp_path_factory.mktemp(name)
            source = SHIPPED if name == SHIPPED.name else MODELS[name](root / "model")
            if not (source / "model_index.json").exists():
                pytest.skip(f"{source} holds no model yet")
            export_bundle(source, root / "bundle")
            frames, width, height = SIZES[name]
            size = (width, height)
            build_engines(root / "bundle", root / "engines", backend="onnxruntime", size=size, frames=frames)
            folders[name] = source, root / "engines"
        return folders[name]

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
def tiny_engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine set of `tests.models.tiny_model`, made in this process."""
    root = tmp_path_factory.mktemp("tiny")
    tiny_model(root / "model")
    export_bundle(root / "model", root / "bundle")
    return build_engines(root / "bundle", root / "engines", backend="onnxruntime").folder
