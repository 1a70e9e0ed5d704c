"""Bundles and engine sets of small models, made once for all tests that read them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

# torch and diffusers are imported where a model is made: also the process that only hands out the
# tests, and makes none, reads this file.
import reelrt
from reelrt.bundle.manifest import Bundle
from reelrt.engines.builder import build_engines
from reelrt.export.exporter import export_bundle
from tests.commands import reelrt as run_reelrt

SHIPPED = Path(__file__).parents[2] / "models" / "moving-shapes"
SIZES: dict[str, tuple[int | None, tuple[int, int] | None]] = {
    "small": (16, (64, 64)),
    "odd": (12, (56, 40)),
    SHIPPED.name: (16, (64, 64)),
}
"""Model to its largest video, frames and (width, height)."""

FIRST = "test_parity.py"
"""It makes the models that others read, in the time in which another process makes the tiniest."""

Export = Callable[..., Bundle]
Made = Callable[[str], tuple[Path, Path]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests begin first, so that no process is left alone with them."""
    items.sort(key=lambda item: item.path.name != FIRST)


def pytest_collection_finish() -> None:
    """Do not let pytest listen to torch's trace: torch describes every operation once somebody listens."""
    logging.getLogger("torch.__trace").propagate = True


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this test run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def export_few_steps() -> Export:
    """`export_bundle` at step counts up to 25 and at 100: all take a quarter of a small model's export."""

    def export(source: Path, bundle: Path, **options: Any) -> Bundle:
        from tests.models import few_steps

        with pytest.MonkeyPatch.context() as patch:
            few_steps(patch, *range(1, 26), 100)
            return export_bundle(source, bundle, **options)

    return export


@pytest.fixture(scope="session")
def made(shared: Path, export_few_steps: Export) -> Made:
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
                    from tests.models import MODELS

                    MODELS[name](source)
                export_few_steps(source, root / "bundle")
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
def work(shared: Path) -> Path:
    """A folder with `model`, `bundle` and `engines` of the tiniest model, each made by its command.

    It is for reading only, as all that is shared.
    """
    folder = shared / "work"
    with FileLock(shared / "work.lock"):
        if not (folder / "engines").exists():
            from tests.models import tiny_model

            folder.mkdir(exist_ok=True)
            tiny_model(folder / "model")
            build = ("build", "bundle", "-o", "engines", "--backend", "onnxruntime", "--json")
            for words in (("export", "model", "-o", "bundle", "--json"), build):
                made = run_reelrt(*words, folder=folder)
                assert made.returncode == 0, made.stderr
                assert set(json.loads(made.stdout)["stages"]) == {"text_encoder", "step", "vae_decoder"}
    return folder


@pytest.fixture(scope="session")
def tiny_engines(work: Path) -> Path:
    """The engine set of `tests.models.tiny_model`."""
    return work / "engines"
