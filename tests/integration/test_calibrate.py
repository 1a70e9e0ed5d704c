"""`reelrt calibrate` with real ModelOpt: what it writes, what it refuses, and going on when stopped."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest

from reelrt.bundle.manifest import Bundle
from reelrt.calibration import qdq
from reelrt.calibration.bundles import calibrate_int8
from reelrt.calibration.int8 import quantise
from reelrt.calibration.layers import find_layers
from reelrt.calibration.ranges import METHODS, Method
from reelrt.calibration.recorder import open_graph
from reelrt.calibration.recording import record
from reelrt.calibration.sensitivity import sweep
from reelrt.calibration.smoothing import candidates, channel_peaks, write_smoothed
from reelrt.calibration.streaming import measure
from reelrt.calibration.trajectories import Trajectories
from reelrt.errors import CalibrationError, InputError
from reelrt.runtime.unbuilt import open_pipeline
from tests.commands import reelrt, stop, tree

PROMPTS = ["a red circle moving right", "the blue square growing", "one white cross turning", "dots on gray"]
Quantised = Callable[[Method], onnx.ModelProto]
QUICK = ("--steps", 4, "--samples", 2, "--frames", 4, "--prompts", "prompts.txt")

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def place(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle and a file of prompts, in a folder of their own."""
    folder = tmp_path_factory.mktemp("calibrate")
    shutil.copytree(work / "bundle", folder / "bundle")
    (folder / "prompts.txt").write_text("# varied\n\n" + "\n".join(PROMPTS) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def recorded(place: Path) -> Trajectories:
    """At a few frames: ranges may be found at a small size."""
    return record(place / "bundle", PROMPTS, place / "recorded", steps=4, samples_per_prompt=2, frames=4)


@pytest.fixture(scope="module")
def quantised(place: Path, recorded: Trajectories) -> Quantised:
    """A method to the step graph with every layer quantised; a copy, because tests take pairs away."""

    @cache
    def once(method: Method) -> onnx.ModelProto:
        source = place / "bundle" / "step.onnx"
        nodes = [node.name for node in qdq.quantisable(onnx.load(source).graph)]
        return quantise(source, nodes, lambda: (s.inputs for s in recorded), len(recorded), method=method)

    def copied(method: Method) -> onnx.ModelProto:
        copy = onnx.ModelProto()
        copy.CopyFrom(once(method))
        return copy

    return copied


@pytest.fixture
def master(quantised: Quantised) -> onnx.ModelProto:
    return quantised("max")


INT8 = ("calibrate", "bundle", "-o", "int8", "--precision", "int8", *QUICK)


@pytest.fixture(scope="module")
def kept(place: Path) -> dict[str, str]:
    """What is left of a calibration that was stopped while it recorded: some of its trajectories."""

    def half_done(_: str) -> bool:
        return (place / "int8.work" / "prompt-0001.safetensors").exists()

    before = tree(place)
    stopped = stop(*INT8, folder=place, when=half_done, number=signal.SIGINT)
    assert stopped.code == 130, stopped.errors
    assert not (place / "int8").exists()
    left = {name: each for name, each in tree(place).items() if not name.startswith("int8.work")}
    assert left == before
    return tree(place / "int8.work")


def test_the_command_goes_on_where_it_was_stopped_and_writes_a_bundle_that_runs(
    place: Path, kept: dict[str, str]
) -> None:
    made = reelrt(*INT8, "--json", folder=place)
    assert made.returncode == 0, made.stderr
    found = json.loads(made.stdout)
    assert found["report"] == json.loads((place / "int8" / "calibration.json").read_text(encoding="utf-8"))
    step = found["stages"]["step"]
    assert step["precision"] == "int8"
    assert step["weight_bytes"] < 0.6 * step["before_bytes"]
    assert "trajectories take up to" in made.stderr
    assert "prompt-0001.safetensors" in kept
    assert kept.items() <= tree(place / "int8.work").items()

    bundle = Bundle.load(place / "int8")
    graph = onnx.load(place / "int8" / "step.onnx").graph
    assert len(qdq.quantised(graph)) == found["report"]["nodes"]["quantised"]
    for name in ("text_encoder", "vae_decoder"):
        assert (bundle.stages[name].precision == "int8") == found["report"]["other_stages"][name]["used"]

    reference, video = (
        open_pipeline(place / kind).generate(PROMPTS[0], steps=4, seed=0, frames=4)
        for kind in ("bundle", "int8")
    )
    error = np.linalg.norm(video.latents - reference.latents) / np.linalg.norm(reference.latents)
    assert found["report"]["final_latents"]["relative_error"] == pytest.approx(error, rel=0.7)
    assert 0 < error < 0.5  # random weights are harder on INT8 than trained ones

    again = reelrt(*INT8, folder=place)
    assert (again.returncode, "int8 is up to date" in again.stderr) == (0, True)


def test_only_weights_become_int8(place: Path) -> None:
    words = ("calibrate", "bundle", "-o", "weights", "--precision", "int8-weights", *QUICK, "--json")
    made = reelrt(*words, folder=place)
    assert made.returncode == 0, made.stderr
    found = json.loads(made.stdout)
    step = found["stages"]["step"]
    assert step["precision"] == "int8-weights"
    assert step["weight_bytes"] < 0.6 * step["before_bytes"]
    assert 0 < found["report"]["final_latents"]["relative_error"] < 0.05
    operators = {node.op_type for node in onnx.load(place / "weights" / "step.onnx").graph.node}
    assert "DequantizeLinear" in operators
    assert "QuantizeLinear" not in operators


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_ranges(
    place: Path, recorded: Trajectories, quantised: Quantised, method: Method
) -> None:
    source = place / "bundle" / "step.onnx"
    model = quantised(method)
    every = qdq.quantised(model.graph)  # ModelOpt leaves convolutions of a few channels out
    assert len(every) > 0.8 * len(qdq.quantisable(model.graph))
    expected = open_graph(source).run(["state_next"], dict(next(iter(recorded)).inputs))[0]
    graph = place / f"{method}.onnx"
    qdq.Master(model).write(every, graph)
    found = open_graph(graph).run(["state_next"], dict(next(iter(recorded)).inputs))[0]
    assert 0 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.5


def test_stored_int8_weights_compute_the_same(place: Path, recorded: Trajectories, master) -> None:
    folded = onnx.ModelProto()
    folded.CopyFrom(master)
    count = qdq.fold_weights(folded)
    before, after = place / "floats.onnx", place / "folded.onnx"
    floats, integers = qdq.save(master, before), qdq.save(folded, after)
    assert count > 0
    assert integers < 0.5 * floats
    feed = dict(next(iter(recorded)).inputs)
    first, second = (open_graph(path).run(["state_next"], feed)[0] for path in (before, after))
    np.testing.assert_allclose(first, second, rtol=0, atol=2e-3 * np.abs(first).max())


def test_taking_every_pair_away_gives_the_fp32_graph(place: Path, recorded: Trajectories, master) -> None:
    graph = place / "none.onnx"
    qdq.Master(master).write([], graph)
    types = {node.op_type for node in onnx.load(graph).graph.node}
    assert not types & {"QuantizeLinear", "DequantizeLinear"}
    feed = dict(next(iter(recorded)).inputs)
    paths = (place / "bundle" / "step.onnx", graph)
    first, second = (open_graph(path).run(["state_next"], feed)[0] for path in paths)
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-5 * np.abs(first).max())


