"""FP16 that overflows: the audit finds the layers, and with them in FP32 the engine is right again.

The model is a small random one. One feed-forward's values (not its gate) are scaled up, so far that
FP16 overflows behind it, and the second projection down by as much: FP32 computes the same as before.
FP16 graphs are run by ONNX's own reference, in real FP16 arithmetic: ONNX Runtime runs them in FP32 on
a CPU and does not even round.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from reelrt.bundle.manifest import Bundle
from reelrt.calibration.audit import Feed, audit_stage
from reelrt.calibration.bundles import calibrate_int8
from reelrt.calibration.fp16 import REPORT, calibrate_fp16
from reelrt.calibration.quality import evaluate_quality
from reelrt.calibration.recording import record
from reelrt.calibration.trajectories import Trajectories
from reelrt.engines.backends import installed
from reelrt.engines.builder import build_engines
from reelrt.engines.precision import convert
from reelrt.errors import BackendError, CalibrationError, InputError
from tests.commands import reelrt as run_reelrt

pytestmark = pytest.mark.timeout(900)
PROMPTS = ("a red circle moving right on a black background", "a blue square")
FEED_FORWARD = "network.middle.0.spatial.blocks.0.ff"
TIMES = np.float32(2**17)
FRAMES = 2

Change = Callable[[str, np.ndarray], np.ndarray]


def changed(source: Path, target: Path, change: Change) -> Bundle:
    """A bundle whose step's weights are others."""
    shutil.copytree(source, target)
    model = onnx.load(str(target / "step.onnx"))
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(change(tensor.name, values), tensor.name))
    (target / "step.onnx.data").unlink()
    onnx.save(model, str(target / "step.onnx"), save_as_external_data=True, location="step.onnx.data")
    Bundle(target, *parts(Bundle.load(target, check=False))).save("0.1.0")
    return Bundle.load(target)


def parts(bundle: Bundle):
    return bundle.pipeline, bundle.stages


def scaled(name: str, values: np.ndarray) -> np.ndarray:
    if name in (f"{FEED_FORWARD}.value", f"{FEED_FORWARD}.value_bias"):
        values = values * TIMES
    return values / TIMES if name == f"{FEED_FORWARD}.out.weight" else values


