"""A torch module to an ONNX file with its weights beside it. Knows no model."""

from __future__ import annotations

import errno
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reelrt.bundle.spec import StageSpec
from reelrt.export.operators import TRANSLATIONS

OPSET = 19
"""The newest that TensorRT 10.3 on JetPack 6.2 parses in full."""

TRACED = {"batch": 2, "rows": 3, "frames": 5, "height": 12, "width": 20}
"""The sizes a graph is traced with. None is 0 or 1, which torch would take for constants."""


def sample_inputs(
    spec: StageSpec, sizes: Mapping[str, int], precision: str, tokens: int, seed: int = 0
) -> dict[str, Tensor]:
    """Random inputs of a stage.

    Args:
        spec: The stage's boundary.
        sizes: Axis name to size.
        precision: Of the stage.
        tokens: Size of the vocabulary.
        seed: Of the values.

    Returns:
        Input name to tensor, normal but for token ids, counters (spread over the table's rows),
        timesteps (0 to 999) and the text column (0 or 1).
    """
    generator = torch.Generator().manual_seed(seed)

    inputs = {}
    for name, tensor in spec.inputs.items():
        shape = tensor.shape(sizes)
        if tensor.dtype == "int64":
            high = sizes["rows"] if name == "step" else tokens
            inputs[name] = torch.randint(high, shape, generator=generator)
            continue
        half = tensor.dtype == "model" and precision == "fp16"
        inputs[name] = torch.randn(shape, generator=generator).to(torch.float16 if half else torch.float32)
        if name == "table":
            inputs[name][..., 0] = torch.randint(1000, shape[:2], generator=generator)
            inputs[name][..., 2] = torch.randint(2, shape[:2], generator=generator)
    return inputs


def write_graph(
    module: nn.Module, inputs: Mapping[str, Tensor], spec: StageSpec, path: Path, notes: Mapping[str, str]
) -> int:
    """Export a module; weights go to `<path>.data` beside the graph, each once.

    Args:
        module: Its forward takes the spec's inputs in order and gives its outputs in order.
        inputs: As from `sample_inputs`.
        spec: Names and dynamic axes.
        path: The ONNX file to write.
        notes: Metadata to keep in the file.

    Returns:
        Bytes of the weights.

    Raises:
        OSError: The disk is full.
    """
    dynamic = tuple(dict(tensor.dynamic) for tensor in spec.inputs.values())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(spec.inputs),
            output_names=list(spec.outputs),
            dynamic_shapes=dynamic,
            custom_translation_table=TRANSLATIONS,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    graph = program.model
    _tidy(graph)
    graph.metadata_props.clear()
    graph.metadata_props.update(notes)
    weights = sum(
        value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value
    )
    program.save(path, external_data=True)
    _check_data(path)
    return weights


def _check_data(path: Path) -> None:
    """Numpy writes small arrays through a buffer of its own, and says nothing when the disk is full."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    size = path.with_name(f"{path.name}.data").stat().st_size
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if uses_external_data(tensor):
            place = ExternalDataInfo(tensor)
            if (place.offset or 0) + (place.length or 0) > size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _tidy(graph: Any) -> None:
    """Fold constants, merge equal nodes and weights, and forget where in Python each node was made.

    The exporter's own `optimize` also searches for some dozens of patterns that our graphs do not
    hold, which takes longer than everything else together.
    """
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer

    for _ in range(2):
        optimizer.fold_constants(graph)
        passes.RemoveUnusedNodesPass()(graph)
    for tidy in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=1024),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.IdentityEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.ClearMetadataAndDocStringPass(),
    ):
        tidy(graph)
