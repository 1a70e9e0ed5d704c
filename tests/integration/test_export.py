"""An export is checked against the model, is the same every time, and is whole or not there."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnxscript import opset19 as op
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from reelrt.bundle.files import sha256
from reelrt.bundle.manifest import Bundle
from reelrt.cli import app
from reelrt.errors import InputError, ModelError, ValidationError
from reelrt.export import exporter
from reelrt.export.exporter import export_bundle
from reelrt.export.operators import TRANSLATIONS
from reelrt.export.schedules import SOLVERS
from tests.commands import tree
from tests.models import few_steps, only

pytestmark = [
    pytest.mark.timeout(600),  # the first test exports the model
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers"),
]


@pytest.fixture(scope="module")
def model(work: Path) -> Path:
    return work / "model"


@pytest.fixture(scope="module")
def bundle(work: Path) -> Bundle:
    return Bundle.load(work / "bundle")


FEW = (1, 2, 3, 25)
"""All step counts would take longer than all else here."""


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bundle]:
    """`export_bundle` with a few step counts only."""
    few_steps(monkeypatch, *FEW)
    return export_bundle


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Neither the folder's files nor its siblings are others afterwards."""
    before, siblings = tree(folder), sorted(folder.parent.iterdir())
    yield
    assert tree(folder) == before
    assert sorted(folder.parent.iterdir()) == siblings


def translate(monkeypatch: pytest.MonkeyPatch, operator: str, function: Callable[..., Any]) -> None:
    """Write one operation's ONNX in another way."""
    monkeypatch.setitem(TRANSLATIONS, getattr(torch.ops.reelrt, operator).default, function)


def test_a_bundle_is_what_its_manifest_says(bundle, model):
    assert list(bundle.stages) == ["text_encoder", "vae_decoder", "step"]
    assert (bundle.pipeline.solver, bundle.pipeline.guidance) == ("ddim", 7.5)
    assert bundle.pipeline.model.licence == "apache-2.0"
    assert bundle.pipeline.model.weight_bytes == sum(stage.weight_bytes for stage in bundle.stages.values())
    assert (bundle.folder / "README.md").read_bytes() == (model / "README.md").read_bytes()


def test_graphs_are_checked_onnx_with_the_spec_s_boundary_and_no_trace_of_this_machine(bundle):
    for stage in bundle.stages.values():
        path = bundle.folder / stage.file
        onnx.checker.check_model(str(path), full_check=True)
        graph = onnx.load(path, load_external_data=False)
        assert {(entry.domain, entry.version) for entry in graph.opset_import} == {("", 19)}
        assert [value.name for value in graph.graph.input] == list(stage.spec.inputs)
        assert [value.name for value in graph.graph.output] == list(stage.spec.outputs)
        for value in graph.graph.input:
            shape = value.type.tensor_type.shape.dim
            named = {index: dim.dim_param for index, dim in enumerate(shape) if dim.dim_param}
            assert named == stage.spec.inputs[value.name].dynamic
        text = path.read_bytes()
        assert str(Path(torch.__file__).parent).encode() not in text
        assert str(Path(exporter.__file__).parent).encode() not in text
        assert (bundle.folder / f"{stage.file}.data").stat().st_size >= 0.9 * stage.weight_bytes


