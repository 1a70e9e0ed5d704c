"""The least time that a video of the bundled model can take on this CPU: its multiplications at full speed.

    python -m benchmarks.roofline

The rate is the best of many large FP32 matrix products by ONNX Runtime, one thread, times the cores; what is
multiplied in a pass stands in `results/loop-cpu.json`. Other work, memory, the text encoder and the decoder
are not counted, so no runtime in FP32 is faster on these cores. Keeps `results/roofline-cpu.json`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from benchmarks.machine import machine

RESULTS = Path(__file__).parent / "results"
SIDES, ROUNDS = (512, 768, 1024), 60


def best_rate(side: int, rounds: int = ROUNDS) -> float:
    """The most operations per second that one core reached in a product of two square matrices."""
    value = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [side, side]) for name in ("a", "b", "c")
    }
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["c"])], "product", [value["a"], value["b"]], [value["c"]]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {name: np.random.default_rng(0).standard_normal((side, side), np.float32) for name in ("a", "b")}
    least = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        session.run(None, feed)
        least = min(least, time.perf_counter() - began)
    return 2 * side**3 / least


def bound(loop: dict[str, Any], rate: float, cores: int) -> dict[str, float]:
    """The least seconds of a video's denoising, and what they are made of."""
    settings, parts = loop["settings"], loop["pass"]["flop_by_part"]
    steps = settings["steps"]
    passes = steps * (2 if settings["guidance"] != 1 else 1)
    flop = parts.get("prefix", 0.0) * steps + parts["step"] * passes  # both passes of a step share the prefix
    return {
        "flop_per_pass": sum(parts.values()),
        "passes": passes,
        "flop": flop,
        "least_seconds": flop / (rate * cores),
    }


def main() -> None:
    """Measure the rate, work the bound out, keep both."""
    loop = json.loads((RESULTS / "loop-cpu.json").read_text(encoding="utf-8"))
    rates = {str(side): best_rate(side) for side in SIDES}
    inside = [each["flop"] / each["seconds"] for each in loop["pass"]["operators"].values() if "flop" in each]
    rate = max(*rates.values(), *inside)
    cores = loop["settings"]["threads"]
    result = {
        "benchmark": "roofline",
        "what": "multiplications of all passes of a video over the best FP32 rate of a core, times the cores",
        "settings": loop["settings"],
        "flops_per_second_by_side": rates,
        "best_flops_per_second_in_a_pass": max(inside),
        "flops_per_second": rate,
        "cores": cores,
        **bound(loop, rate, cores),
        "machine": machine("onnxruntime"),
    }
    (RESULTS / "roofline-cpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: result[name] for name in ("flops_per_second", "passes", "least_seconds")}))


if __name__ == "__main__":
    main()