def test_the_schedule_stays_fp32(master) -> None:
    """Table, counter, sinusoids and the next state: nothing there reads a Q/DQ pair."""
    made = {n.output[0] for n in master.graph.node if n.op_type == "DequantizeLinear"}
    readers = {n.op_type for n in master.graph.node if made & set(n.input)}
    assert readers <= {
        *qdq.QUANTISABLE,
        "Reshape",
        "Transpose",
        "Shape",
    }  # these move values, or ask for sizes


def test_a_sweep_goes_on_where_it_was_stopped(place: Path, recorded: Trajectories, master) -> None:
    bundle = Bundle.load(place / "bundle")
    layers = find_layers(onnx.load(place / "bundle" / "step.onnx", load_external_data=False).graph)[:4]
    file = place / "sweep.json"

    def interrupt(what: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    def run(progress):
        return sweep(
            bundle,
            recorded,
            qdq.Master(master),
            layers,
            file,
            method="max",
            steps=2,
            prompts=1,
            progress=progress,
        )

    with pytest.raises(KeyboardInterrupt):
        run(interrupt)
    begun = json.loads(file.read_text(encoding="utf-8"))["errors"]
    assert list(begun) == [layer.name for layer in layers[:2]]
    found = run(lambda *_: None)
    assert set(found.errors) == {layer.name for layer in layers}
    assert {name: found.errors[name] for name in begun} == begun
    assert all(0 <= error < 0.5 for error in found.errors.values())

    assert found.kept(1) == []
    worst = found.ordered[0][0]
    together = sum(error**2 for error in found.errors.values()) ** 0.5
    assert found.kept(together * 0.999)[:1] == [worst]
    assert set(found.kept(0)) == set(found.errors)
    with pytest.raises(InputError, match="holds the sensitivity of another calibration"):
        sweep(bundle, recorded, qdq.Master(master), layers, file, method="entropy", steps=2, prompts=1)


def test_a_budget_decides_what_stays_fp32(
    place: Path, recorded: Trajectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = lambda graph: find_layers(graph)[:16]  # noqa: E731 (a sweep of all takes long)
    monkeypatch.setattr("reelrt.calibration.bundles.find_layers", few)
    made = calibrate_int8(
        Bundle.load(place / "bundle"),
        recorded,
        place / "budget",
        method="max",
        budget=0.001,
        fp16_error=None,
    )
    kept = made.report["layers"]["kept_fp32"]
    assert 0 < len(kept) < 16
    assert list(made.report["sensitivity"]["errors"])[: len(kept)] == list(kept)
    assert (place / "budget" / "sensitivity.png").read_bytes()[:4] == b"\x89PNG"
    assert "sensitivity.png" in Bundle.load(place / "budget").files


@pytest.mark.parametrize(
    ("lines", "options", "code", "message"),
    [
        (None, (), 7, "prompts.txt cannot be read: No such file or directory"),
        ("# nothing\n", (), 2, "prompts.txt holds no prompt. Write one per line."),
        (
            "a cat\na dog\n",
            ("--samples", 2),
            2,
            "8 samples are too few",
        ),
        ("a cat\na dog\n", ("--samples", 9), 2, "9 samples per prompt are not possible with 4 steps"),
        ("a cat\na dog\n", ("--budget", 7, "--samples", 4), 2, "budget 7.0 is not possible"),
        ("a cat\na dog\n", ("--steps", 999, "--samples", 4), 2, "steps 999 is not available"),
        ("a cat\na dog\n", ("--steps", 0), 2, "steps 0 is not possible"),
        ("a cat\na dog\n", ("--samples", 0), 2, "0 samples per prompt are not possible"),
        ("a cat\na dog\n", ("--budget", "nan"), 2, "budget nan is not possible"),
        ("a cat\na dog\n", ("--keep", "("), 2, "keep '(' is no regular expression"),
    ],
)
def test_what_cannot_be_calibrated(
    work: Path, tmp_path: Path, lines, options, code: int, message: str
) -> None:
    if lines is not None:
        (tmp_path / "prompts.txt").write_text(lines, encoding="utf-8")
    words = ("calibrate", work / "bundle", "-o", "out", "--precision", "int8")
    made = reelrt(*words, "--prompts", "prompts.txt", "--steps", 4, *options, folder=tmp_path)
    assert (made.returncode, message in made.stderr) == (code, True), made.stderr
    assert not (tmp_path / "out").exists()


def test_prompts_all_alike_are_warned_of(place: Path, tmp_path: Path) -> None:
    from reelrt.calibration.prompt_sets import warn_if_alike

    with pytest.warns(UserWarning, match="share 100% of their words: the ranges"):
        warn_if_alike(["a red cat runs"] * 3)
    with pytest.warns(UserWarning, match="one prompt only"):
        warn_if_alike(["a red cat runs"])


def test_varied_prompts_are_not(recwarn: pytest.WarningsRecorder) -> None:
    from reelrt.calibration.prompt_sets import default_prompts, warn_if_alike

    for model in ("moving-shapes", "ms-1.7b"):
        prompts = default_prompts(model)
        assert len(set(prompts)) == 16
        warn_if_alike(prompts)
    assert not recwarn.list


def test_an_fp16_bundle_is_refused(place: Path, recorded: Trajectories) -> None:
    bundle = Bundle.load(place / "bundle")
    from dataclasses import replace

    half = replace(bundle, stages={n: replace(s, precision="fp16") for n, s in bundle.stages.items()})
    with pytest.raises(InputError, match="text_encoder of .* is fp16; calibrating starts from FP32"):
        calibrate_int8(half, recorded, place / "half")


def test_nodes_that_cannot_be_quantised_are_named(place: Path, recorded: Trajectories) -> None:
    source = place / "bundle" / "step.onnx"
    node = next(node.name for node in onnx.load(source).graph.node if node.op_type == "Sin")
    with pytest.raises(CalibrationError, match=rf"none of these nodes of step.onnx: {node} \(Sin\)"):
        quantise(source, [node], lambda: (s.inputs for s in recorded), len(recorded), method="max")


@pytest.mark.parametrize("method", METHODS)
def test_a_graph_too_large_for_modelopt_gets_the_same_pairs(
    place: Path,
    recorded: Trajectories,
    quantised: Quantised,
    method: Method,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ranges found a few tensors at a time, weights from file to file: what ModelOpt would have made."""
    monkeypatch.setattr("reelrt.calibration.ranges.GROUP_BYTES", 1 << 20)
    source = place / "bundle" / "step.onnx"
    model = quantised(method)
    theirs = qdq.Master(model)
    totals = set[int]()
    ours = measure(
        source,
        theirs.nodes,
        lambda: (s.inputs for s in recorded),
        len(recorded),
        method=method,
        progress=lambda what, done, total: totals.add(total),
    )
    assert max(totals) >= 3 * len(recorded), "so many times all samples are run"
    assert ours.nodes == theirs.nodes
    # ModelOpt takes 1 for a softmax, and one range for tensors that are joined: never a smaller one.
    ratios = {name: scale * 127 / ours.ranges[name] for name, scale in _scales(model).items()}
    assert ratios.keys() == ours.ranges.keys()
    assert min(ratios.values()) > 0.9
    assert sum(ratio < 1 + 1e-5 for ratio in ratios.values()) > 0.7 * len(ratios)
    nodes = sorted(ours.nodes)[::2]
    paths = [place / f"{kind}-{method}.onnx" for kind in ("theirs", "ours")]
    sizes = [theirs.write(nodes, paths[0]), ours.write(nodes, paths[1])]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05), "theirs store zero points for each channel"
    assert [qdq.quantised(onnx.load(path).graph) for path in paths] == [set(nodes)] * 2
    for sample in list(recorded)[:2]:
        first, second = (open_graph(path).run(["state_next"], dict(sample.inputs))[0] for path in paths)
        assert np.linalg.norm(first - second) < 0.1 * np.linalg.norm(first)


def _scales(model: onnx.ModelProto) -> dict[str, float]:
    """Activation to its scale in a graph of ModelOpt's."""
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    return {node.input[0]: float(values[node.input[1]]) for node in pairs if node.input[0] not in values}


def test_a_bundle_can_be_made_without_modelopt_reading_it(
    place: Path, recorded: Trajectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reelrt.calibration.int8.MODELOPT_BYTES", 0)
    monkeypatch.setattr("reelrt.calibration.int8.quantise", None)
    made = calibrate_int8(
        Bundle.load(place / "bundle"), recorded, place / "streamed", method="max", fp16_error=None
    )
    assert 0 < made.report["final_latents"]["relative_error"] < 0.5
    assert made.report["nodes"]["quantised"] > 0.5 * made.report["nodes"]["all"]
    video = open_pipeline(place / "streamed").generate(PROMPTS[0], steps=1, seed=0)
    assert np.isfinite(video.latents).all()


def test_a_smoothed_graph_computes_the_same(place: Path, recorded: Trajectories) -> None:
    source = place / "bundle" / "step.onnx"
    graph = onnx.load(source, load_external_data=False).graph
    layers = find_layers(graph)
    able = candidates(graph, layers)
    peaks = channel_peaks(source, able, lambda: (s.inputs for s in recorded))
    target = write_smoothed(source, place / "smooth.onnx", able, peaks, 0.5)
    feed = dict(next(iter(recorded)).inputs)
    first, second = (open_graph(path).run(["state_next"], feed)[0] for path in (source, target))
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-5 * np.abs(first).max())

    after = onnx.load(target).graph
    assert [layer.name for layer in find_layers(after)] == [layer.name for layer in layers]
    added = [node for node in after.node if node.name.endswith(".smoothed")]
    assert 0 < len(added) <= len(able)
    before = channel_peaks(target, able, lambda: (s.inputs for s in recorded))
    ratio = [np.ptp(np.log(before[each.name])) / np.ptp(np.log(peaks[each.name])) for each in able]
    assert np.median(ratio) < 0.8, "channels are more alike"


def test_smoothing_is_used_only_where_it_pays(
    place: Path, recorded: Trajectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = lambda graph, layers: candidates(graph, layers)[:4]  # noqa: E731 (a sweep of all takes long)
    monkeypatch.setattr("reelrt.calibration.bundles.candidates", few)
    made = calibrate_int8(
        Bundle.load(place / "bundle"), recorded, place / "even", method="max", smooth=0.5, fp16_error=None
    )
    found = made.report["smoothing"]
    assert (found["alpha"], len(found["layers"])) == (0.5, 4)
    for each in found["layers"].values():
        assert each["used"] == (each["with"] <= 0.95 * each["without"])
    assert found["used"] == sum(each["used"] for each in found["layers"].values())
    assert 0 < made.report["final_latents"]["relative_error"] < 0.5


@pytest.mark.parametrize(
    ("precision", "words", "sentence"),
    [
        ("int8", ("--smooth", 2), "smooth 2.0 is not possible"),
        ("fp16", ("--smooth", 0.5), "--smooth is for --precision int8, not for fp16"),
        ("fp16", ("--method", "max"), "--method is for --precision int8, not for fp16"),
        ("int8-weights", ("--method", "max"), "--method is for --precision int8, not for int8-weights"),
        ("int8-weights", ("--budget", 0.1), "--budget is for --precision int8, not for int8-weights"),
        ("fp16", ("--keep", "conv"), "--keep is for --precision int8, not for fp16"),
        ("fp16", ("--no-audit",), "--audit is for --precision int8 or int8-weights, not for fp16"),
        ("int8", ("--error", 0.1, "--no-audit"), "--error says what the audit allows"),
        ("int8", ("--size", "63x64"), "width 63 is not a multiple of 2 pixels"),
        ("int8", ("--frames", 0), "frames 0"),
    ],
)
def test_an_option_that_does_not_apply_is_refused(place: Path, precision, words, sentence) -> None:
    made = reelrt("calibrate", "bundle", "-o", "refused", "--precision", precision, *words, folder=place)
    assert made.returncode == 2
    assert sentence in " ".join(made.stderr.split())
    assert not (place / "refused").exists()
    assert not (place / "refused.work" / "trajectories.json").exists()


def test_numbers_that_are_not_finite_name_layer_and_step(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "bundle", tmp_path / "bundle")
    model = onnx.load(tmp_path / "bundle" / "step.onnx")
    layer = find_layers(model.graph)[3]
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == layer.name)
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0] = np.inf
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    qdq.save(model, tmp_path / "bundle" / "step.onnx")
    bundle = Bundle.load(tmp_path / "bundle", check=False)
    bundle.save(bundle.version)
    with pytest.raises(CalibrationError, match=rf"row 0 .*timestep 999.*first in layer {layer.nodes[0]}"):
        record(tmp_path / "bundle", PROMPTS[:1], tmp_path / "work", steps=4, samples_per_prompt=1)
