"""An engine's precision is read off what was built; one that is not what it is called is an error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from reelrt.bundle.manifest import Bundle, EngineSet
from reelrt.engines.backends import installed
from reelrt.engines.builder import build_engines
from reelrt.engines.inspection import describe
from reelrt.engines.inspector import summarise
from reelrt.engines.precision import convert
from reelrt.engines.recipe import Job
from reelrt.engines.tensorrt import check_network
from reelrt.engines.verified import check, precisions, read
from reelrt.errors import BackendError, InputError
from tests.graphs import quantised, tiny_bundle

needs_rtx = pytest.mark.skipif(not installed("tensorrt_rtx"), reason="tensorrt_rtx is not installed")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return Bundle.load(tiny_bundle(tmp_path_factory.mktemp("verified") / "bundle"))


@pytest.fixture(scope="module")
def int8(bundle, tmp_path_factory) -> Bundle:
    """Both convolutions and the prompt's projection quantised, as ModelOpt would."""
    folder = tmp_path_factory.mktemp("int8") / "bundle"
    return quantised(bundle, folder, ("in_weight", "out_weight", "text_weight"))


def job(bundle: Bundle, **changes) -> Job:
    stage = bundle.stages["step"]
    graph, output = bundle.folder / stage.file, Path("step.engine")
    plain = Job("tensorrt_rtx", stage.spec, graph, stage.precision, output, stage.precision, {}, "8.6")
    return replace(plain, **changes)


def test_a_graphs_layers_by_class_and_precision(bundle):
    found = read(bundle.folder / "step.onnx", fused=False)
    assert found.layers["convolution"] == {
        "fp32": {"count": 2, "weight_bytes": 4 * (2 * 16 * 4 * 9 + 16 + 4)},
    }
    assert found.layers["linear"] == {"fp32": {"count": 1, "weight_bytes": 4 * 32 * 16}}
    assert found.layers["attention"]["fp32"]["count"] == 1, "the state's own product has no weight"


def test_fp16_halves_the_bytes_and_what_is_kept_stays(bundle, tmp_path):
    spec = bundle.stages["step"].spec
    whole = read(bundle.folder / "step.onnx", fused=False)
    half = read(convert(bundle.folder / "step.onnx", tmp_path / "half.onnx", spec), fused=False)
    assert half.layers["convolution"]["fp16"]["weight_bytes"] * 2 == 4 * (2 * 16 * 4 * 9 + 16 + 4)
    keep = ["projected"]
    path = convert(bundle.folder / "step.onnx", tmp_path / "kept.onnx", spec, keep=keep)
    kept = read(path, fused=False, keep=keep)
    assert kept.layers["linear"] == {"fp32": {"count": 1, "weight_bytes": 4 * 32 * 16}}
    assert kept.layers["convolution"] == half.layers["convolution"]
    assert kept.kept == 32 * 16
    assert half.weight_bytes < kept.weight_bytes < whole.weight_bytes


def test_int8_needs_both_sides_quantised(bundle, int8, tmp_path):
    found = read(int8.folder / "step.onnx", fused=False)
    assert found.layers["convolution"]["int8"]["count"] == 2
    assert found.layers["linear"]["int8"]["count"] == 1
    alone = quantised(bundle, tmp_path / "bundle", ["in_weight"], activations=False)
    found = read(alone.folder / "step.onnx", fused=False)
    assert found.layers["convolution"]["int8_weights"]["count"] == 1
    assert found.layers["convolution"]["fp32"]["count"] == 1


def test_an_int8_graph_gets_fp16_around_it_and_keeps_its_integers(int8, tmp_path):
    spec = int8.stages["step"].spec
    path = convert(int8.folder / "step.onnx", tmp_path / "step.onnx", spec, boundary="int8")
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert types["in_weight"] == types["in_weight.zero"] == TensorProto.INT8
    assert types["in_weight.scale"] == types["scaled.scale"] == TensorProto.FLOAT16
    assert types["out_bias"] == TensorProto.FLOAT16
    ends = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    assert ends["text"] == TensorProto.FLOAT, "the boundary of an INT8 stage is float32"


