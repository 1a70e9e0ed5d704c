"""Stage specs: shapes from sizes, dtypes from precisions, and JSON there and back."""

from __future__ import annotations

import json

import numpy as np
import pytest

from reelrt.bundle.spec import Geometry, Range, StageSpec, step_spec, text_encoder_spec, vae_decoder_spec
from reelrt.errors import RangeError

GEOMETRY = Geometry(
    latent_channels=4,
    spatial_scale=8,
    size_multiple=16,
    tokens=77,
    text_width=1024,
    state_rows=6,
    frames=16,
    height=384,
    width=384,
)
SIZES = {"batch": 2, "rows": 50, "frames": 3, "height": 6, "width": 10}


def test_shapes():
    step = step_spec(GEOMETRY)
    assert step.axes == ("batch", "frames", "height", "width", "rows")
    assert step.inputs["state"].shape(SIZES) == (2, 6, 4, 3, 6, 10)
    assert step.inputs["table"].shape(SIZES) == (2, 50, GEOMETRY.table_columns) == (2, 50, 45)
    assert step.inputs["text"].shape(SIZES) == (2, 2, 77, 1024)
    frames = vae_decoder_spec(GEOMETRY).outputs["frames"]
    assert frames.shape(SIZES) == (2, 3, 48, 80, 3)
    with pytest.raises(KeyError):
        frames.shape({"batch": 1})


def test_dtypes():
    text = text_encoder_spec(GEOMETRY).outputs["text"]
    assert text.numpy_dtype("fp16") == np.float16
    assert text.numpy_dtype("fp32") == np.float32
    assert step_spec(GEOMETRY).inputs["state"].numpy_dtype("fp16") == np.float32
    assert vae_decoder_spec(GEOMETRY).outputs["frames"].numpy_dtype("fp16") == np.uint8


def test_dynamic_dimensions():
    assert step_spec(GEOMETRY).inputs["state"].dynamic == {0: "batch", 3: "frames", 4: "height", 5: "width"}
    assert text_encoder_spec(GEOMETRY).inputs["tokens"].dynamic == {0: "batch"}


@pytest.mark.parametrize("make", [text_encoder_spec, step_spec, vae_decoder_spec])
def test_json_there_and_back(make):
    spec = make(GEOMETRY)
    assert StageSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_range_speaks_the_users_units():
    width = Range(4, 8, 12)
    for cells in (4, 12):
        width.check("width", cells, 8)
    with pytest.raises(RangeError, match="width 104 is not available: these engines take 32 to 96"):
        width.check("width", 13, 8)
    with pytest.raises(RangeError, match="frames 3 is not available: these engines take 16\\."):
        Range(16, 16, 16).check("frames", 3)
    with pytest.raises(RangeError, match="frames 3 is not available: a bundle that is run as it is") as error:
        Range(16, 16, 16).check("frames", 3, built=False)
    assert "ngines" not in str(error.value)
