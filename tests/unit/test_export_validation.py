"""A graph is compared with the model by names, shapes and values, at shapes it was not traced with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import parser
from torch import nn

from reelrt.bundle.schedule import Schedule
from reelrt.bundle.spec import StageSpec, TensorSpec
from reelrt.errors import ModelError, ValidationError
from reelrt.export.graph import TRACED, sample_inputs
from reelrt.export.validation import (
    SHAPES,
    Advance,
    check,
    check_advance,
    open_session,
    record,
)

VOLUME = TensorSpec("model", ("batch", 2, "frames"))
SPEC = StageSpec("twice", inputs={"x": VOLUME}, outputs={"y": VOLUME}, tolerance=1e-4)
TWICE = (
    "twice (float[batch, 2, frames] x) => (float[batch, 2, frames] y) <float two = {2}> { y = Mul (x, two) }"
)


class Twice(nn.Module):
    """What the graphs here should do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def write(text: str, folder: Path) -> Path:
    model = onnx.helper.make_model(
        parser.parse_graph(text), opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9
    )
    onnx.save(model, folder / "graph.onnx")
    return folder / "graph.onnx"


def validate(text: str, folder: Path, spec: StageSpec = SPEC, precision: str = "fp32") -> None:
    cases = record(Twice(), spec, precision, tokens=10)
    check(open_session(write(text, folder)), spec, precision, cases)


def test_no_shape_is_the_traced_one_along_any_axis():
    assert len(SHAPES) == 4
    for sizes in SHAPES:
        assert sizes.keys() == TRACED.keys()
        assert all(sizes[axis] != TRACED[axis] for axis in sizes)


def test_a_right_graph_passes(tmp_path):
    validate(TWICE, tmp_path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            TWICE.replace("{2}", "{2.001}"),
            "twice: y at batch 1 x frames 1 differs by 5.00e-04; at most 1.00e-04",
        ),
        (
            TWICE.replace("{2}", "{-2}"),
            "twice: y at batch 1 x frames 1 differs by",
        ),
        # Right at one frame, wrong at two.
        (
            "twice (float[batch, 2, frames] x) => (float[batch, 2, frames] y)"
            "<float two = {2}, int64[1] last = {-1}>"
            "{ sum = CumSum (x, last) y = Mul (sum, two) }",
            "twice: y at batch 3 x frames 2 differs by",
        ),
    ],
    ids=["a little", "much", "by shape"],
)
def test_wrong_values_are_named_with_shape_and_figures(text, sentence, tmp_path):
    with pytest.raises(ValidationError, match=sentence) as refused:
        validate(text, tmp_path)
    assert refused.value.measured > refused.value.allowed


def test_no_number_is_no_agreement(tmp_path):
    text = TWICE.replace("y = Mul (x, two)", "zero = Sub (x, x) gone = Div (zero, zero) y = Add (gone, two)")
    with pytest.raises(ValidationError, match="differs by nan"):
        validate(text, tmp_path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (TWICE.replace(" x)", " z)").replace("(x,", "(z,"), "twice has the inputs z, not x"),
        (TWICE.replace(" y)", " z)").replace("y =", "z ="), "twice has the outputs z, not y"),
        (
            "twice (float[batch, 2, frames] x) => (float[a, b] y) <float two = {2}>"
            "{ flat = Flatten (x) y = Mul (flat, two) }",
            r"twice: y at batch 1 x frames 1 is float32 \[1, 2\], not float32 \[1, 2, 1\]",
        ),
        (
            "twice (float[batch, 2, frames] x) => (double[batch, 2, frames] y) <double two = {2}>"
            "{ wide = Cast <to = 11> (x) y = Mul (wide, two) }",
            "twice: y at batch 1 x frames 1 is float64",
        ),
        # A traced number of frames, in the graph for good.
        (
            "twice (float[batch, 2, frames] x) => (float[batch, 2, frames] y)"
            "<float two = {2}, int64[3] traced = {-1, 2, 5}>"
            "{ again = Reshape (x, traced) y = Mul (again, two) }",
            "twice does not run at batch 1 x frames 1: .*Reshape",
        ),
    ],
    ids=["input name", "output name", "shape", "dtype", "traced size"],
)
def test_another_boundary_is_named(text, sentence, tmp_path):
    with pytest.raises(ModelError, match=sentence):
        validate(text, tmp_path)


SEVEN = """
seven (float[batch, 2, frames] x) => (uint8[batch, 2, frames] y) <float number = {7}>
{ zero = Sub (x, x) numbers = Add (zero, number) y = Cast <to = 2> (numbers) }
"""


