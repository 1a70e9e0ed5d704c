"""Builds an ONNX Runtime engine: the graph, rewritten and optimised ahead of time for this CPU.

The step of split guidance becomes two engines, see `reelrt.engines.text_free`. The optimised graph
holds the layouts and fusions that suit the machine it was made on, so it belongs to that machine;
its weights stand beside it. Knows nothing of profiles: ONNX Runtime takes any size.
"""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from reelrt.bundle.manifest import PREFIX
from reelrt.engines.recipe import Built, Job
from reelrt.errors import BackendError
from reelrt.progress import Progress

_EXTERNAL_BYTES = "1024"
_PROBE_BYTES = 1 << 20


def build(job: Job, graph: Path, progress: Progress) -> Built:
    """Optimise one graph and write it into the engine set.

    Args:
        job: What to build.
        graph: The ONNX file, in the job's precision.
        progress: Not told: ONNX Runtime does not say how far it is.

    Returns:
        Bytes of the weights; activations are not known before a session runs.

    Raises:
        BackendError: ONNX Runtime cannot load the graph.
        OSError: The result cannot be written.
    """
    del progress
    with tempfile.TemporaryDirectory(prefix=".reelrt-", dir=job.output.parent) as scratch:
        parts = _rewritten(job, graph, Path(scratch))
        return Built(
            weight_bytes=sum(_optimise(part, output, job.graph.name) for output, part in parts.items())
        )


def files(output: Path) -> list[Path]:
    """The graphs of a built engine: itself, and the part of a step that no prompt changes."""
    prefix = output.with_name(output.name + PREFIX)
    return [output, *([prefix] if prefix.exists() else [])]


def _rewritten(job: Job, path: Path, scratch: Path) -> dict[Path, Path]:
    """Rewrite a graph for the CPU; engine file to the graph that it is made of."""
    if job.precision == "fp16":  # on a CPU ONNX Runtime casts around each FP16 operator by itself
        return {job.output: path}
    import onnx_ir as ir
    from onnx_ir.passes import common

    from reelrt.engines.text_free import split
    from reelrt.engines.token_rows import MICROSOFT, rewrite

    try:
        model = ir.load(path)
    except Exception:  # noqa: BLE001 (no graph at all; ONNX Runtime says so in its own words)
        return {job.output: path}
    one_video = job.spec.name == "step" and job.cfg == "split"
    rewrite(model.graph, "batch" if one_video else None)
    model.opset_imports[MICROSOFT] = 1
    for tidy in (common.TopologicalSortPass(), common.RemoveUnusedNodesPass()):
        tidy(model)
    parts = split(model.graph) if one_video else None
    graphs = {job.output: model.graph}
    if parts is not None:
        graphs = {job.output: parts[1], job.output.with_name(job.output.name + PREFIX): parts[0]}
    written = {}
    for output, graph in graphs.items():
        written[output] = scratch / output.name
        part = ir.Model(graph, ir_version=model.ir_version)
        ir.save(part, written[output], external_data=f"{output.name}.data")
    return written


def _optimise(graph: Path, output: Path, name: str) -> int:
    """Let ONNX Runtime optimise a graph ahead of time; bytes of its weights."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(output)
    data = output.with_name(f"{output.name}.data")
    for key, value in (("file_name", data.name), ("min_size_in_bytes", _EXTERNAL_BYTES)):
        options.add_session_config_entry(f"session.optimized_model_external_initializers_{key}", value)
    # The weights are only written here, never multiplied: packing them would double the memory.
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class
        _probe(output, data)
        raise BackendError(f"ONNX Runtime cannot optimise {name}: {_sentence(error)}") from error
    _name(output)
    return _external_bytes(output, data) or output.stat().st_size


def _name(path: Path) -> None:
    """Name changes of layout by what they give: ONNX Runtime numbers them differently in each process."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "ReorderOutput":
            node.name = f"{node.op_type}_{node.output[0]}"
    path.write_bytes(model.SerializeToString())


def _external_bytes(graph: Path, data: Path) -> int:
    """Bytes of a graph's weights that stand beside it.

    Raises:
        OSError: They are not all there; older versions of ONNX Runtime say nothing when the disk is full.
    """
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    tensors = onnx.load(graph, load_external_data=False).graph.initializer
    places = [ExternalDataInfo(tensor) for tensor in tensors if uses_external_data(tensor)]
    end = max(((place.offset or 0) + (place.length or 0) for place in places), default=0)
    if end > (data.stat().st_size if data.exists() else 0):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(data))
    return end


def _probe(*files: Path) -> None:
    """Write a little to each file: ONNX Runtime does not say why a write failed, the system does.

    Raises:
        OSError: The disk is full, say.
    """
    for path in files:
        path.write_bytes(bytes(_PROBE_BYTES))


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:400]
