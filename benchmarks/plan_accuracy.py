"""How far the memory plan's estimate is from TensorRT-RTX's builder, for each stage and size.

    python -m benchmarks.plan_accuracy                                  the bundled model
    python -m benchmarks.plan_accuracy --scale 0.5 --size 576x320x16    random weights, ms-1.7b's shape
    python -m benchmarks.plan_accuracy --bundle build/ms --size 576x320x16x2
    python -m benchmarks.plan_accuracy --built                          what make bench-memory built

Exports the model where no bundle is given, builds FP16 engines for an RTX 3060 without a GPU at each
size (width, height, frames and, if more than one, videos at once) and compares activations and
weights with the estimate that `reelrt plan` makes from the ONNX graphs alone. With `--built` nothing
is built: the graphs lie in `build/memory`, and the builder's figures for FP16 and INT8 weights are
those in `benchmarks/results/memory.json`. Activations count; 15 % is the goal. The last line on
stdout is JSON. `benchmarks/results/plan-accuracy.json` keeps the latest run of each model. Exit
code 1 when a stage is further off.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import memory
from benchmarks.export_memory import write_model
from benchmarks.machine import machine
from reelrt.bundle.manifest import Bundle
from reelrt.engines.builder import build_engines
from reelrt.engines.graph_cost import Cost
from reelrt.engines.memory import Planner
from reelrt.export.exporter import export_bundle
from reelrt.jetson.targets import find

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "plan-accuracy"
RESULT = ROOT / "benchmarks" / "results" / "plan-accuracy.json"
SHIPPED = ROOT / "models" / "moving-shapes"
TARGET, PRECISION = "rtx3060", "fp16"
GOAL = 0.15
SIZES = ("64x64x16", "128x128x16", "256x256x8")


def bundle_of(options: argparse.Namespace) -> tuple[str, Path]:
    """The model's name in the results, and its bundle; exported if there is none yet."""
    if options.bundle:
        return options.name or options.bundle.name, options.bundle
    name = options.name or (f"ms-1.7b x {options.scale:g}" if options.scale else SHIPPED.name)
    folder = WORK / name.replace(" ", "")
    if options.scale and not (folder / "model").exists():
        write_model(folder / "model", options.scale)
    if not (folder / "bundle").exists():
        source = folder / "model" if options.scale else SHIPPED
        export_bundle(source, folder / "bundle", precision="fp16" if options.scale else "fp32")
    return name, folder / "bundle"


def measure(name: str, bundle: Path, size: str) -> list[dict[str, Any]]:
    """Build one engine set and compare each of its stages with the estimate."""
    width, height, frames, *more = (int(part) for part in size.split("x"))
    engines = build_engines(
        bundle,
        WORK / f"{name.replace(' ', '')}-{size}",
        backend="tensorrt_rtx",
        target=TARGET,
        precision=PRECISION,
        size=(width, height),
        frames=frames,
        batch=more[0] if more else 1,
        check_memory=False,  # what does not fit the card can still be compared
    )
    planner = Planner(Bundle.load(bundle), find(TARGET))
    rows = []
    for stage, engine in engines.engines.items():
        sizes = {axis: extent.max for axis, extent in engine.profile.items()}
        cost = planner.cost(stage, PRECISION, sizes)
        built = {"activation_bytes": engine.activation_bytes, "weight_bytes": engine.weight_bytes}
        rows.append({"size": size, "stage": stage, "precision": PRECISION, "axes": sizes} | off(cost, built))
    return rows


def compare_built(folder: Path) -> list[dict[str, Any]]:
    """Compare the estimates for the graphs of `benchmarks.memory` with what its builds reported."""
    bundle = Bundle.load(folder, check=False)  # memory.py built from these files; hashing them takes a while
    planner = Planner(bundle, find(TARGET))
    kept = json.loads(memory.RESULT.read_text(encoding="utf-8"))
    size = f"{kept['width']}x{kept['height']}x{kept['frames']}"
    rows = []
    for name, stages in kept["stages"].items():
        precision = {"int8": "int8-weights"}.get(name, name)
        for stage, built in stages.items():
            profile = memory.stage_profile(bundle, stage, built.get("frames_per_call", 1))
            sizes = {axis: extent.max for axis, extent in profile.items()}
            found = off(planner.cost(stage, precision, sizes), built)
            row = {"size": size, "stage": stage, "precision": precision, "axes": sizes}
            rows.append(row | found | {"builder_from": memory.RESULT.name})
    return rows


def off(cost: Cost, built: Mapping[str, int]) -> dict[str, Any]:
    """An estimate, the builder's figures and how far apart they are."""
    figures = ("activation_bytes", "weight_bytes")
    return {
        **{each: {"builder": built[each], "estimate": getattr(cost, each)} for each in figures},
        "activations_off": round(cost.activation_bytes / built["activation_bytes"] - 1, 4),
        "weights_off": round(cost.weight_bytes / built["weight_bytes"] - 1, 4),
        "tflop": round(cost.flops / 1e12, 4),
    }


def show(name: str, rows: list[dict[str, Any]]) -> None:
    """Print the goal, then what was measured."""
    console = Console(width=120)
    console.print(f"{name}: activations within {GOAL:.0%} of what the builder reports")
    table = Table(
        "size", "stage", "precision", "builder, MiB", "estimate, MiB", "off", "weights off", "TFLOP a launch"
    )
    for row in rows:
        activations = row["activation_bytes"]
        built, estimate = (f"{activations[key] / 2**20:,.1f}" for key in ("builder", "estimate"))
        off, weights = f"{row['activations_off']:+.1%}", f"{row['weights_off']:+.1%}"
        table.add_row(
            row["size"], row["stage"], row["precision"], built, estimate, off, weights, f"{row['tflop']:.3f}"
        )
    console.print(table)


def main() -> None:
    """Measure one model and keep the result beside those of the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="a bundle that is there already")
    parser.add_argument("--scale", type=float, default=0, help="random weights; factor on ms-1.7b's widths")
    parser.add_argument("--name", help="the model's name in the results")
    parser.add_argument("--size", action="append", help="WIDTHxHEIGHTxFRAMES[xVIDEOS]; may be repeated")
    parser.add_argument(
        "--built", action="store_true", help="take the builder's figures of make bench-memory"
    )
    options = parser.parse_args()
    if options.built:
        name, bundle = options.name or "ms-1.7b", options.bundle or memory.WORK / "scale-1" / "bundle"
        rows = compare_built(bundle)
    else:
        name, bundle = bundle_of(options)
        rows = [row for size in options.size or SIZES for row in measure(name, bundle, size)]
    show(name, rows)
    kept = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    result = {
        "benchmark": "plan_accuracy",
        "goal": GOAL,
        "target": TARGET,
        "models": {**kept.get("models", {}), name: rows},
        "machine": machine("tensorrt_rtx", "onnx", "torch", "diffusers"),
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({"model": name, "rows": rows}))
    sys.exit(any(abs(row["activations_off"]) > GOAL for row in rows))


if __name__ == "__main__":
    main()
