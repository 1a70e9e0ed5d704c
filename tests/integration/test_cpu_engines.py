"""A graph rewritten for ONNX Runtime's CPU kernels, whole or in two parts, says what the bundle's says."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes import common

from reelrt.bundle.manifest import Bundle
from reelrt.engines.text_free import split
from reelrt.engines.token_rows import MICROSOFT, rewrite
from tests.commands import reelrt, tree
from tests.graphs import run_step
from tests.models import only

TRANSFORMERS = {"small": 15, "odd": 23}
"""One at the entrance, and two for every layer with attention."""
SIZES = {"small": ((5, 4, 6), (16, 8, 8)), "odd": ((3, 10, 14), (4, 5, 7))}
"""Frames, latent height and width."""


def feed(bundle: Bundle, sizes: tuple[int, int, int], rows: int = 3) -> dict[str, np.ndarray]:
    frames, height, width = sizes
    extent = {"batch": 1, "rows": rows, "frames": frames, "height": height, "width": width}
    rng = np.random.default_rng(1)
    inputs = {
        name: rng.standard_normal(tensor.shape(extent)).astype(np.float32)
        for name, tensor in bundle.stages["step"].spec.inputs.items()
        if tensor.dtype != "int64"
    }
    inputs["table"][..., 0], inputs["table"][..., 1], inputs["table"][..., 2] = 500, 0.8, 1
    return {**inputs, "step": np.array([1], np.int64)}


def load(bundle: Bundle) -> ir.Model:
    return ir.external_data.load_to_model(ir.load(bundle.folder / "step.onnx"))


def trained(model: ir.Model) -> ir.Model:
    """With factors and offsets in its normalisations: diffusers starts with 1 and 0."""
    rng = np.random.default_rng(2)
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        array = value.const_value.numpy()
        if array.shape == (array.size, 1, 1):
            value.const_value = ir.tensor(
                array + rng.normal(0, 0.3, array.shape).astype(array.dtype), name=name
            )
    return model


def rewritten(model: ir.Model) -> int:
    count = rewrite(model.graph, "batch")
    model.opset_imports[MICROSOFT] = 1
    for tidy in (common.TopologicalSortPass(), common.RemoveUnusedNodesPass()):
        tidy(model)
    return count


def run(model: ir.Model, inputs: dict[str, np.ndarray], folder: Path) -> list[np.ndarray]:
    ir.save(model, folder / "graph.onnx")
    session = ort.InferenceSession(str(folder / "graph.onnx"), providers=["CPUExecutionProvider"])
    return list(session.run(["state_next", "step_next"], inputs))


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_transformer_is_rewritten_and_nothing_changes(made, name, tmp_path):
    bundle = Bundle.load(made(name)[1].parent / "bundle")
    model = trained(load(bundle))
    attentions = kinds(model).count("Softmax")
    assert rewritten(model) == TRANSFORMERS[name]
    assert kinds(model).count("FusedMatMul") == 2 * attentions
    norms = kinds(model).count("InstanceNormalization")
    assert kinds(model).count("BatchNormalization") == norms - TRANSFORMERS[name], "in the projections now"
    for sizes in SIZES[name]:
        inputs = feed(bundle, sizes)
        wanted, found = run(trained(load(bundle)), inputs, tmp_path), run(model, inputs, tmp_path)
        np.testing.assert_allclose(found[0], wanted[0], rtol=0, atol=1e-5 * np.abs(wanted[0]).max())
        assert found[1].tolist() == [2]


def test_a_transformer_with_an_unknown_part_stays(made, tmp_path):
    bundle = Bundle.load(made("small")[1].parent / "bundle")
    plain, model = load(bundle), load(bundle)
    for each in (plain, model):
        norm = next(node for node in each.graph if node.op_type == "LayerNormalization")
        soft = ir.node("Softplus", [norm.outputs[0]])
        ir.convenience.replace_all_uses_with(norm.outputs[0], soft.outputs[0])
        soft.replace_input_with(0, norm.outputs[0])
        each.graph.insert_after(norm, soft)
    assert rewritten(model) == TRANSFORMERS["small"] - 1
    inputs = feed(bundle, (5, 4, 6))
    wanted, found = run(plain, inputs, tmp_path), run(model, inputs, tmp_path)
    np.testing.assert_allclose(found[0], wanted[0], rtol=0, atol=1e-5 * np.abs(wanted[0]).max())


def test_several_videos_in_a_batch_are_not_taken_for_one(made):
    """Where frames or prompts of several videos would mix, the transformer stays as it is."""
    model = load(Bundle.load(made("small")[1].parent / "bundle"))
    assert rewrite(model.graph, "no such axis") == 0


def test_batched_guidance_keeps_its_transformers_and_one_graph(work, export_few_steps, tmp_path, monkeypatch):
    from reelrt.engines.builder import build_engines

    split_up = Bundle.load(work / "bundle")
    assert rewrite(load(split_up).graph, "batch") == 3
    only(monkeypatch, "step")
    batched = {"cfg": "batched", "validate": False}
    bundle = export_few_steps(work / "model", tmp_path / "bundle", **batched)
    assert rewrite(load(bundle).graph, "batch") == 0
    for name in ("text_encoder", "vae_decoder"):  # guidance is nothing to them
        for file in split_up.folder.glob(f"{name}.*"):
            shutil.copy(file, bundle.folder)
    Bundle(bundle.folder, bundle.pipeline, {**split_up.stages, **bundle.stages}).save("0.1.0")
    bundle = Bundle.load(bundle.folder)
    engines = build_engines(bundle, tmp_path / "engines", backend="onnxruntime")
    assert not list(engines.folder.glob("step.onnx.prefix*"))
    inputs = feed(bundle, (5, 4, 6))
    wanted, found = run(load(bundle), inputs, tmp_path), run_step(engines.folder, inputs)
    np.testing.assert_allclose(found[0], wanted[0], rtol=0, atol=1e-5 * np.abs(wanted[0]).max())


def test_a_build_in_another_process_gives_the_same_files(small_engines, tmp_path):
    words = ("build", small_engines.parent / "bundle", "-o", tmp_path / "engines", "--backend", "onnxruntime")
    built = reelrt(*words, PYTHONHASHSEED="1")
    assert built.returncode == 0, built.stderr
    one, two = (
        {name: each for name, each in tree(folder).items() if ".onnx" in name}
        for folder in (small_engines, tmp_path / "engines")
    )
    assert one == two


def test_the_first_part_takes_no_text_and_both_make_the_whole(made, small_engines):
    bundle = Bundle.load(made("small")[1].parent / "bundle")
    model = load(bundle)
    first, rest = split(model.graph)
    assert [value.name for value in first.inputs] == ["state", "table", "step"]
    assert {"state", "table", "step", "text"} < {value.name for value in rest.inputs}
    convolutions = [node.name for part in (first, rest) for node in part if node.op_type == "Conv"]
    assert sorted(convolutions) == sorted(node.name for node in model.graph if node.op_type == "Conv")
    assert {"step.onnx", "step.onnx.prefix"} <= {path.name for path in small_engines.iterdir()}


def test_nothing_of_the_first_part_depends_on_the_row_of_a_pair(made, small_engines):
    """Both rows of a guided step have the timestep and the sample; weights and text are the rest's."""
    bundle = Bundle.load(made("small")[1].parent / "bundle")
    inputs = feed(bundle, (16, 8, 8))
    session = ort.InferenceSession(
        str(small_engines / "step.onnx.prefix"), providers=["CPUExecutionProvider"]
    )

    def outputs(table: np.ndarray) -> list[np.ndarray]:
        return list(session.run(None, {"state": inputs["state"], "table": table, "step": inputs["step"]}))

    other = inputs["table"].copy()
    other[..., 2:] += 1
    for one, two in zip(outputs(inputs["table"]), outputs(other), strict=True):
        np.testing.assert_array_equal(one, two)