def test_a_scale_that_fp16_would_make_zero_does_not_divide_by_it(int8, tmp_path):
    model = onnx.load(str(int8.folder / "step.onnx"))
    for tensor in model.graph.initializer:
        if tensor.name == "in_weight.scale":
            tensor.CopyFrom(numpy_helper.from_array(np.full(16, 1e-9, np.float32), tensor.name))
    onnx.save(model, str(tmp_path / "small.onnx"))
    spec = int8.stages["step"].spec
    made = onnx.load(str(convert(tmp_path / "small.onnx", tmp_path / "half.onnx", spec, boundary="int8")))
    scale = next(t for t in made.graph.initializer if t.name == "in_weight.scale")
    assert numpy_helper.to_array(scale).min() > 0


def test_a_layer_to_keep_that_is_not_there_is_refused(bundle, tmp_path):
    with pytest.raises(BackendError, match="has no layer nowhere"):
        convert(
            bundle.folder / "step.onnx",
            tmp_path / "step.onnx",
            bundle.stages["step"].spec,
            keep=["nowhere", "projected"],
        )


def test_fp16_in_name_only_is_an_error_that_names_both_figures(bundle):
    found = read(bundle.folder / "step.onnx", fused=False)
    with pytest.raises(BackendError, match=r"step is called FP16, but [\d,]+ of its [\d,]+ bytes"):
        check(job(bundle, precision="fp16"), found, 0)
    check(job(bundle), found, 0)


def test_listed_layers_do_not_count_against_fp16(bundle, tmp_path):
    spec = bundle.stages["step"].spec
    keep = ("inner", "output")
    path = convert(bundle.folder / "step.onnx", tmp_path / "kept.onnx", spec, keep=keep)
    check(job(bundle, precision="fp16", keep_fp32=keep), read(path, fused=False, keep=keep), 0)
    with pytest.raises(BackendError, match="is called FP16"):
        check(job(bundle, precision="fp16"), read(path, fused=False), 0)


def test_the_builders_bytes_must_be_those_of_the_types(bundle):
    found = read(bundle.folder / "step.onnx", fused=False)
    grown = replace(found, layers={"linear": {"fp16": {"count": 1, "weight_bytes": 1_000_000}}})
    check(job(bundle), grown, 1_010_000)
    with pytest.raises(BackendError, match=r"1,000,000 bytes .* but tensorrt_rtx reports 2,000,000"):
        check(job(bundle), grown, 2_000_000)


def test_an_fp16_engine_without_fp16_in_the_inspectors_view_is_an_error(bundle, tmp_path):
    spec = bundle.stages["step"].spec
    found = read(convert(bundle.folder / "step.onnx", tmp_path / "half.onnx", spec), fused=False)
    half = job(bundle, precision="fp16")
    check(half, found, 0, {"CaskConvolution": {"fp16": 2}, "Reformat": {"fp32": 1}})
    with pytest.raises(BackendError, match="inspector finds only"):
        check(half, found, 0, {"CaskConvolution": {"fp32": 2}})


def test_int8_that_onnx_runtime_runs(bundle, tmp_path):
    whole = quantised(bundle, tmp_path / "bundle", ["projection"], stage="text_encoder")
    engine = build_engines(whole, tmp_path / "engines", backend="onnxruntime").engines["text_encoder"]
    assert engine.precision == "int8"
    assert engine.layers["linear"]["int8"]["count"] == 1
    assert 32 * 32 <= engine.layers["linear"]["int8"]["weight_bytes"] < 4 * 32 * 32
    assert describe(tmp_path / "engines")["stages"]["text_encoder"]["layers"] == engine.layers


