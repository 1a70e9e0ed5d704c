"""`inspect` and `doctor` tell what is there, whole or not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from reelrt.engines.builder import build_engines
from reelrt.engines.doctor import examine
from reelrt.engines.inspection import describe
from reelrt.errors import IntegrityError
from tests.graphs import tiny_bundle


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("inspection")
    bundle = tiny_bundle(root / "bundle")
    return bundle, build_engines(bundle, root / "engines").folder


def test_a_bundle_is_described(folders):
    found = describe(folders[0])
    assert json.loads(json.dumps(found)) == found
    assert (found["kind"], found["intact"], found["cfg"]) == ("bundle", True, "split")
    assert found["model"]["licence"] == "Apache-2.0"
    assert found["schedules"] == {"ddim": {"min": 2, "max": 2, "counts": 1}}
    assert found["stages"]["step"]["inputs"]["text"] == "float32[batch, 2, 8, 32]"
    on_disk = sum(path.stat().st_size for path in folders[0].iterdir() if path.name != "manifest.json")
    assert found["total_bytes"] == on_disk


def test_an_engine_set_is_described(folders):
    found = describe(folders[1])
    assert json.loads(json.dumps(found)) == found
    assert (found["kind"], found["backend"], found["intact"]) == ("engines", "onnxruntime", True)
    assert found["bundle"] == describe(folders[0])["sha256"]
    assert found["largest"] == {"width": 48, "height": 32, "frames": 4, "batch": 4}
    step = found["stages"]["step"]
    assert step["profile"]["frames"] == {"min": 2, "opt": 4, "max": 4}
    assert len(step["key"]) == 64
    assert step["key_fields"]["backend"] == "onnxruntime"


def test_damage_is_told_and_does_not_stop_it(tmp_path):
    bundle = tiny_bundle(tmp_path / "bundle")
    (bundle / "step.onnx.data").write_bytes(b"noise")
    (bundle / "schedules.safetensors").unlink()
    found = describe(bundle)
    assert not found["intact"]
    assert [name in " ".join(found["damage"]) for name in ("step.onnx.data", "schedules")] == [True, True]
    assert found["schedules"] == {}


@pytest.mark.parametrize("manifest", [None, "no json", '{"kind": "photos", "schema": 1}'])
def test_what_is_neither_is_refused(tmp_path, manifest):
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(IntegrityError):
        describe(tmp_path)


def test_the_doctor_finds_what_runs_this_test(tmp_path):
    checks = {check.name: check for check in examine(tmp_path / "not" / "there")}
    assert checks["Python"].status == "ok"
    assert "CPUExecutionProvider" in checks["onnxruntime"].detail
    assert "onnxruntime engines" in checks["Can build"].detail
    assert checks["PyAV"].status == "ok"
    assert "GiB free" in checks["Disk"].detail
    assert all(check.remedy for check in checks.values() if check.status != "ok")


def test_the_doctor_says_what_is_missing(monkeypatch):
    there = ("onnxruntime", "onnx", "onnx_ir")
    monkeypatch.setattr("reelrt.engines.doctor.installed", lambda module: module in there)
    checks = {check.name: check for check in examine()}
    assert checks["Can export"].status == "missing"
    assert "reelrt[export]" in checks["Can export"].remedy
    assert checks["tensorrt_rtx"].remedy == "Install it: pip install 'reelrt[rtx]'."
    assert checks["Can build"].detail == "onnxruntime engines for this CPU"
    assert checks["PyAV"].status == "missing"
    monkeypatch.setattr("reelrt.engines.doctor.installed", lambda module: module == "onnxruntime")
    (build,) = (check for check in examine() if check.name == "Can build")
    assert (build.status, build.remedy) == ("missing", "Install it: pip install onnxruntime onnx onnx-ir.")


def test_the_doctor_imports_nothing_heavy():
    code = (
        "import sys; from reelrt.engines.doctor import examine; examine();"
        "print([m for m in ('torch', 'diffusers', 'onnx', 'polygraphy', 'tensorrt_rtx') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
