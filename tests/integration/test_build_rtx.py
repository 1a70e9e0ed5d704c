"""TensorRT-RTX really builds an exported model for an RTX 3060, on any machine with an x86-64 CPU."""

from __future__ import annotations

import importlib.metadata
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from reelrt.bundle.manifest import Bundle, EngineSet
from reelrt.engines.backends import installed
from reelrt.engines.builder import build_engines
from reelrt.engines.memory import Planner, Video, plan_of_engines
from reelrt.jetson.targets import find
from tests.commands import started
from tests.graphs import tiny_bundle

pytestmark = [
    pytest.mark.skipif(not installed("tensorrt_rtx"), reason="tensorrt_rtx is not installed"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def bundles(work: Path, small_engines: Path) -> dict[str, Path]:
    """Precision to what is built in it: the larger model in FP16, which is what a GPU gets."""
    return {"fp32": work / "bundle", "fp16": small_engines.parent / "bundle"}


@pytest.fixture(scope="module")
def sets(
    bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[EngineSet, list[str]]]:
    """Precision to engine set and what the builder warned of."""
    root, found = tmp_path_factory.mktemp("rtx"), {}
    for precision, bundle in bundles.items():
        warned: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record, kept=warned: kept.append(record.getMessage())  # type: ignore[method-assign,misc]
        logger = logging.getLogger("reelrt")
        logger.addHandler(handler)
        try:
            engines = build_engines(bundle, root / precision, target="rtx3060", precision=precision)
        finally:
            logger.removeHandler(handler)
        found[precision] = engines, warned
    return found


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_all_three_stages_are_built_without_a_gpu(sets, precision):
    engines, _ = sets[precision]
    assert (engines.backend, engines.target, engines.compute_capability) == ("tensorrt_rtx", "rtx3060", "8.6")
    assert engines.backend_version == importlib.metadata.version("tensorrt_rtx")
    assert set(engines.engines) == {"text_encoder", "step", "vae_decoder"}
    for engine in engines.engines.values():
        assert engine.precision == precision
        assert (engines.folder / engine.file).stat().st_size > engine.weight_bytes > 10_000
        assert engine.activation_bytes > 100_000


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_builder_warns_of_nothing(sets, precision):
    assert sets[precision][1] == []


def test_fp16_halves_the_weights(bundles, sets):
    stages = Bundle.load(bundles["fp16"]).stages
    for name, engine in sets["fp16"][0].engines.items():
        assert engine.weight_bytes < 0.6 * stages[name].weight_bytes


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_plan_is_within_15_percent_of_the_builder(bundles, sets, precision):
    engines, _ = sets[precision]
    planner = Planner(Bundle.load(bundles[precision]), find("rtx3060"))
    for name, engine in engines.engines.items():
        cost = planner.cost(name, precision, {axis: each.max for axis, each in engine.profile.items()})
        assert cost.activation_bytes == pytest.approx(engine.activation_bytes, rel=0.15), name
        assert cost.weight_bytes == pytest.approx(engine.weight_bytes, rel=0.05, abs=1 << 14), name


def test_the_builders_numbers_replace_the_estimate(bundles, sets):
    engines, _ = sets["fp16"]
    source, found = Bundle.load(bundles["fp16"]), engines.engines["step"].profile
    scale = source.pipeline.geometry.spatial_scale
    width, height = found["width"].max * scale, found["height"].max * scale
    video = Video(width, height, found["frames"].max, 1, "fp16", "split")
    need = Planner(source, find("rtx3060"), engines).plan(video).stages
    alone = plan_of_engines(engines, find("rtx3060"))
    for name, engine in engines.engines.items():
        assert (need[name].source, alone.stages[name].source) == ("builder", "builder")
        assert need[name].activation_bytes == alone.stages[name].activation_bytes == engine.activation_bytes
    smaller = Planner(source, find("rtx3060"), engines).plan(replace(video, frames=video.frames - 1))
    assert smaller.stages["step"].source == "estimate"


def test_fp16_is_what_a_gpu_gets_and_nothing_is_built_twice(bundles, sets):
    folder = sets["fp16"][0].folder
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    told: list[tuple] = []
    build_engines(bundles["fp16"], folder, target="rtx3060", progress=lambda *event: told.append(event))
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert told == []


def test_another_gpu_rebuilds_and_the_progress_is_told_in_percent(tmp_path, caplog, monkeypatch):
    tiny, folder = tiny_bundle(tmp_path / "bundle"), tmp_path / "engines"
    with monkeypatch.context() as patch:
        processes = started(patch)
        build_engines(tiny, folder, target="rtx3060", batch=1)
    assert len(processes) == 3, "a builder's gigabytes go with its process"
    told: list[tuple[str, int, int]] = []
    with caplog.at_level(logging.INFO, "reelrt"):
        engines = build_engines(tiny, folder, target="rtx4060", batch=1, progress=lambda *e: told.append(e))
    assert "step is rebuilt: compute_capability: 8.6 -> 8.9" in caplog.text
    assert engines.compute_capability == "8.9"
    percents = [done for what, done, total in told if what == "build step" and total == 100]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert len(percents) > 5


def test_ctrl_c_ends_the_builder_and_leaves_nothing(tmp_path):
    tiny, folder = tiny_bundle(tmp_path / "bundle"), tmp_path / "engines"

    def interrupt(what: str, done: int, total: int) -> None:
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(tiny, folder, target="rtx3060", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_engine_whose_weights_can_be_streamed(tmp_path, caplog):
    """TensorRT-RTX takes the flag for the step; the manifest says so, and nothing else is built again."""
    tiny, folder = tiny_bundle(tmp_path / "bundle"), tmp_path / "engines"
    plain = build_engines(tiny, folder, target="rtx3060", batch=1)
    assert not any(engine.weight_streaming for engine in plain.engines.values())
    with caplog.at_level(logging.INFO, "reelrt"):
        engines = build_engines(tiny, folder, target="rtx3060", batch=1, weight_streaming=True)
    assert [name for name, engine in engines.engines.items() if engine.weight_streaming] == ["step"]
    rebuilt = [record.getMessage() for record in caplog.records if "is rebuilt" in record.getMessage()]
    assert rebuilt == ["step is rebuilt: flags: strongly typed -> strongly typed, weight streaming"]
    assert engines.files["step.engine"] != plain.files["step.engine"]
    assert (
        build_engines(tiny, folder, target="rtx3060", batch=1, weight_streaming=True).files == engines.files
    )
