"""What TensorRT itself says of a finished engine: every layer with its type and formats.

Deserialising an engine needs the GPU it was built for, so this is asked for only where there is one;
`reelrt.engines.verified` reads the same off the graph everywhere. Knows both TensorRTs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from reelrt.errors import BackendError

# What a format's description holds, the longer first: `BFloat16` holds `Float` too.
_TYPES: Mapping[str, str] = {
    "BFloat16": "bf16",
    "BF16": "bf16",
    "Float": "fp32",
    "FP32": "fp32",
    "Half": "fp16",
    "FP16": "fp16",
    "Int8": "int8",
    "INT8": "int8",
}


def inspect_engine(library: Any, logger: Any, engine: bytes) -> dict[str, dict[str, int]]:
    """Ask a finished engine which layers it has.

    Args:
        library: `tensorrt` or `tensorrt_rtx`.
        logger: A logger of that library.
        engine: The serialised engine, built with detailed profiling verbosity.

    Returns:
        Layer type to precision to number of layers.

    Raises:
        BackendError: The engine cannot be deserialised here.
    """
    runtime = library.Runtime(logger)
    opened = runtime.deserialize_cuda_engine(engine)
    if opened is None:
        raise BackendError(
            "the engine that was just built cannot be opened on this machine's GPU.",
            "Name the GPU it is for with --target, or update the driver.",
        )
    inspector = opened.create_engine_inspector()
    text = inspector.get_engine_information(library.LayerInformationFormat.JSON)
    return summarise(json.loads(text))


def summarise(information: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Count the layers of an inspector's document by type and by the precision of their first output."""
    found: dict[str, dict[str, int]] = {}
    for layer in information.get("Layers", []):
        if not isinstance(layer, Mapping):  # names alone: the engine was built without details
            continue
        precision = _precision(layer)
        kinds = found.setdefault(str(layer.get("LayerType", "unknown")), {})
        kinds[precision] = kinds.get(precision, 0) + 1
    return found


def _precision(layer: Mapping[str, Any]) -> str:
    """`fp16` of `Half` or of `Channel major FP16 format where channel % 8 == 0`."""
    outputs = layer.get("Outputs") or [{}]
    described = str(outputs[0].get("Format/Datatype") or outputs[0].get("Datatype") or "")
    return next((ours for theirs, ours in _TYPES.items() if theirs in described), described or "unknown")