@pytest.fixture(scope="module")
def again(bundle, model, tmp_path_factory):
    """What the command says of an export in this process over the old bundle: the card is another."""
    folder = tmp_path_factory.mktemp("again")
    copy, target = (Path(shutil.copytree(source, folder / source.name)) for source in (model, bundle.folder))
    words = ["export", str(copy), "-o", str(target), "--json"]
    assert json.loads(CliRunner().invoke(app, words).stdout)["up_to_date"] is True
    card = "---\nlicense: mit\ninference: {parameters: {guidance_scale: 3.5}}\n---\n"
    (copy / "README.md").write_text(card, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        only(patch, "text_encoder", "step")
        few_steps(patch, *FEW)
        return json.loads(CliRunner().invoke(app, words).stdout), Bundle.load(target)


def test_a_changed_model_card_is_exported_again(again):
    told, _ = again
    assert (told["up_to_date"], told["model"]["licence"], told["guidance"]) == (False, "mit", 3.5)


def test_another_process_exports_the_same(again, bundle, tmp_path):
    found = again[1].files
    for name in (
        "text_encoder.onnx",
        "text_encoder.onnx.data",
        "step.onnx",
        "step.onnx.data",
        "tokenizer.json",
    ):
        assert found[name] == bundle.files[name]
    bundle.schedules.save(tmp_path / "schedules")
    assert sha256(tmp_path / "schedules") == bundle.files["schedules.safetensors"]


def test_half_precision_halves_the_weights_and_batched_guidance_needs_no_row_for_it(
    export, bundle, model, tmp_path, monkeypatch
):
    only(monkeypatch, "step")
    half = export(model, tmp_path / "half", precision="fp16", cfg="batched")
    assert half.stages["step"].weight_bytes == pytest.approx(bundle.stages["step"].weight_bytes / 2, rel=0.02)
    assert half.stages["step"].precision == "fp16"
    assert half.pipeline.geometry.state_rows == bundle.pipeline.geometry.state_rows - 1
    graph = onnx.load(half.folder / "step.onnx", load_external_data=False).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    assert types["text"] == onnx.TensorProto.FLOAT16
    assert types["state"] == types["table"] == onnx.TensorProto.FLOAT


def test_every_solver_has_every_step_count(bundle):
    found = bundle.schedules
    assert found.solvers == tuple(SOLVERS)
    for solver in SOLVERS:
        assert [found.get(solver, steps).steps for steps in range(1, 101)] == list(range(1, 101))


def test_wrong_values_are_found_and_the_old_bundle_stays(export, bundle, model, monkeypatch):
    translate(monkeypatch, "project", lambda x, weight, bias=None: op.MatMul(x, weight))
    with (
        unchanged(bundle.folder),
        pytest.raises(ValidationError, match="text_encoder: text at batch 1 differs by"),
    ):
        export(model, bundle.folder)


def test_a_graph_that_mixes_up_the_batch_is_found_though_a_batch_of_one_is_right(
    export, bundle, model, monkeypatch
):
    def frames_first(x, sample):
        batch, frames = op.Shape(sample, start=0, end=1), op.Shape(sample, start=2, end=3)
        shape = op.Concat(frames, batch, op.Constant(value_ints=[x.shape[1], -1]), axis=0)
        return op.Transpose(op.Reshape(x, shape), perm=[1, 2, 0, 3])

    only(monkeypatch, "step")
    translate(monkeypatch, "to_volume", frames_first)
    sentence = "step: state_next at batch 3 x frames 2 x height 10 x width 14 x rows 5 differs by"
    with unchanged(bundle.folder), pytest.raises(ValidationError, match=sentence) as refused:
        export(model, bundle.folder)
    assert refused.value.measured > refused.value.allowed
    assert refused.value.exit_code == 3


@pytest.mark.parametrize("moment", [("schedules", 3), ("text_encoder", 2)], ids=str)
def test_ctrl_c_leaves_the_old_bundle_and_nothing_else(export, bundle, model, moment):
    def interrupt(what: str, done: int, total: int) -> None:
        if (what, done) == moment:
            raise KeyboardInterrupt

    with unchanged(bundle.folder), pytest.raises(KeyboardInterrupt):
        export(model, bundle.folder, progress=interrupt)


def test_a_full_disk_leaves_the_old_bundle_and_nothing_else(export, bundle, model, monkeypatch):
    monkeypatch.setattr(exporter, "SCHEDULES", "/dev/full")  # an absolute path takes over the folder's
    with unchanged(bundle.folder), pytest.raises(InputError, match="No space left on device"):
        export(model, bundle.folder)


def test_weights_that_cannot_be_written_leave_the_old_bundle_and_nothing_else(export, bundle, model):
    largest = max(path.stat().st_size for path in bundle.folder.glob("text_encoder*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, hard))
    try:
        with unchanged(bundle.folder), pytest.raises(InputError, match=f"cannot write {bundle.folder}"):
            export(model, bundle.folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def edit(path: Path, **changes: object) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**data, **changes}), encoding="utf-8")


def forget(path: Path, key: str) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    del data[key]
    path.write_text(json.dumps(data), encoding="utf-8")


def lose_a_weight(model: Path) -> None:
    path = model / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    weights.pop(next(name for name in weights if name.endswith("fc1.bias")))
    save_file(weights, path, metadata={"format": "pt"})


FAULTS = {
    "clipping scheduler": (
        lambda m: edit(m / "scheduler" / "scheduler_config.json", clip_sample=True),
        "DDIMScheduler with clip_sample=true is not linear",
    ),
    "unknown scheduler": (
        lambda m: edit(m / "model_index.json", scheduler=["diffusers", "PNDMScheduler"]),
        "scheduler PNDMScheduler cannot be compiled",
    ),
    "scheduler of the future": (
        lambda m: edit(m / "model_index.json", scheduler=["diffusers", "TomorrowScheduler"]),
        "this version of diffusers has no scheduler TomorrowScheduler",
    ),
    "no vocabulary": (
        lambda m: [path.write_bytes(b"") for path in (m / "tokenizer").iterdir()],
        "tokenizer cannot be loaded",
    ),
    "weight missing": (lose_a_weight, "text_encoder lacks weights for 1 of its parameters"),
    "weights of another size": (
        lambda m: edit(m / "text_encoder" / "config.json", intermediate_size=8),
        "text_encoder",
    ),
    "configuration without a size": (
        lambda m: forget(m / "unet" / "config.json", "in_channels"),
        "the config.json of unet or vae has no 'in_channels'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_cannot_be_exported_is_refused_and_nothing_is_written(export, fault, model, tmp_path):
    damage, sentence = FAULTS[fault]
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    damage(copy)
    with pytest.raises(ModelError, match=sentence) as refused:
        export(copy, tmp_path / "bundle")
    assert refused.value.exit_code == 3
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == [copy]
