"""Peak GPU memory of an ms-1.7b-size model on an RTX 3060: 832×480, 16 frames, FP16 and INT8.

    python -m benchmarks.memory

Writes a diffusers folder of random weights, exports it, makes INT8 weights of the FP16 ones, and
builds every stage with TensorRT-RTX for compute capability 8.6; no GPU is needed. The figures are
the builder's own (Total Weights Memory, Total Activation Memory) and the sizes of the runtime's
buffers, for one video, split guidance and one stage resident at a time. What a CUDA context takes
by itself is not in them. INT8 activations come from an FP32 export, calibrated at a small size. Each
piece of work is a process of its own, whose peak host memory the kernel says (`wait4`); the load average
beside it says whether anything else ran.

Everything lies in `build/memory/`, and a second run goes on where the first one ended. The last
line on stdout is JSON; at full size it is also kept in `benchmarks/results/memory.json`, with a
plot beside it. Exit code 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.export_memory import ROOT, worker, write_model
from benchmarks.machine import machine
from reelrt.bundle.manifest import Bundle
from reelrt.bundle.spec import Profile, Range, StageSpec
from reelrt.engines import profiles
from reelrt.engines.recipe import Job
from reelrt.export.exporter import Precision

WORK = ROOT / "build" / "memory"
RESULT = ROOT / "benchmarks" / "results" / "memory.json"
PLOT = ROOT / "docs" / "images" / "memory.png"
LIBRARIES = ("torch", "diffusers", "onnx", "onnxruntime", "tensorrt_rtx", "polygraphy")
WIDTH, HEIGHT, FRAMES = 832, 480, 16
CAPABILITY = "8.6"
ACTIVATIONS = "int8-activations"
PRECISIONS = ("fp16", "int8", ACTIVATIONS)
GOAL_GB = {"fp16": 4.2, "int8": 2.8}
MISSION_GB = {"fp16": 6.2, "int8": 4.8}
HOST_GIB, HOST_SECONDS = 16, 15 * 60
RANGE_SIZE, RANGE_FRAMES, RANGE_PROMPTS, RANGE_STEPS = 64, 4, 8, 4
"""Pixels each way, frames, prompts and solver steps of the trajectories that INT8's ranges come from."""
DECODER_CHUNKS = (4, 2, 1)
"""Frames per call of the decoder: the most that needs no more than the denoiser."""
GB, GIB = 1e9, 2**30

Record = dict[str, Any]


def stage_profile(bundle: Bundle, stage: str, chunk: int) -> Profile:
    """The sizes a stage's engine accepts."""
    ranges = dict(profiles.profiles(bundle.pipeline.geometry, WIDTH, HEIGHT, FRAMES, batch=1)[stage])
    if stage == "vae_decoder":
        ranges["frames"] = Range(1, chunk, chunk)
    return ranges


def buffer_bytes(spec: StageSpec, profile: Profile) -> int:
    """The runtime's own memory while a stage runs: its inputs and outputs at their largest.

    The step's state and counter are an input and an output, so both sides of them are counted; the
    decoder's chunk comes out of the latents of the whole video.
    """
    sizes = {axis: extent.max for axis, extent in profile.items()}
    tensors = [*spec.inputs.values(), *spec.outputs.values()]
    total = sum(int(np.prod(t.shape(sizes))) * t.numpy_dtype("fp16").itemsize for t in tensors)
    if spec.name == "vae_decoder":
        whole = {**sizes, "frames": FRAMES}
        total += int(np.prod(spec.inputs["latents"].shape(whole))) * 4
    return total


def export(folder: Path, precision: Precision, validate: bool) -> None:
    from reelrt.export.exporter import export_bundle

    target = folder / ("bundle" if precision == "fp16" else "bundle-fp32")
    made = export_bundle(folder / "model", target, precision=precision, validate=validate)
    weights = {name: stage.weight_bytes for name, stage in made.stages.items()}
    print(json.dumps({"validated": validate, "weight_bytes": weights}))


def quantize(folder: Path) -> None:
    from reelrt.engines.weight_only import quantize_weights

    bundle = Bundle.load(folder / "bundle", check=False)
    for stage in bundle.stages.values():
        quantize_weights(bundle.folder / stage.file, folder / f"int8-{stage.file}", stage.spec)
    print("{}")


def calibrate(folder: Path) -> None:
    """INT8 weights and activations, their ranges found at a small size."""
    from reelrt.calibration.bundles import calibrate_int8
    from reelrt.calibration.prompt_sets import default_prompts
    from reelrt.calibration.recording import record

    source = folder / "bundle-fp32"
    trajectories = record(
        source,
        default_prompts("ms-1.7b")[:RANGE_PROMPTS],
        folder / "trajectories",
        steps=RANGE_STEPS,
        samples_per_prompt=1,
        size=(RANGE_SIZE, RANGE_SIZE),
        frames=RANGE_FRAMES,
    )
    made = calibrate_int8(
        Bundle.load(source, check=False), trajectories, folder / "bundle-int8", fp16_error=None
    )
    kept = made.report["layers"]
    found = {
        "samples": len(trajectories),
        "size": RANGE_SIZE,
        "frames": RANGE_FRAMES,
        "nodes": made.report["nodes"],
        "layers_int8": kept["quantised"],
        "layers_kept": len(kept["kept_fp32"]),
        "precisions": {name: stage.precision for name, stage in made.bundle.stages.items()},
    }
    print(json.dumps(found))


