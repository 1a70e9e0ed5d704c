"""INT8 beside FP32 on a CPU: seconds of one pass of the network, alternating in one process.

    python -m benchmarks.int8_cpu FP32_BUNDLE INT8_BUNDLE

Both step graphs are opened by ONNX Runtime with the same number of threads and read the same inputs.
They take turns, and who goes first changes from round to round. Medians, and the range in which the
middle half lies. Says in a sentence when INT8 is slower. The load of the machine is recorded: run it
where nothing else runs. The last line on stdout is JSON; the exit code is 0 whatever comes out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine
from reelrt.bundle.manifest import Bundle
from reelrt.runtime.noise import starting_noise
from reelrt.runtime.ort import open_engine
from reelrt.runtime.request import Limits
from reelrt.runtime.unbuilt import as_engines

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "int8-cpu.json"


def feed(bundle: Bundle) -> dict[str, Any]:
    """Inputs of the first pass, at the model's own size."""
    limits = Limits(as_engines(bundle))
    geometry = bundle.pipeline.geometry
    shape = limits.latent_shape(None, None)
    table, sigma = limits.table(bundle.pipeline.solver, 25, bundle.pipeline.guidance)
    state = np.zeros((1, geometry.state_rows, *shape), np.float32)
    state[0, 0] = starting_noise(0, shape) * np.float32(sigma)
    text = np.random.default_rng(0).standard_normal((1, 2, geometry.tokens, geometry.text_width))
    return {
        "state": state,
        "table": table[None],
        "step": np.zeros(1, np.int64),
        "text": text.astype(np.float32),
    }


def measure(folders: dict[str, Path], threads: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each pass."""
    bundles = {name: Bundle.load(folder) for name, folder in folders.items()}
    sessions = {
        name: open_engine(bundle.folder / bundle.stages["step"].file, threads)
        for name, bundle in bundles.items()
    }
    inputs = feed(bundles["fp32"])
    seconds: dict[str, list[float]] = {name: [] for name in folders}
    for index in range(rounds + 2):  # the first two warm up
        names = list(sessions) if index % 2 else list(reversed(sessions))
        for name in names:
            began = time.perf_counter()
            sessions[name].run(["state_next"], inputs)
            if index >= 2:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def operators(folder: Path) -> dict[str, int]:
    """What ONNX Runtime makes of a step graph: operator to number of nodes, the most frequent ones."""
    import tempfile

    import onnx
    import onnxruntime as ort

    bundle = Bundle.load(folder, check=False)
    with tempfile.TemporaryDirectory() as scratch:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(scratch) / "step.onnx")
        source = str(bundle.folder / bundle.stages["step"].file)
        ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    return dict(Counter(node.op_type for node in graph.node).most_common(24))


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("fp32", type=Path)
    parser.add_argument("int8", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    folders = {"fp32": options.fp32, "int8": options.int8}
    load_before = os.getloadavg()[0]
    seconds = measure(folders, options.threads, options.rounds)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    ratio = medians["fp32"] / medians["int8"]
    sentence = (
        f"INT8 is {1 / ratio:.2f} times slower than FP32 on this CPU."
        if ratio < 1
        else f"INT8 is {ratio:.2f} times as fast as FP32 on this CPU."
    )
    result = {
        "machine": machine("numpy", "onnxruntime"),
        "model": Bundle.load(options.fp32, check=False).pipeline.model.name,
        "threads": options.threads,
        "rounds": options.rounds,
        "load_average": [load_before, os.getloadavg()[0]],
        "seconds_per_pass": {
            name: {
                "median": medians[name],
                "middle_half": [float(q) for q in np.percentile(each, (25, 75))],
                "fastest": min(each),
            }
            for name, each in seconds.items()
        },
        "fp32_over_int8": ratio,
        "fp32_over_int8_fastest": min(seconds["fp32"]) / min(seconds["int8"]),
        "sentence": sentence,
        "operators": {name: operators(folder) for name, folder in folders.items()},
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, each in seconds.items():
        print(f"{name}: {1e3 * medians[name]:.1f} ms a pass (fastest {1e3 * min(each):.1f} ms)")
    print(sentence)
    print(json.dumps({"fp32_over_int8": ratio, "load_average": result["load_average"]}))


if __name__ == "__main__":
    main()
