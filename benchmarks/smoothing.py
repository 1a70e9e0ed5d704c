"""Whether SmoothQuant pays on the bundled model: the final latents' error with and without it.

    python -m benchmarks.smoothing

Goes on from `python -m benchmarks.sensitivity`, in the same folder and with the same trajectories. Each
product with a weight is smoothed and measured alone; then all of them together, and those together where
it paid alone. Keeps `benchmarks/results/int8-smoothing.json`; a run that was stopped goes on where it ended.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx

from benchmarks.machine import machine
from benchmarks.sensitivity import LIBRARIES, METHOD, PROMPTS, STEPS, WORK, Setting, prepare, show
from reelrt.calibration.layers import Layer, kept_by_default
from reelrt.calibration.qdq import Master
from reelrt.calibration.sensitivity import sweep
from reelrt.calibration.smoothing import Peaks, Smoothing, candidates, channel_peaks, write_smoothed

RESULT = Path(__file__).parent / "results" / "int8-smoothing.json"
ALPHA = 0.5
"""At which each layer is measured alone."""
OTHERS = (0.25, 0.75)
"""At which only all layers together are measured."""


def once(name: str, measure: Callable[[], float]) -> float:
    """An error that is measured, or what it was when it was measured before."""
    file = WORK / "smoothing-together.json"
    found: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if name not in found:
        found[name] = measure()
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found[name]


def even(setting: Setting, layers: list[Layer], peaks: Peaks, alpha: float) -> Master:
    """The step with every product smoothed, quantised; made once."""
    with TemporaryDirectory() as folder:
        graph = write_smoothed(setting.graph, Path(folder) / "step.onnx", layers, peaks, alpha)
        return setting.quantised(graph, WORK / f"smoothed-{alpha:g}.onnx")


def measured(setting: Setting, layers: list[Layer], peaks: Peaks, alpha: float) -> dict[str, Any]:
    """Each layer alone and several together, at one alpha."""
    plain = setting.quantised(setting.graph, WORK / "quantised.onnx")
    before = sweep(
        setting.bundle,
        setting.trajectories,
        plain,
        layers,
        WORK / "sensitivity.json",
        method=METHOD,
        progress=show,
    )
    smoothed = even(setting, layers, peaks, alpha)
    after = sweep(
        setting.bundle,
        setting.trajectories,
        smoothed,
        layers,
        WORK / f"smoothed-{alpha:g}.json",
        method=METHOD,
        progress=show,
    )
    found = Smoothing(alpha, before.errors, after.errors)
    rule = kept_by_default(setting.layers, setting.bundle.pipeline.model.family)
    with TemporaryDirectory() as folder:
        used = [layer for layer in layers if layer.name in found.used]
        graph = write_smoothed(setting.graph, Path(folder) / "step.onnx", used, peaks, alpha)
        chosen = setting.quantised(graph, WORK / f"chosen-{alpha:g}.onnx")
    return {
        **found.document(),
        "together": {
            "every layer smoothed": once(f"every {alpha:g}", lambda: setting.error(smoothed, rule)),
            "smoothed where it paid alone": once(f"paid {alpha:g}", lambda: setting.error(chosen, rule)),
        },
    }


def main() -> None:
    """Measure at each alpha, keep."""
    setting = prepare()
    graph = onnx.load(setting.graph, load_external_data=False).graph
    layers = candidates(graph, setting.layers)
    peaks = channel_peaks(setting.graph, layers, lambda: (sample.inputs for sample in setting.trajectories))
    plain = setting.quantised(setting.graph, WORK / "quantised.onnx")
    rule = kept_by_default(setting.layers, setting.bundle.pipeline.model.family)
    result: dict[str, Any] = {
        "model": setting.bundle.pipeline.model.name,
        "what": "relative error (RMS) of the final latents; a layer alone: one prompt, 4 steps; together: "
        f"{PROMPTS} prompts, {STEPS} steps, the family's default layers in FP32",
        "products": len(layers),
        "without": once("without", lambda: setting.error(plain, rule)),
        **measured(setting, layers, peaks, ALPHA),
        "machine": machine(*LIBRARIES),
    }
    for alpha in OTHERS:
        smoothed = even(setting, layers, peaks, alpha)
        result["together"][f"every layer smoothed, alpha {alpha:g}"] = once(
            f"every {alpha:g}", functools.partial(setting.error, smoothed, rule)
        )
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"without": result["without"], **result["together"]}))


if __name__ == "__main__":
    main()