def _bundle(folder: Path, precision: str) -> Bundle:
    return Bundle.load(folder / ("bundle-int8" if precision == ACTIVATIONS else "bundle"), check=False)


def _graph(folder: Path, precision: str, bundle: Bundle, stage: str) -> tuple[Path, str]:
    """A stage's graph, and what it is to the builder."""
    entry = bundle.stages[stage]
    if precision == "int8":  # weights of the FP16 graph alone
        return folder / f"int8-{entry.file}", "fp16"
    return bundle.folder / entry.file, entry.precision


def build(folder: Path, precision: str, stage: str, chunk: int) -> None:
    from reelrt.engines.worker import Worker

    bundle = _bundle(folder, precision)
    entry = bundle.stages[stage]
    graph, given = _graph(folder, precision, bundle, stage)
    wanted = "int8" if given == "int8" else "fp16"
    profile = stage_profile(bundle, stage, chunk)
    output = folder / f"{precision}-{stage}.engine"
    with Worker() as worker:
        job = Job("tensorrt_rtx", entry.spec, graph, given, output, wanted, profile, CAPABILITY)
        built = worker.build(job)
    buffers = buffer_bytes(entry.spec, profile)
    figures = {
        "weight_bytes": built.weight_bytes,
        "activation_bytes": built.activation_bytes,
        "buffer_bytes": buffers,
        "peak_bytes": built.weight_bytes + built.activation_bytes + buffers,
        "engine_bytes": output.stat().st_size,
    }
    print(json.dumps(figures | ({"frames_per_call": chunk} if stage == "vae_decoder" else {})))


def once(folder: Path, what: str, *words: object) -> Record:
    """A piece of work in a process of its own, or what it said when it was done before.

    Returns:
        The JSON it printed, with `seconds` and `host_peak_bytes`.
    """
    record = folder / f"{what.replace(' ', '-')}.json"
    if not record.exists():
        print(f"{what} ...", file=sys.stderr, flush=True)
        line, peak, seconds = worker(*words, "--folder", folder, module="benchmarks.memory")
        data = {**json.loads(line or "{}"), "seconds": round(seconds, 1), "host_peak_bytes": peak}
        data["load_average"] = round(os.getloadavg()[2], 1)
        record.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    data = json.loads(record.read_text(encoding="utf-8"))
    print(
        f"{what}: {data['seconds']} s, {data['host_peak_bytes'] / GIB:.2f} GiB of host memory",
        file=sys.stderr,
    )
    return dict(data)


def stages(folder: Path, precision: str) -> dict[str, Record]:
    """Build the three stages; the decoder with as many frames per call as fit below the denoiser."""
    built = {
        stage: once(folder, f"build {precision} {stage}", "--build", precision, stage)
        for stage in ("text_encoder", "step")
    }
    for chunk in DECODER_CHUNKS:
        what = f"build {precision} vae_decoder {chunk}"
        built["vae_decoder"] = once(folder, what, "--build", precision, "vae_decoder", "--chunk", chunk)
        if built["vae_decoder"]["peak_bytes"] <= built["step"]["peak_bytes"]:
            break
    return built


def measure(scale: float, folder: Path, validate: bool) -> Record:
    """Do what is not done yet, and put the figures together."""
    folder.mkdir(parents=True, exist_ok=True)
    once(folder, "model", "--write", scale)
    unvalidated = [] if validate else ["--unvalidated"]
    exported = once(folder, "export", "--export", "fp16", *unvalidated)
    exported_fp32 = once(folder, "export fp32", "--export", "fp32", "--unvalidated")
    calibrated = once(folder, "int8 calibration", "--calibrate")
    quantized = once(folder, "int8 weights", "--quantize")
    built = {precision: stages(folder, precision) for precision in PRECISIONS}
    peaks = {name: max(stage["peak_bytes"] for stage in each.values()) for name, each in built.items()}
    host = {
        "export": exported,
        "export fp32": exported_fp32,
        "int8 weights": quantized,
        "int8 calibration": calibrated,
    }
    host |= {
        f"build {name}": {
            "seconds": round(sum(stage["seconds"] for stage in each.values()), 1),
            "host_peak_bytes": max(stage["host_peak_bytes"] for stage in each.values()),
        }
        for name, each in built.items()
    }
    result = {
        "benchmark": "memory",
        "scale": scale,
        "width": WIDTH,
        "height": HEIGHT,
        "frames": FRAMES,
        "compute_capability": CAPABILITY,
        "peak_gb": {name: round(peak / GB, 3) for name, peak in peaks.items()},
        "peak_gib": {name: round(peak / GIB, 3) for name, peak in peaks.items()},
        "goal_gb": GOAL_GB,
        "mission_gb": MISSION_GB,
        "stages": built,
        "host": host,
        "host_goal": {"peak_bytes": HOST_GIB * GIB, "seconds": HOST_SECONDS},
        "measured_by": "TensorRT-RTX builder's weights and activations, and the runtime's buffers; "
        "no CUDA context. Host: ru_maxrss of each process and its children, from wait4",
        "machine": machine(*LIBRARIES),
    }
    return {**result, "missed": missed(result)}


