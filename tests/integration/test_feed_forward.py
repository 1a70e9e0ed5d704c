"""A wide feed-forward layer in pieces: the same values, for a part of the memory."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import onnxruntime as ort
import pytest
import torch
from diffusers import UNet3DConditionModel
from diffusers.models.attention import FeedForward as Original
from torch import nn

from reelrt.bundle.spec import Range, StageSpec, TensorSpec
from reelrt.engines.backends import installed
from reelrt.engines.recipe import Job
from reelrt.engines.worker import Worker
from reelrt.export.graph import TRACED, sample_inputs, write_graph
from reelrt.export.rewrites import FeedForward, LeanUNet3D, lean

WIDTH = 64
SPEC = StageSpec(
    "step",
    inputs={"x": TensorSpec("model", ("batch", "rows", WIDTH))},
    outputs={"y": TensorSpec("model", ("batch", "rows", WIDTH))},
    tolerance=1e-5,
)
PIECES = (1, 3, 8)


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    return Original(WIDTH, mult=4, activation_fn="geglu").eval()


@pytest.fixture(scope="module")
def graphs(original, tmp_path_factory):
    """(precision, pieces) to graph."""
    folder, found = tmp_path_factory.mktemp("feed_forward"), {}
    for precision, pieces in [*(("fp32", n) for n in PIECES), ("fp16", 1), ("fp16", 8)]:
        layer = lean(FeedForward(deepcopy(original)))
        layer.pieces = pieces
        path = folder / f"{precision}-{pieces}.onnx"
        module = layer.half() if precision == "fp16" else layer
        write_graph(module, sample_inputs(SPEC, TRACED, precision, 1), SPEC, path, {})
        found[precision, pieces] = path
    return found


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 2), (1, 7), (1, 9), (2, 8), (5, 13)])
def test_pieces_change_nothing_also_when_there_are_more_than_tokens(original, graphs, batch, tokens):
    x = np.random.default_rng(0).standard_normal((batch, tokens, WIDTH)).astype(np.float32)
    with torch.no_grad():
        wanted = original(torch.from_numpy(x)).numpy()
    for pieces in PIECES:
        session = ort.InferenceSession(str(graphs["fp32", pieces]), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"x": x})
        np.testing.assert_allclose(found, wanted, atol=1e-6, err_msg=f"{pieces} pieces")


@pytest.mark.skipif(not installed("tensorrt_rtx"), reason="tensorrt_rtx is not installed")
def test_tensorrt_holds_one_piece_at_a_time(graphs, tmp_path):
    """Without the zero between them it holds all of them at once, and more than without pieces."""
    profile = {"batch": Range(1, 16, 16), "rows": Range(1, 4096, 4096)}
    activations = {}
    for pieces in (1, 8):
        job = Job(
            "tensorrt_rtx",
            SPEC,
            graphs["fp16", pieces],
            "fp16",
            tmp_path / "ff.engine",
            "fp16",
            profile,
            "8.6",
        )
        with Worker() as worker:
            activations[pieces] = worker.build(job).activation_bytes
    assert activations[8] < 0.5 * activations[1]


def pieces_of(module: nn.Module) -> set[int]:
    return {layer.pieces for layer in module.modules() if isinstance(layer, FeedForward)}


def test_a_large_model_has_pieces_where_there_are_many_cells():
    with torch.device("meta"):
        network = LeanUNet3D(UNet3DConditionModel(cross_attention_dim=1024, attention_head_dim=64))
    assert pieces_of(network.transformer_in) == {13}
    assert [pieces_of(block) for block in network.down] == [{8}, {4}, {2}, set()]
    assert [pieces_of(block) for block in network.up] == [set(), {2}, {4}, {8}]
    assert pieces_of(network.middle) == {1}


def test_a_small_model_has_none():
    with torch.device("meta"):
        unet = UNet3DConditionModel(
            down_block_types=("CrossAttnDownBlock3D",) * 2,
            up_block_types=("CrossAttnUpBlock3D",) * 2,
            block_out_channels=(64, 128),
            layers_per_block=1,
            cross_attention_dim=128,
            attention_head_dim=16,
        )
        assert pieces_of(LeanUNet3D(unet)) == {1}
