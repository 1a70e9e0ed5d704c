"""How much each layer of the bundled model loses in INT8, all of them, and what keeping some in FP32 gives.

    python -m benchmarks.sensitivity

Sweeps every layer as `reelrt calibrate --budget` does (some ten minutes on two cores), then measures the
final latents with several layers in INT8 together: all, the family's default, and cuts at budgets.
Everything lies in `build/sensitivity/`; a run that was stopped goes on where it ended. Keeps
`benchmarks/results/int8-sensitivity.json` and `.png`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx

from benchmarks.machine import machine
from reelrt.bundle.manifest import Bundle
from reelrt.calibration import qdq
from reelrt.calibration.int8 import quantise
from reelrt.calibration.layers import Layer, find_layers, kept_by_default
from reelrt.calibration.prompt_sets import default_prompts
from reelrt.calibration.ranges import Method
from reelrt.calibration.recording import record
from reelrt.calibration.sensitivity import final_latents, plot, relative_error, sweep
from reelrt.calibration.trajectories import Trajectories

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "build" / "bundle"
WORK = ROOT / "build" / "sensitivity"
RESULT = ROOT / "benchmarks" / "results" / "int8-sensitivity.json"
LIBRARIES = ("onnx", "onnxruntime", "nvidia-modelopt")
METHOD: Method = "percentile"
STEPS, SAMPLES, SEED = 25, 2, 0
"""As `reelrt calibrate` has them."""
BUDGETS = (0.03, 0.02, 0.01)
PROMPTS = 2
"""Prompts of which the final latents are compared, at the steps of the trajectories."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What every measurement starts from."""

    bundle: Bundle
    trajectories: Trajectories
    layers: Sequence[Layer]

    @property
    def graph(self) -> Path:
        """The FP32 step."""
        return self.bundle.folder / self.bundle.stages["step"].file

    def quantised(self, source: Path, kept: Path) -> qdq.Master:
        """A graph with every layer in INT8; made once."""
        if not kept.exists():
            nodes = [node for layer in self.layers for node in layer.nodes]
            feeds = lambda: (sample.inputs for sample in self.trajectories)  # noqa: E731
            onnx.save(quantise(source, nodes, feeds, len(self.trajectories), method=METHOD), kept)
        return qdq.Master(onnx.load(kept))

    def error(self, master: qdq.Master, without: Sequence[str]) -> float:
        """Of the final latents, all layers but some in INT8."""
        nodes = [node for layer in self.layers if layer.name not in without for node in layer.nodes]
        settings = self.trajectories.settings
        with TemporaryDirectory() as folder:
            graph = Path(folder) / "step.onnx"
            master.write(nodes, graph)
            found = final_latents(self.bundle, graph, self.trajectories, settings.steps, PROMPTS)
        return relative_error(found, [self.trajectories.latents(number) for number in range(PROMPTS)])


def prepare() -> Setting:
    """The bundled model's bundle and its trajectories.

    Raises:
        SystemExit: It has not been exported.
    """
    if not BUNDLE.exists():
        sys.exit(f"{BUNDLE} is missing: run `make engines` first.")
    bundle = Bundle.load(BUNDLE)
    prompts = default_prompts(bundle.pipeline.model.name)
    trajectories = record(
        BUNDLE, prompts, WORK / "trajectories", steps=STEPS, samples_per_prompt=SAMPLES, seed=SEED
    )
    graph = onnx.load(BUNDLE / bundle.stages["step"].file, load_external_data=False).graph
    return Setting(bundle, trajectories, find_layers(graph))


def show(what: str, done: int, total: int) -> None:
    """Progress in a log."""
    if done == total or not done % 20:
        print(f"{what} {done}/{total}", file=sys.stderr, flush=True)


def combined(setting: Setting, master: qdq.Master, without: Sequence[str]) -> Mapping[str, Any]:
    """Several layers together, those named in FP32."""
    return {"layers_fp32": len(without), "error": setting.error(master, without)}


def main() -> None:
    """Sweep, measure combinations, keep."""
    setting = prepare()
    master = setting.quantised(setting.graph, WORK / "quantised.onnx")
    able = [layer for layer in setting.layers if master.nodes.issuperset(layer.nodes)]
    found = sweep(
        setting.bundle,
        setting.trajectories,
        master,
        able,
        WORK / "sensitivity.json",
        method=METHOD,
        progress=show,
    )
    rule = kept_by_default(able, setting.bundle.pipeline.model.family)
    attention = [layer.name for layer in able if layer.kind == "attention"]
    sets = {
        "all in INT8": [],
        "default rule": rule,
        "default rule and attention": [*dict.fromkeys([*rule, *attention])],
        **{f"budget {budget:g}": found.kept(budget) for budget in BUDGETS},
    }
    result = {
        "model": setting.bundle.pipeline.model.name,
        **found.document(),
        "layers": len(setting.layers),
        "measured": len(found.errors),
        "not_measured": [layer.name for layer in setting.layers if layer.name not in found.errors],
        "prompt": list(setting.trajectories.settings.prompts[: found.prompts]),
        "range_samples": len(setting.trajectories),
        "combined": {
            "what": f"error of the final latents, {PROMPTS} prompts, {STEPS} steps",
            **{name: combined(setting, master, without) for name, without in sets.items()},
        },
        "machine": machine(*LIBRARIES),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(found, rule, RESULT.with_suffix(".png"))
    print(json.dumps({"layers": len(setting.layers), "measured": len(found.errors), **result["combined"]}))


if __name__ == "__main__":
    main()
