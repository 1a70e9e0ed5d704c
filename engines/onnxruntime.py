"""Builds an ONNX Runtime engine: the graph, optimised ahead of time for this CPU.

The optimised graph holds the layouts and fusions that suit the machine it was made on, so it
belongs to that machine; its weights stand beside it. Knows nothing of profiles: ONNX Runtime takes
any size.
"""

from __future__ import annotations

from pathlib import Path

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
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(job.output)
    weights = f"{job.output.name}.data"
    for name, value in (("file_name", weights), ("min_size_in_bytes", _EXTERNAL_BYTES)):
        options.add_session_config_entry(f"session.optimized_model_external_initializers_{name}", value)
    # The weights are only written here, never multiplied: packing them would double the memory.
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class
        _probe(job.output, job.output.with_name(weights))
        raise BackendError(f"ONNX Runtime cannot optimise {job.graph.name}: {_sentence(error)}") from error
    data = job.output.with_name(weights)
    return Built(weight_bytes=data.stat().st_size if data.exists() else job.output.stat().st_size)


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