def run(path: Path, inputs) -> np.ndarray:
    """The first output of an FP32 graph."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, dict(inputs))[0])


def run_half(graph: ReferenceEvaluator, inputs) -> np.ndarray:
    """The first output of the step in FP16 arithmetic."""
    with np.errstate(all="ignore"):
        outputs = graph.run(None, {**inputs, "text": inputs["text"].astype(np.float16)})
    assert isinstance(outputs, list)
    return np.asarray(outputs[0])


def few_frames(trajectories: Trajectories) -> list[dict[str, np.ndarray]]:
    """Recorded inputs with the first frames only; the reference takes its time."""
    return [{**s.inputs, "state": s.inputs["state"][:, :, :, :FRAMES]} for s in trajectories][::3]


@pytest.fixture(scope="module")
def sick(work: Path, tmp_path_factory) -> Bundle:
    return changed(work / "bundle", tmp_path_factory.mktemp("fp16") / "bundle", scaled)


@pytest.fixture(scope="module")
def trajectories(sick: Bundle, tmp_path_factory) -> Trajectories:
    folder = tmp_path_factory.mktemp("trajectories")
    return record(sick.folder, PROMPTS, folder / "work", steps=4, samples_per_prompt=2, frames=4)


@pytest.fixture(scope="module")
def audited(sick: Bundle, trajectories: Trajectories, tmp_path_factory) -> Bundle:
    return calibrate_fp16(sick, trajectories, tmp_path_factory.mktemp("audited") / "bundle")


def test_fp32_does_not_notice(sick, trajectories, work):
    for sample in trajectories:
        want = run(work / "bundle" / "step.onnx", sample.inputs)
        have = run(sick.folder / "step.onnx", sample.inputs)
        assert np.abs(have - want).max() < 1e-3 * np.abs(want).max()


@pytest.fixture(scope="module")
def plain(sick: Bundle, tmp_path_factory) -> ReferenceEvaluator:
    """The step in FP16 without a layer in FP32."""
    target = tmp_path_factory.mktemp("plain") / "step.onnx"
    return ReferenceEvaluator(
        onnx.load(str(convert(sick.folder / "step.onnx", target, sick.stages["step"].spec)))
    )


@pytest.fixture(scope="module")
def mixed(audited: Bundle, tmp_path_factory) -> ReferenceEvaluator:
    """The step in FP16 with the listed layers in FP32."""
    target, stage = tmp_path_factory.mktemp("mixed") / "step.onnx", audited.stages["step"]
    return ReferenceEvaluator(
        onnx.load(str(convert(audited.folder / "step.onnx", target, stage.spec, keep=stage.keep_fp32)))
    )


def test_plain_fp16_overflows(plain, trajectories):
    assert all(np.isnan(run_half(plain, inputs)).any() for inputs in few_frames(trajectories))


def test_the_audit_names_the_layers_and_where_they_overflow(audited):
    report = json.loads((audited.folder / REPORT).read_text())["stages"]["step"]
    kept = {layer["name"]: layer for layer in report["keep_fp32"]}
    assert tuple(kept) == audited.stages["step"].keep_fp32
    graph = onnx.load(str(audited.folder / "step.onnx"), load_external_data=False).graph
    users = {name: node.name for node in graph.node for name in node.input}
    first, second = (kept[users[f"{FEED_FORWARD}.{part}"]] for part in ("value", "out.weight"))
    assert "its output is too large" in first["reasons"]
    assert "its input is too large" in second["reasons"]
    assert first["largest"] > 65504
    assert first["operator"] == "MatMul"
    assert first["largest_at"]["prompt"] in PROMPTS
    assert 0 < first["largest_at"]["timestep"] < 1000
    # What lies between the two, and no more: not a tenth of the network.
    assert 4 <= len(kept) < 30
    assert report["layers"] > 300
    others = [layer for layer in report["measured"] if layer["name"] not in kept]
    assert all(layer["largest"] < 65504 / 4 and 0 <= layer["error"] < 0.01 for layer in others)


def test_nothing_of_the_other_stages_is_kept(audited):
    assert audited.stages["text_encoder"].keep_fp32 == ()
    assert audited.stages["vae_decoder"].keep_fp32 == ()


def test_with_the_listed_layers_in_fp32_it_is_finite_and_as_close_as_the_report_says(
    audited, mixed, trajectories
):
    report = json.loads((audited.folder / REPORT).read_text())["stages"]["step"]
    errors = []
    for inputs in few_frames(trajectories):
        want, have = run(audited.folder / "step.onnx", inputs), run_half(mixed, inputs)
        assert np.isfinite(have).all()
        errors.append(float(np.linalg.norm(have - want) / np.linalg.norm(want)))
    assert max(errors) < 5e-3
    # The report's is the worst of all samples, at full length.
    assert 0.2 < max(errors) / report["outputs"]["state_next"]["error"] < 1.5


def video(bundle: Bundle, step: Callable[..., np.ndarray]) -> np.ndarray:
    """Frames after two solver steps, as the loop forms them, by some step and the FP32 decoder."""
    pipeline, inputs = bundle.pipeline, {}
    geometry = pipeline.geometry
    schedule = bundle.schedules.get("ddim", 2)
    inputs["table"] = schedule.table(3.0, pipeline.cfg, geometry.state_rows)[None].astype(np.float32)
    cells = (FRAMES, geometry.height // geometry.spatial_scale, geometry.width // geometry.spatial_scale)
    rng = np.random.default_rng(0)
    state = np.zeros((1, geometry.state_rows, geometry.latent_channels, *cells), np.float32)
    state[:, 0] = rng.standard_normal(state[:, 0].shape)
    inputs["text"] = rng.standard_normal((1, 2, geometry.tokens, geometry.text_width), np.float32)
    for row in range(inputs["table"].shape[1]):
        state = step({**inputs, "state": state, "step": np.array([row])})
    return run(bundle.folder / "vae_decoder.onnx", {"latents": state[:, 0]})


def test_no_black_frames(audited, plain, mixed):
    want = video(audited, lambda inputs: run(audited.folder / "step.onnx", inputs)).astype(int)
    bad = video(audited, lambda inputs: run_half(plain, inputs))
    good = video(audited, lambda inputs: run_half(mixed, inputs)).astype(int)
    assert bad.max() == bad.min(), "one colour: the black video this is about"
    assert want.std() > 5
    assert np.abs(good - want).mean() < 1


@pytest.mark.skipif(not installed("tensorrt_rtx"), reason="tensorrt_rtx is not installed")
def test_tensorrt_rtx_builds_it_with_these_layers_in_fp32_and_only_those(audited, sick, tmp_path):
    # Into one folder: the other stages are the same, and kept.
    plain = build_engines(sick, tmp_path / "set", target="rtx3060", precision="fp16").engines["step"]
    mixed = build_engines(audited, tmp_path / "set", target="rtx3060", precision="fp16").engines["step"]
    assert "fp32" not in plain.layers["linear"]
    assert mixed.layers["linear"]["fp32"]["count"] == 2
    assert mixed.layers["convolution"] == plain.layers["convolution"]
    # Two matrices of 16 x 64 and 64 x 16 in FP32, as the builder itself reports.
    assert mixed.weight_bytes - plain.weight_bytes >= 2 * (16 * 64 + 64 * 16)
    assert mixed.key != plain.key


def test_an_fp32_engine_does_not_heed_the_list(audited, sick, tmp_path):
    keys = [
        build_engines(bundle, tmp_path / name, backend="onnxruntime").engines["step"].key
        for name, bundle in (("a", audited), ("b", sick))
    ]
    assert keys[0] == keys[1]


def test_a_weight_beyond_fp16_is_refused_by_name_and_the_audit_finds_it(work, trajectories, tmp_path):
    name = f"{FEED_FORWARD}.value_bias"

    def lift(key: str, values: np.ndarray) -> np.ndarray:
        return np.full_like(values, 1e5) if key == name else values

    bundle = changed(work / "bundle", tmp_path / "bundle", lift)
    stage = bundle.stages["step"]
    with pytest.raises(BackendError, match=rf"{name} reaches 1e\+05.*calibrate"):
        convert(bundle.folder / "step.onnx", tmp_path / "step.onnx", stage.spec)
    feeds = [Feed(s.inputs, s.prompt, s.timestep) for s in trajectories][:1]
    audit = audit_stage(bundle.folder / "step.onnx", stage, feeds)
    reasons = {reason for layer in audit.layers for reason in layer.reasons}
    assert "a weight is beyond FP16" in reasons
    convert(bundle.folder / "step.onnx", tmp_path / "step.onnx", stage.spec, keep=audit.keep)


def test_what_is_not_finite_in_fp32_is_an_error_that_names_layer_and_timestep(work, trajectories, tmp_path):
    def explode(name: str, values: np.ndarray) -> np.ndarray:
        return values * np.float32(3e38) if name == f"{FEED_FORWARD}.value" else values

    bundle = changed(work / "bundle", tmp_path / "bundle", explode)
    feeds = [Feed(s.inputs, s.prompt, s.timestep) for s in trajectories][:1]
    with pytest.raises(CalibrationError, match=r"layer node_\w+ of step.onnx is not finite.*at timestep \d"):
        audit_stage(bundle.folder / "step.onnx", bundle.stages["step"], feeds)


@pytest.mark.parametrize("error", [0, -1, 1, float("nan")])
def test_an_impossible_error_is_refused(sick, trajectories, tmp_path, error):
    with pytest.raises(InputError, match="is not possible"):
        calibrate_fp16(sick, trajectories, tmp_path / "out", error=error)
    assert list(tmp_path.iterdir()) == []


def test_the_bundle_itself_is_no_output(sick, trajectories):
    with pytest.raises(InputError, match="is the bundle itself"):
        calibrate_fp16(sick, trajectories, sick.folder)


def test_ctrl_c_leaves_nothing(sick, trajectories, tmp_path):
    def interrupt(what: str, done: int, total: int) -> None:
        if what == "audit step" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_fp16(sick, trajectories, tmp_path / "out", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_the_audit_and_inspect_shows_what_engines_run_in(work, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    few = ("--steps", "2", "--samples", "1", "--frames", "4")
    options = ("--precision", "fp16", "--prompts", "prompts.txt", *few, "--json")
    done = run_reelrt("calibrate", str(work / "bundle"), "-o", "audited", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)["report"]
    assert report["settings"]["error"] == 0.01
    assert report["stages"]["step"]["layers"] > 300
    assert report["stages"]["step"]["keep_fp32"] == []
    assert 0 < report["stages"]["step"]["outputs"]["state_next"]["error"] < 0.05
    for layer in report["stages"]["step"]["measured"]:
        assert layer["largest"] > 0
    shown = run_reelrt("inspect", str(work / "engines"), folder=tmp_path)
    assert shown.returncode == 0, shown.stderr
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert ["step", "convolution", "fp32", "34"] in [line[:4] for line in lines]
    found = json.loads(run_reelrt("inspect", str(work / "engines"), "--json", folder=tmp_path).stdout)
    assert found["stages"]["step"]["layers"]["convolution"]["fp32"]["count"] == 34


def test_layers_beside_int8_are_audited_too(sick, tmp_path):
    """The sick layers stay out of INT8, and an engine of the bundle would compute them in FP16."""
    enough = record(sick.folder, PROMPTS, tmp_path / "work", steps=4, samples_per_prompt=4, frames=4)
    made = calibrate_int8(sick, enough, tmp_path / "int8", method="max", keep=[r"\.ff\."])
    kept = made.bundle.stages["step"].keep_fp32
    assert made.report["fp16_audit"]["kept_fp32"]["step"] == len(kept) > 0
    graph = onnx.load(str(made.bundle.folder / "step.onnx"), load_external_data=False).graph
    users = {name: node.name for node in graph.node for name in node.input}
    assert {users[f"{FEED_FORWARD}.{part}"] for part in ("value", "out.weight")} <= set(kept)
    listed = json.loads((made.bundle.folder / REPORT).read_text())["stages"]["step"]["keep_fp32"]
    assert [layer["name"] for layer in listed] == list(kept)
    assert REPORT in made.bundle.files


def test_emulated_fp16_shows_the_overflow_and_that_the_audit_ends_it(sick, audited, tmp_path):
    # Without guidance, which would enlarge what the two passes differ by.
    options = {"prompts": 1, "steps": (1,), "guidance": 1.0, "adherence": False, "attach": False}
    options["emulate_fp16"] = True
    with pytest.raises(BackendError, match="numbers that are"):
        evaluate_quality(sick.folder, sick.folder, tmp_path / "sick", **options)
    found = evaluate_quality(sick.folder, audited.folder, tmp_path / "audited", **options).document
    assert found["candidate"]["precisions"] == dict.fromkeys(audited.stages, "fp16")
    assert found["passed"] is True
    (run,) = found["runs"]
    predicted = json.loads((audited.folder / REPORT).read_text())["stages"]["step"]["outputs"]["state_next"]
    assert 0.1 < run["latent_error"]["last_step"]["worst"] / predicted["error"] < 2
    assert any("FP16 is emulated here" in note for note in found["notes"])
