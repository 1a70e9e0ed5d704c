"""Engines for this CPU: they run, they are kept while nothing changes, and a failed build leaves no trace."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from reelrt.bundle.files import hash_folder
from reelrt.bundle.manifest import Bundle, EngineSet
from reelrt.engines import backends, profiles
from reelrt.engines.builder import build_engines
from reelrt.engines.recipe import Job, changes
from reelrt.engines.worker import Worker
from reelrt.errors import BackendError, InputError, IntegrityError, RangeError
from tests.commands import started
from tests.graphs import GEOMETRY, run_step, tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture(scope="module")
def built(bundle, tmp_path_factory):
    return build_engines(bundle, tmp_path_factory.mktemp("engines") / "engines").folder


@pytest.fixture
def engines(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "engines"))


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.iterdir()}


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.parent.iterdir() if path.name.startswith(".")]


def feed(batch=2, rows=3, frames=3, height=4, width=2):
    rng = np.random.default_rng(0)
    return {
        "state": rng.standard_normal((batch, 3, 4, frames, height, width), np.float32),
        "table": np.concatenate(
            [
                np.full((batch, rows, 1), 0.7, np.float32),
                np.full((batch, rows, 1), 0.9, np.float32),
                np.ones((batch, rows, 1), np.float32),
                rng.standard_normal((batch, rows, 12), np.float32),
            ],
            axis=2,
        ),
        "step": np.array([0, 2][:batch], np.int64),
        "text": rng.standard_normal((batch, 2, 8, 32), np.float32),
    }


def run(path: Path, inputs):
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def test_the_set_runs_and_agrees_with_the_bundle(bundle, built):
    wanted, found = run(bundle / "step.onnx", feed()), run_step(built, feed())
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[1], wanted[1])


def test_the_manifest_says_what_was_built(bundle, built):
    engines = EngineSet.load(built)
    assert (engines.backend, engines.backend_version, engines.target) == (
        "onnxruntime",
        ort.__version__,
        "host",
    )
    assert engines.bundle == Bundle.load(bundle).sha256
    assert {"LICENSE", "tokenizer.json", "schedules.safetensors"} <= set(engines.files)
    for engine in engines.engines.values():
        assert engine.precision == "fp32"
        assert engine.weight_bytes > 500
        assert engine.key_fields["backend_version"] == ort.__version__
    step = engines.engines["step"].profile
    assert (step["width"].max, step["height"].max, step["frames"].max) == (6, 4, 4)
    assert step["rows"].max == 200
    assert step["batch"].max == 4


def test_what_building_needs_is_named_when_it_is_missing(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "installed", lambda module: module != "onnx_ir")
    with pytest.raises(BackendError, match="building engines needs onnx-ir, not installed here") as caught:
        build_engines(bundle, tmp_path / "engines", backend="onnxruntime")
    assert "pip install onnx-ir" in caught.value.remedy
    assert not (tmp_path / "engines").exists()


def test_nothing_is_built_or_written_when_nothing_changed(bundle, engines):
    before = stamps(engines)
    told = []
    build_engines(bundle, engines, progress=lambda *event: told.append(event))
    assert stamps(engines) == before
    assert told == []


def test_the_check_needs_no_heavy_import(bundle, engines):
    code = (
        "import sys; from pathlib import Path; from reelrt.engines.builder import build_engines;"
        f"build_engines(Path({str(bundle)!r}), Path({str(engines)!r}));"
        "heavy = ('onnx', 'onnxruntime', 'torch', 'polygraphy', 'tensorrt_rtx');"
        "print([m for m in heavy if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_changed_field_rebuilds_what_depends_on_it_and_is_named(bundle, engines, caplog):
    before = stamps(engines)
    with caplog.at_level(logging.INFO, "reelrt"):
        build_engines(bundle, engines, frames=3)
    assert "step is rebuilt: profile: " in caplog.text
    assert "text_encoder" not in caplog.text
    after = stamps(engines)
    assert after["text_encoder.onnx"] == before["text_encoder.onnx"]
    assert after["step.onnx"] != before["step.onnx"]
    EngineSet.load(engines)


def test_other_weights_rebuild(tmp_path, engines, caplog):
    with caplog.at_level(logging.INFO, "reelrt"):
        build_engines(tiny_bundle(tmp_path / "other", seed=1), engines)
    assert "text_encoder is rebuilt: weights: " in caplog.text  # all its weights are beside the graph
    assert "step is rebuilt: graph: " in caplog.text  # a small one is inside


def test_a_damaged_engine_is_rebuilt_and_the_others_kept(bundle, engines, caplog):
    good = hash_folder(engines)
    before = stamps(engines)
    (engines / "step.onnx.data").write_bytes(b"noise")
    build_engines(bundle, engines)
    assert "step is rebuilt: " in caplog.text
    assert hash_folder(engines)["step.onnx.data"] == good["step.onnx.data"]
    assert stamps(engines)["vae_decoder.onnx"] == before["vae_decoder.onnx"]
    EngineSet.load(engines)


def test_a_damaged_tokenizer_is_put_back_without_a_build(bundle, engines):
    (engines / "tokenizer.json").write_text("[]")
    told = []
    build_engines(bundle, engines, progress=lambda *event: told.append(event))
    assert (engines / "tokenizer.json").read_text() == "{}"
    assert told == []


@pytest.mark.parametrize(
    "manifest", ["", "[]", '{"kind": "engines", "schema": 1}', '{"kind": "bundle", "schema": 1}']
)
def test_a_broken_manifest_means_a_new_build(bundle, engines, manifest):
    (engines / "manifest.json").write_text(manifest)
    build_engines(bundle, engines)
    EngineSet.load(engines)


def test_a_damaged_bundle_is_refused(bundle, tmp_path):
    damaged = shutil.copytree(bundle, tmp_path / "bundle")
    (damaged / "step.onnx.data").write_bytes(b"noise")
    with pytest.raises(IntegrityError, match=r"step\.onnx\.data is damaged"):
        build_engines(damaged, tmp_path / "engines")
    assert not (tmp_path / "engines").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"size": (40, 32)},
            r"width 40 is not available: .*pixels from 16 to 32768.* 32 or 48",
        ),
        ({"size": (32, 0)}, r"height 0 is not available"),
        ({"frames": 1}, r"frames 1 is not available: this model takes 2 to 1024"),
        ({"batch": 0}, r"batch 0 is not available: engines take 1 to 64"),
    ],
)
def test_impossible_sizes_name_the_possible_ones(bundle, tmp_path, options, message):
    with pytest.raises(RangeError, match=message):
        build_engines(bundle, tmp_path / "engines", **options)
    assert not (tmp_path / "engines").exists()


def test_fp32_cannot_be_made_of_fp16(bundle, tmp_path):
    half = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    data = json.loads((half / "manifest.json").read_text())
    for stage in data["stages"].values():
        stage["precision"] = "fp16"
    (half / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(
        InputError, match="holds fp16 weights, and fp32 cannot be made of them.*--precision fp32"
    ):
        build_engines(half, tmp_path / "engines", precision="fp32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "onnxruntime"}, "ONNX Runtime on a CPU streams no weights"),
        ({"backend": "tensorrt", "target": "orin-nano"}, "on orin-nano CPU and GPU share one memory"),
    ],
)
def test_streaming_weights_is_refused_where_it_gains_nothing(bundle, tmp_path, monkeypatch, options, message):
    from reelrt.jetson.targets import find

    def choose(backend, target, device):
        return backends.BACKENDS[backend], find(target) if target != "host" else backends.host_cpu(device)

    monkeypatch.setattr("reelrt.engines.backends.choose", choose)
    with pytest.raises(InputError, match=message):
        build_engines(bundle, tmp_path / "engines", weight_streaming=True, **options)
    assert not (tmp_path / "engines").exists()


def test_an_unknown_precision_is_refused(bundle, tmp_path):
    with pytest.raises(InputError, match="'int4' is not known.*fp32, fp16"):
        build_engines(bundle, tmp_path / "engines", precision="int4")


def test_a_folder_that_is_not_ours_is_left_alone(bundle, tmp_path):
    (tmp_path / "photo.jpg").write_text("mine")
    with pytest.raises(InputError, match="exists and is not an engine set to replace"):
        build_engines(bundle, tmp_path)
    assert (tmp_path / "photo.jpg").read_text() == "mine"


def test_tensorrt_that_is_not_installed_says_what_to_install(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("reelrt.engines.backends.installed", lambda module: False)
    with pytest.raises(BackendError, match=r"TensorRT-RTX is not installed.*pip install 'reelrt\[rtx\]'"):
        build_engines(bundle, tmp_path / "engines", backend="tensorrt_rtx", target="rtx3060")


def test_a_graph_the_backend_refuses_leaves_the_old_set(bundle, engines, tmp_path):
    broken = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    (broken / "step.onnx").write_bytes(b"no graph")
    Bundle(broken, *_parts(bundle)).save("0.1.0")
    before = stamps(engines)
    with pytest.raises(BackendError, match=r"ONNX Runtime cannot optimise step\.onnx"):
        build_engines(broken, engines)
    assert stamps(engines) == before
    assert leftovers(engines) == []


def _parts(folder):
    loaded = Bundle.load(folder)
    return loaded.pipeline, loaded.stages


def job(bundle, output, backend="onnxruntime"):
    loaded = Bundle.load(bundle)
    stage = loaded.stages["step"]
    ranges = profiles.profiles(GEOMETRY, GEOMETRY.width, GEOMETRY.height, GEOMETRY.frames, 1)
    capability = "8.6" if backend == "tensorrt_rtx" else ""
    graph = loaded.folder / stage.file
    return Job(backend, stage.spec, graph, "fp32", output, "fp32", ranges["step"], capability)


def test_a_job_survives_the_journey_to_the_worker(bundle, tmp_path):
    sent = job(bundle, tmp_path / "step.onnx")
    assert Job.from_json(json.loads(json.dumps(sent.to_json()))) == sent


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("file", ["step.onnx", "step.onnx.data"])
def test_a_full_disk_is_named_as_such(bundle, tmp_path, file):
    (tmp_path / file).symlink_to("/dev/full")
    with Worker() as worker, pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
        worker.build(job(bundle, tmp_path / "step.onnx"))
    assert caught.value.errno == errno.ENOSPC


def test_one_process_builds_all_that_onnx_runtime_builds(bundle, tmp_path, monkeypatch):
    processes = started(monkeypatch)
    built = build_engines(bundle, tmp_path / "engines", backend="onnxruntime")
    assert len(built.engines) == 3
    assert [process.poll() for process in processes] == [0]


def test_a_crashed_builder_is_an_error_and_not_a_hang(bundle, tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'Segmentation fault' >&2\nkill -9 $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with (
        Worker() as worker,
        pytest.raises(BackendError, match="was killed, most likely for want of memory"),
    ):
        worker.build(job(bundle, tmp_path / "step.onnx"))


@pytest.mark.parametrize("last", ["", '{"built": {"weight_'])
def test_a_builder_that_crashes_after_an_engine_is_an_error(bundle, tmp_path, monkeypatch, last):
    script = tmp_path / "python"
    done = '{"built": {"weight_bytes": 5}}'
    script.write_text(f"#!/bin/sh\nread job\necho '{done}'\nread job\nprintf '%s' '{last}'\nkill -9 $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with Worker() as worker:
        assert worker.build(job(bundle, tmp_path / "step.onnx")).weight_bytes == 5
        with pytest.raises(BackendError, match="builder of step was killed"):
            worker.build(job(bundle, tmp_path / "step.onnx"))


def test_ctrl_c_leaves_the_old_set_and_no_process(bundle, engines):
    before = stamps(engines)
    code = (
        "import sys, signal; from pathlib import Path; from reelrt.engines.builder import build_engines\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"build_engines(Path({str(bundle)!r}), Path({str(engines)!r}), frames=3,"
        " progress=lambda *event: print(*event, flush=True))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline().startswith("build step 0")
    child.send_signal(signal.SIGINT)
    assert child.wait(60) != 0
    assert "1 1" not in child.stdout.read()
    assert stamps(engines) == before
    assert leftovers(engines) == []


def test_changes_are_readable():
    old = {"graph": "a" * 64, "precision": "fp32", "cuda": ""}
    new = {"graph": "b" * 64, "precision": "fp32", "cuda": "13"}
    assert changes(old, new) == ["graph: aaaaaaaaaaaa... -> bbbbbbbbbbbb...", "cuda: (none) -> 13"]


@pytest.mark.parametrize(("memory", "batch"), [(0, 1), (6, 1), (8, 2), (12, 2), (16, 4), (64, 4)])
def test_the_default_batch_follows_the_gpu_memory(memory, batch):
    assert profiles.default_batch(memory) == batch
