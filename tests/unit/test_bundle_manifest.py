"""Manifests say everything about a folder, and a folder that is another is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reelrt.bundle.manifest import (
    MANIFEST,
    SCHEDULES,
    STAGES,
    Bundle,
    Engine,
    EngineSet,
    Model,
    Pipeline,
    Stage,
    kind_of,
)
from reelrt.bundle.schedule import Schedule, Schedules
from reelrt.bundle.spec import Geometry, Range, step_spec, text_encoder_spec, vae_decoder_spec
from reelrt.errors import IntegrityError

GEOMETRY = Geometry(4, 8, 8, 77, 1024, 6, 16, 384, 384)
SPECS = (text_encoder_spec, step_spec, vae_decoder_spec)
PIPELINE = Pipeline(
    Model("moving-shapes", "unet3d", "ab" * 32, "Apache-2.0", 123),
    GEOMETRY,
    cfg="split",
    solver="ddim",
    guidance=7.5,
    start_token=0,
    end_token=1,
    pad_token=1,
)


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name in STAGES:
        (folder / f"{name}.onnx").write_bytes(b"graph")
    ones = np.ones((1, 1))
    Schedules([Schedule("ddim", ones[0], ones[0], ones, ones, 1.0)]).save(folder / SCHEDULES)
    stages = {
        "text_encoder": Stage(text_encoder_spec(GEOMETRY), "text_encoder.onnx", "fp16", 7),
        "step": Stage(step_spec(GEOMETRY), "step.onnx", "fp32", 8),
        "vae_decoder": Stage(vae_decoder_spec(GEOMETRY), "vae_decoder.onnx", "fp32", 9),
    }
    Bundle(folder, PIPELINE, stages).save("0.1.0")
    return folder


@pytest.fixture
def engines(tmp_path):
    folder = tmp_path / "engines"
    folder.mkdir()
    for name in STAGES:
        (folder / f"{name}.engine").write_bytes(b"engine")
    specs = {spec.name: spec for spec in (each(GEOMETRY) for each in SPECS)}
    profile = {axis: Range(1, 1, 4) for axis in ("batch", "rows", "height", "width")}
    engine = Engine(
        spec=specs["step"],
        file="step.engine",
        precision="fp16",
        profile={**profile, "frames": Range(8, 16, 16)},
        key="cd" * 32,
        key_fields={"backend": "onnxruntime", "version": "1"},
        weight_bytes=8,
        activation_bytes=9,
        build_seconds=1.5,
    )
    each = {name: replace(engine, spec=specs[name], file=f"{name}.engine") for name in STAGES}
    saved = EngineSet(folder, "ef" * 32, PIPELINE, "tensorrt_rtx", "1.7.1", "rtx3060", "8.6", each)
    saved.save("0.1.0")
    return saved


def test_bundle_there_and_back(bundle):
    loaded = Bundle.load(bundle)
    assert loaded.pipeline == PIPELINE
    assert loaded.stages["step"] == Stage(step_spec(GEOMETRY), "step.onnx", "fp32", 8)
    assert set(loaded.stages) == set(STAGES)
    assert set(loaded.files) == {*(f"{name}.onnx" for name in STAGES), SCHEDULES}
    assert loaded.version == "0.1.0"
    assert loaded.schedules.solvers == ("ddim",)


def test_engine_set_there_and_back(engines):
    loaded = EngineSet.load(engines.folder)
    for field in ("bundle", "pipeline", "backend", "backend_version", "target", "compute_capability"):
        assert getattr(loaded, field) == getattr(engines, field), field
    assert loaded.engines == engines.engines
    assert set(loaded.files) == {f"{name}.engine" for name in STAGES}


def test_layers_that_stay_fp32_and_what_layers_run_in_are_kept(bundle, engines):
    loaded = Bundle.load(bundle)
    step = replace(loaded.stages["step"], keep_fp32=("node_1", "node_2"))
    Bundle(bundle, PIPELINE, {**loaded.stages, "step": step}).save("0.1.0")
    assert Bundle.load(bundle).stages == {**loaded.stages, "step": step}
    layers = {"linear": {"fp16": {"count": 2, "weight_bytes": 64}}}
    engine = replace(engines.engines["step"], layers=layers, inspected={"Gemm": {"fp16": 2}})
    replace(engines, engines={**engines.engines, "step": engine}).save("0.1.0")
    assert EngineSet.load(engines.folder).engines == {**engines.engines, "step": engine}


def test_manifests_of_before_there_was_an_audit_still_load(bundle, engines):
    assert "keep_fp32" not in (bundle / MANIFEST).read_text()
    assert Bundle.load(bundle).stages["step"].keep_fp32 == ()
    path = engines.folder / MANIFEST
    data = json.loads(path.read_text())
    for name in ("layers", "inspected"):
        del data["engines"]["step"][name]
    path.write_text(json.dumps(data))
    assert EngineSet.load(engines.folder).engines["step"].layers == {}


def test_bundle_hash_follows_its_files(bundle):
    before = Bundle.load(bundle).sha256
    (bundle / "step.onnx").write_bytes(b"another")
    loaded = Bundle.load(bundle, check=False)
    assert loaded.sha256 == before
    loaded.save("0.1.0")
    assert Bundle.load(bundle).sha256 != before


def test_damage_is_found_unless_checking_is_off(bundle):
    (bundle / "step.onnx").write_bytes(b"graPh")
    with pytest.raises(IntegrityError, match=r"step\.onnx is damaged"):
        Bundle.load(bundle)
    assert Bundle.load(bundle, check=False).pipeline == PIPELINE


def test_a_folder_without_manifest_says_what_makes_one(tmp_path):
    with pytest.raises(IntegrityError, match="reelrt export"):
        Bundle.load(tmp_path)
    with pytest.raises(IntegrityError, match="reelrt build"):
        EngineSet.load(tmp_path / "missing")


def test_bundle_and_engine_set_are_not_mixed_up(bundle, engines):
    with pytest.raises(IntegrityError, match="'bundle', where 'engines' is needed"):
        EngineSet.load(bundle)
    with pytest.raises(IntegrityError, match="'engines', where 'bundle' is needed"):
        Bundle.load(engines.folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"kind": "bundle"}', "null"])
def test_a_broken_manifest_is_refused(bundle, text):
    (bundle / MANIFEST).write_text(text)
    with pytest.raises(IntegrityError, match=r"manifest\.json cannot be read"):
        Bundle.load(bundle)


def test_another_schema_is_refused(bundle):
    data = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps({**data, "schema": 99}))
    with pytest.raises(IntegrityError, match="has schema 99; this version of reelrt reads 1"):
        Bundle.load(bundle)


@pytest.mark.parametrize("name", ["pipeline", "stages", "files"])
@pytest.mark.parametrize("value", [None, 3, [1]])
def test_a_manifest_that_lacks_an_entry_is_refused(bundle, name, value):
    data = json.loads((bundle / MANIFEST).read_text())
    del data[name]
    (bundle / MANIFEST).write_text(json.dumps(data if value is None else {**data, name: value}))
    with pytest.raises(IntegrityError, match=r"manifest\.json is incomplete or damaged"):
        Bundle.load(bundle)


def test_an_engine_set_whose_manifest_lacks_an_entry_is_refused(engines):
    data = json.loads((engines.folder / MANIFEST).read_text())
    del data["engines"]["step"]["profile"]
    (engines.folder / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(IntegrityError, match=r"incomplete or damaged \(KeyError: 'profile'\)"):
        EngineSet.load(engines.folder)


@pytest.mark.parametrize("name", ["../step.onnx", "/etc/passwd", "sub/../../step.onnx", "..\\step.onnx"])
def test_a_file_elsewhere_is_refused(bundle, name):
    data = json.loads((bundle / MANIFEST).read_text())
    data["files"][name] = "00"
    (bundle / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(IntegrityError, match="is not a file in this folder"):
        Bundle.load(bundle)


@pytest.mark.parametrize("name", ["step.onnx", SCHEDULES])
def test_a_file_that_is_used_and_has_no_hash_is_refused(bundle, name):
    data = json.loads((bundle / MANIFEST).read_text())
    del data["files"][name]
    (bundle / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(IntegrityError, match=f"'{name}' has no hash"):
        Bundle.load(bundle)


def test_weights_that_were_put_beside_a_graph_are_refused(bundle):
    (bundle / "step.onnx.data").write_bytes(b"other weights")
    with pytest.raises(IntegrityError, match=r"'step\.onnx\.data' has no hash"):
        Bundle.load(bundle)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["engines"].pop("step"),
        lambda data: data["engines"]["step"]["profile"].pop("frames"),
        lambda data: data["engines"]["step"]["profile"]["frames"].update(min="8"),
        lambda data: data["engines"]["vae_decoder"]["profile"]["frames"].update(opt=0),
        lambda data: data["engines"]["step"].update(file="../step.engine"),
        lambda data: data["pipeline"]["geometry"].update(spatial_scale=0),
        lambda data: data["pipeline"]["geometry"].update(tokens="a"),
        lambda data: data["pipeline"].update(guidance=None),
        lambda data: data["pipeline"].update(cfg="both"),
    ],
)
def test_values_that_cannot_be_are_refused(engines, change):
    data = json.loads((engines.folder / MANIFEST).read_text())
    change(data)
    (engines.folder / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(IntegrityError, match="incomplete or damaged"):
        EngineSet.load(engines.folder)


def test_a_manifest_that_nothing_can_read_has_no_kind(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    assert kind_of(tmp_path) == ""
    with pytest.raises(IntegrityError, match="cannot be read"):
        Bundle.load(tmp_path)