def test_pixels_may_differ_by_what_the_spec_says(tmp_path):
    class Seven(nn.Module):
        def forward(self, x):
            return torch.full(x.shape, 7, dtype=torch.uint8)

    pixels = TensorSpec("uint8", ("batch", 2, "frames"))
    spec = replace(SPEC, outputs={"y": pixels}, tolerance=1)
    cases = record(Seven(), spec, "fp32", tokens=10)
    for value in (6, 7, 8):
        path = write(SEVEN.replace("{7}", f"{{{value}}}"), tmp_path)
        check(open_session(path), spec, "fp32", cases)
    with pytest.raises(ValidationError, match=r"differs by 2.00e\+00; at most 1.00e\+00"):
        check(open_session(write(SEVEN.replace("{7}", "{9}"), tmp_path)), spec, "fp32", cases)


def test_a_model_in_half_precision_answers_in_float32_arithmetic_and_keeps_its_weights():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 300).half(), nn.Linear(300, 6).half()

        def forward(self, x):
            return self.second(self.first(x)).transpose(1, 2)

    torch.manual_seed(0)
    model = Halves()
    wide = Halves().float()
    wide.load_state_dict(model.state_dict())
    spec = replace(SPEC, inputs={"x": TensorSpec("model", ("batch", "frames", 6))})
    for case in record(model, spec, "fp16", tokens=10):
        with torch.no_grad():
            expected = wide(torch.from_numpy(case.inputs["x"]).float()).half()
        assert np.array_equal(case.expected["y"], expected.numpy())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert all(torch.equal(wide.state_dict()[name], x.float()) for name, x in model.state_dict().items())


def test_a_file_that_is_no_graph_is_one_sentence(tmp_path):
    (tmp_path / "graph.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError, match=r"graph.onnx does not load in ONNX Runtime: ") as refused:
        open_session(tmp_path / "graph.onnx")
    assert "\n" not in str(refused.value)


def test_inputs_are_the_same_for_a_seed_and_in_range():
    spec = StageSpec(
        "step",
        inputs={
            "table": TensorSpec("float32", ("batch", "rows", 15)),
            "step": TensorSpec("int64", ("batch",)),
            "tokens": TensorSpec("int64", ("batch", 7)),
            "text": TensorSpec("model", ("batch", 2, 7, 4)),
        },
        outputs={},
        tolerance=0,
    )
    one, two, other = (sample_inputs(spec, TRACED, "fp16", 100, seed) for seed in (1, 1, 2))
    for name, tensor in spec.inputs.items():
        assert tuple(one[name].shape) == tensor.shape(TRACED)
        assert torch.equal(one[name], two[name])
        assert not torch.equal(one[name], other[name])
    assert one["text"].dtype == torch.float16
    assert set(one["step"].tolist()) <= set(range(TRACED["rows"]))
    assert 0 <= one["tokens"].min() <= one["tokens"].max() < 100
    assert set(one["table"][..., 2].flatten().tolist()) <= {0.0, 1.0}


# A step graph whose network always says 1, so that what a table makes of it is known.
STEP = """
step (float[batch, 2, 1, frames, height, width] state, float[batch, rows, 9] table, int64[batch] step,
      float[batch, 2, 3, 4] text)
  => (float[batch, 2, 1, frames, height, width] state_next, int64[batch] step_next)
<float one = {1}, int64[1] count = {1}>
{ state_next = Add (state, one) step_next = Add (step, count) }
"""


def test_a_whole_table_must_end_where_diffusers_ends(tmp_path):
    latents = ("frames", "height", "width")
    state = TensorSpec("float32", ("batch", 2, 1, *latents))
    spec = StageSpec(
        "step",
        inputs={
            "state": state,
            "table": TensorSpec("float32", ("batch", "rows", 9)),
            "step": TensorSpec("int64", ("batch",)),
            "text": TensorSpec("model", ("batch", 2, 3, 4)),
        },
        outputs={"state_next": state, "step_next": TensorSpec("int64", ("batch",))},
        tolerance=1e-4,
    )
    ones = np.ones((3, 1))
    schedule = Schedule("ddim", ones[:, 0], ones[:, 0], ones, ones, 1.0)
    start, text = np.zeros((1, 1, 2, 8, 8), np.float32), np.zeros((1, 2, 3, 4), np.float32)
    right = Advance(schedule, 7.5, start, text, expected=start + 6)  # split guidance: two launches a step
    session = open_session(write(STEP, tmp_path))
    check_advance(session, spec, "fp32", "split", right)
    with pytest.raises(ValidationError, match="step: latents after 3 steps of ddim differs by 1.43e-01"):
        check_advance(session, spec, "fp32", "split", replace(right, expected=start + 7))
    stuck = open_session(write(STEP.replace("count = {1}", "count = {0}"), tmp_path))
    with pytest.raises(ValidationError, match="step: step_next after a whole table"):
        check_advance(stuck, spec, "fp32", "split", right)