def missed(result: Mapping[str, Any]) -> list[str]:
    """The goals that are not met."""
    found = [
        f"{name}: {result['peak_gb'][name]:.2f} GB, goal {goal} GB"
        for name, goal in GOAL_GB.items()
        if result["peak_gb"][name] > goal
    ]
    for what, figures in result["host"].items():
        if figures["host_peak_bytes"] > HOST_GIB * GIB:
            found.append(f"{what}: {figures['host_peak_bytes'] / GIB:.1f} GiB, goal {HOST_GIB} GiB")
        if figures["seconds"] > HOST_SECONDS:
            found.append(f"{what}: {figures['seconds']:.0f} s, goal {HOST_SECONDS} s")
    return found


def show(result: Mapping[str, Any]) -> None:
    """Print the goals, then what was measured."""
    console = Console(width=110)
    goals = ", ".join(f"{name} {goal} GB" for name, goal in GOAL_GB.items())
    console.print(f"Goals for {WIDTH}×{HEIGHT}×{FRAMES} on compute capability {CAPABILITY}: {goals}")
    table = Table("", "stage", "weights, GB", "activations, GB", "buffers, GB", "peak, GB", "peak, GiB")
    for precision, each in result["stages"].items():
        for name, stage in each.items():
            kinds = ("weight_bytes", "activation_bytes", "buffer_bytes", "peak_bytes")
            figures = [f"{stage[kind] / GB:.3f}" for kind in kinds]
            chunk = f", {stage['frames_per_call']} frames" if "frames_per_call" in stage else ""
            table.add_row(precision, name + chunk, *figures, f"{stage['peak_bytes'] / GIB:.3f}")
    console.print(table)
    host = Table("work", "seconds", "host memory, GiB")
    for what, figures in result["host"].items():
        host.add_row(what, f"{figures['seconds']:.0f}", f"{figures['host_peak_bytes'] / GIB:.2f}")
    console.print(host)
    console.print("A CUDA context's own memory comes on top.")
    for line in result["missed"]:
        console.print(f"Missed: {line}")


def plot(result: Mapping[str, Any], path: Path) -> None:
    """A bar per stage and precision, stacked by what takes the memory, and the goals as lines."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    bars = [(precision, name) for precision in PRECISIONS for name in result["stages"][precision]]
    left = np.zeros(len(bars))
    kinds = {"weight_bytes": "weights", "activation_bytes": "activations", "buffer_bytes": "buffers"}
    for (kind, label), color in zip(kinds.items(), ("#4477aa", "#ee6677", "#ccbb44"), strict=True):
        values = np.array([result["stages"][precision][name][kind] / GB for precision, name in bars])
        axes.barh(np.arange(len(bars)), values, left=left, label=label, color=color)
        left += values
    for precision, goal in GOAL_GB.items():
        place = 3 * PRECISIONS.index(precision) - 0.5
        axes.vlines(goal, place, place + 3, color="black", linestyle="--", linewidth=1)
        axes.text(goal + 0.03, place + 0.2, f"goal {goal} GB", va="top", fontsize=8)
    axes.set_yticks(np.arange(len(bars)), [f"{p.upper()} {n.replace('_', ' ')}" for p, n in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, max(*GOAL_GB.values(), *left) * 1.18)
    axes.set_xlabel(f"GB resident, {WIDTH}×{HEIGHT}×{FRAMES}, ms-1.7b size, TensorRT-RTX for RTX 3060")
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure; or be one of the processes that are measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on every width, for a quick try")
    parser.add_argument("--fresh", action="store_true", help="do everything again")
    parser.add_argument("--unvalidated", action="store_true", help="do not compare the export with the model")
    parser.add_argument("--write", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--export", choices=("fp16", "fp32"), help=argparse.SUPPRESS)
    parser.add_argument("--calibrate", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--quantize", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--build", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--chunk", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write is not None:
        write_model(options.folder / "model", options.write)
    elif options.export:
        export(options.folder, options.export, not options.unvalidated)
    elif options.calibrate:
        calibrate(options.folder)
    elif options.quantize:
        quantize(options.folder)
    elif options.build:
        precision, stage = options.build
        build(options.folder, precision, stage, options.chunk)
    else:
        folder = WORK / f"scale-{options.scale:g}"
        if options.fresh:
            shutil.rmtree(folder, ignore_errors=True)
        result = measure(options.scale, folder, not options.unvalidated)
        show(result)
        full = options.scale == 1
        plot(result, PLOT if full else folder / "memory.png")
        if full:
            RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(result))
        sys.exit(bool(result["missed"]))


if __name__ == "__main__":
    main()