def test_int8_of_which_onnx_runtime_runs_nothing_is_an_error(int8, tmp_path):
    # With no QuantizeLinear behind it a convolution falls back: stored as INT8, multiplied in FP32.
    match = r"step is called INT8, but onnxruntime runs none .* convolution 2 int8_weights"
    with pytest.raises(BackendError, match=match):
        build_engines(int8, tmp_path / "engines", backend="onnxruntime")
    assert not (tmp_path / "engines").exists()


def test_fp16_on_a_cpu_is_told_to_be_fp32(bundle, tmp_path, caplog):
    engines = build_engines(bundle, tmp_path / "engines", backend="onnxruntime", precision="fp16")
    assert "runs it in FP32" in caplog.text
    assert set(engines.engines["step"].layers["convolution"]) == {"fp32"}


@pytest.mark.parametrize(
    ("precision", "match"), [("int8", "has no int8 stage"), ("int4", "'int4' is not known")]
)
def test_a_precision_that_a_bundle_cannot_give_is_refused(bundle, tmp_path, precision, match):
    with pytest.raises(InputError, match=match):
        build_engines(bundle, tmp_path / "engines", backend="onnxruntime", precision=precision)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_int8_weights_do_not_become_floating_point_again(int8, tmp_path, precision):
    with pytest.raises(InputError, match="holds int8 weights"):
        build_engines(int8, tmp_path / "engines", backend="onnxruntime", precision=precision)


@needs_rtx
def test_a_parsed_network_may_have_the_listed_convolutions_in_fp32_and_only_those(bundle, tmp_path):
    import tensorrt_rtx as trt

    spec, keep = bundle.stages["step"].spec, ("inner",)
    path = convert(bundle.folder / "step.onnx", tmp_path / "kept.onnx", spec, keep=keep)
    model = onnx.load(str(path))
    for node in model.graph.node:  # TensorRT calls layers after nodes, and these have no names
        node.name = node.output[0]
    onnx.save(model, str(path))
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR)).parse_from_file(str(path))
    typed = precisions(path)
    assert (typed["inner"], typed["output"]) == ("fp32", "fp16")
    check_network(network, job(bundle, precision="fp16", keep_fp32=keep), typed)
    with pytest.raises(BackendError, match="step is FP16, but its layer inner runs in FP32"):
        check_network(network, job(bundle, precision="fp16"), typed)
    with pytest.raises(BackendError, match="output of step is fp32, but tensorrt_rtx makes it fp16"):
        check_network(network, job(bundle, precision="fp16", keep_fp32=keep), {**typed, "output": "fp32"})


@needs_rtx
def test_tensorrt_rtx_builds_int8_with_fp16_around_it(int8, tmp_path):
    engines = build_engines(int8, tmp_path / "engines", target="rtx3060", batch=1)
    assert {name: engine.precision for name, engine in engines.engines.items()} == {
        "text_encoder": "fp16",
        "step": "int8",
        "vae_decoder": "fp16",
    }
    step = EngineSet.load(tmp_path / "engines").engines["step"]
    assert step.layers["convolution"]["int8"]["count"] == 2
    assert "fp32" not in step.layers["linear"]
    assert step.inspected == {}, "no GPU here to open it"


def test_the_inspectors_document_is_counted():
    document = {
        "Layers": [
            {
                "LayerType": "CaskConvolution",
                "Outputs": [{"Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}],
            },
            {"LayerType": "CaskConvolution", "Outputs": [{"Format/Datatype": "Row major Int8 format"}]},
            {"LayerType": "Myelin", "Outputs": [{"Format/Datatype": "BFloat16"}]},
            {"LayerType": "Reformat", "Outputs": [{"Format/Datatype": "Row major linear FP32"}]},
            {"LayerType": "NoOp", "Outputs": []},
            "a name alone",
        ]
    }
    assert summarise(document) == {
        "CaskConvolution": {"fp16": 1, "int8": 1},
        "Myelin": {"bf16": 1},
        "Reformat": {"fp32": 1},
        "NoOp": {"unknown": 1},
    }
    assert summarise({}) == {}
