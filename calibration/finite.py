"""Which layer of a graph is the first to produce numbers that are not finite."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from reelrt.runtime.session import Array

AT_ONCE = 64
"""Tensors looked at in one run, which bounds the memory."""


def first_not_finite(path: Path, inputs: Mapping[str, Array]) -> str:
    """Name of the first node, in the graph's order, whose output is not finite; "unknown" if none is.

    Args:
        path: The ONNX graph, its weights inside or beside it.
        inputs: What it reads.
    """
    import onnx
    import onnxruntime as ort

    model = onnx.load(path)
    floats = {v.name for v in onnx.shape_inference.infer_shapes(model).graph.value_info if _is_float(v)}
    makers = {out: node.name or out for node in model.graph.node for out in node.output if out in floats}
    own = list(model.graph.output)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    names = list(makers)
    with TemporaryDirectory() as folder:
        for begin in range(0, len(names), AT_ONCE):
            part = names[begin : begin + AT_ONCE]
            del model.graph.output[:]
            model.graph.output.extend([*own, *(onnx.ValueInfoProto(name=name) for name in part)])
            probe = Path(folder) / "probe.onnx"
            onnx.save(model, probe, save_as_external_data=True, location=f"probe-{begin}.data")
            session = ort.InferenceSession(str(probe), options, providers=["CPUExecutionProvider"])
            onnx.load_external_data_for_model(model, folder)
            for name, values in zip(part, session.run(part, dict(inputs)), strict=True):
                if not np.isfinite(values).all():
                    return str(makers[name])
    return "unknown"


def _is_float(value: object) -> bool:
    return getattr(value, "type").tensor_type.elem_type in (1, 10)  # noqa: B009 (FLOAT, FLOAT16)
