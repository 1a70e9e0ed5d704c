"""Where one pass of a step engine spends its time on a CPU: ONNX Runtime's own profile, by operator.

Knows nothing of requests: the inputs are random numbers of the right shapes.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from reelrt.bundle.manifest import PREFIX, EngineSet

WARM_UP, PASSES = 3, 30
MULTIPLYING = ("MatMul", "FusedMatMul", "Gemm", "Conv")


def profile_pass(folder: Path) -> dict[str, Any]:
    """Profile one pass of the network on one thread, at the model's own size.

    An engine in two parts is profiled as both; two passes of a guided step share the first.

    Args:
        folder: An ONNX Runtime engine set.

    Returns:
        Median seconds of a pass without the profiler; by operator its calls, seconds and, where it
        multiplies matrices, floating-point operations.
    """
    engines = EngineSet.load(folder)
    engine, geometry = engines.engines["step"], engines.pipeline.geometry
    scale = geometry.spatial_scale
    sizes = {"batch": 1, "rows": 2, "frames": geometry.frames}
    sizes.update(height=geometry.height // scale, width=geometry.width // scale)
    rng = np.random.default_rng(0)
    feed = {
        name: np.zeros(tensor.shape(sizes), np.int64)
        if tensor.dtype == "int64"
        else rng.normal(size=tensor.shape(sizes)).astype(tensor.numpy_dtype(engine.precision))
        for name, tensor in engine.spec.inputs.items()
    }
    path = folder / engine.file
    prefix = path.with_name(path.name + PREFIX)
    parts = {name: each for name, each in (("prefix", prefix), ("step", path)) if each.exists()}
    seconds: dict[str, float] = {}
    flop: dict[str, float] = {}
    found: dict[str, dict[str, float]] = {}
    for name, each in parts.items():
        seconds[name], outputs, measured = _profile(each, feed)
        feed |= outputs
        flop[name] = sum(about.get("flop", 0.0) for about in measured.values())
        for operator, about in measured.items():
            entry = found.setdefault(operator, dict.fromkeys(about, 0.0))
            for key, value in about.items():
                entry[key] += value
    return {
        "seconds": sum(seconds.values()),
        "seconds_by_part": seconds,
        "flop_by_part": flop,
        "operators": dict(sorted(found.items(), key=lambda each: -each[1]["seconds"])),
    }


def _profile(path: Path, feed: dict[str, Any]) -> tuple[float, dict[str, Any], dict[str, dict[str, float]]]:
    """Median seconds of one part, what it computes, and its operators."""
    plain = _open(path)
    taken = {value.name: feed[value.name] for value in plain.get_inputs()}
    names = [value.name for value in plain.get_outputs()]
    seconds, outputs = [], []
    for _ in range(WARM_UP + PASSES):
        began = time.perf_counter()
        outputs = plain.run(names, taken)
        seconds.append(time.perf_counter() - began)
    with tempfile.TemporaryDirectory(prefix="reelrt-profile-") as scratch:
        watched = _open(path, f"{scratch}/pass")
        for _ in range(WARM_UP + PASSES):
            watched.run(names, taken)
        events = json.loads(Path(watched.end_profiling()).read_text(encoding="utf-8"))
    return statistics.median(seconds[WARM_UP:]), dict(zip(names, outputs, strict=True)), _by_operator(events)


def _open(path: Path, profile: str = "") -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _by_operator(events: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over all passes, the operator that takes most first."""
    kernels = [each for each in events if each["name"].endswith("_kernel_time") and each["cat"] == "Node"]
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    flops: Counter[str] = Counter()
    passes = WARM_UP + PASSES
    for event in kernels:
        name, about = event["args"]["op_name"], event["args"]
        seconds[name] += event["dur"] / 1e6 / passes
        calls[name] += 1
        if name in MULTIPLYING:
            flops[name] += _flops(name, about["input_type_shape"], about["output_type_shape"])
    return {
        name: {
            "calls": calls[name] / passes,
            "seconds": spent,
            **({"flop": flops[name] / passes} if name in flops else {}),
        }
        for name, spent in seconds.most_common()
    }


def _flops(name: str, inputs: list[dict[str, list[int]]], outputs: list[dict[str, list[int]]]) -> int:
    """Twice the multiplications of a matrix product or a convolution."""
    shapes = [next(iter(shape.values())) for shape in inputs]  # without weights that were packed
    result = next(iter(outputs[0].values()))
    depth = math.prod(shapes[1][1:]) if name == "Conv" else shapes[0][-1]
    return 2 * math.prod(result) * depth
