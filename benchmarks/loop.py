"""What the CPU runtime costs: beside its own engine calls, beside diffusers, and to import.

    python -m benchmarks.loop                  everything; writes benchmarks/results/loop-cpu.json
    python -m benchmarks.loop --import-only    the imports alone, in a new environment; writes nothing

Three questions, each with its goal:

- Overhead: seconds in `generate` over the seconds in which ONNX Runtime's own run calls are running, at
  most 1.03.
- Speed: seconds of `diffusers.TextToVideoSDPipeline` over ours, at least 2. Same process, same number
  of threads, same weights in FP32, same prompts and starting latents, from prompt to pixels; whoever
  goes first in a pair may profit or suffer, so both orders are run and the worse ratio counts. How
  torch's threads wait for work decides how fast diffusers is on an idle machine, so it is measured
  both ways: awake, which is the default and keeps the cores busy between two operators, and asleep
  (`OMP_WAIT_POLICY=PASSIVE`), which leaves them to whoever else needs them.
- Import: `import reelrt.runtime` with all that `reelrt.load` needs, ONNX Runtime too, in an environment
  that holds the runtime's dependencies and nothing else, at most 0.3 s, and no torch.

Medians of several runs. Run it on a machine that does nothing else. The last line on stdout is JSON;
the exit code is 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.imports import measure_imports
from benchmarks.machine import machine
from benchmarks.operators import MULTIPLYING, profile_pass
from reelrt.jetson.device import detect
from reelrt.runtime.formats import Frames

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "loop-cpu.json"
LIBRARIES = ("numpy", "onnxruntime", "torch", "diffusers", "transformers")
OVERHEAD_GOAL, SPEED_GOAL, IMPORT_GOAL = 1.03, 2.0, 0.3
# How threads wait to what OMP_WAIT_POLICY says; torch reads it once, so each way is a process.
WAITING = {"awake": None, "asleep": "PASSIVE"}
ORDERS = {"reelrt first": ("reelrt", "diffusers"), "diffusers first": ("diffusers", "reelrt")}
PROMPTS = (
    "a red circle moving right on a black background",
    "a blue square growing on a gray background",
    "a green triangle moving up on a black background",
    "a white circle shrinking on a gray background",
    "a purple square moving down on a black background",
)


class Clock:
    """Seconds during which at least one engine is running, and the number of calls."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0
        self._running, self._since, self._lock = 0, 0.0, threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if not self._running:
                self._since = time.perf_counter()
            self._running += 1
            self.calls += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._running -= 1
            if not self._running:
                self.seconds += time.perf_counter() - self._since


class Timed:
    """An ONNX Runtime session whose run calls are timed."""

    def __init__(self, session: Any, clock: Clock) -> None:
        self._session, self._clock = session, clock
        self.io_binding = session.io_binding
        self.get_inputs, self.get_outputs = session.get_inputs, session.get_outputs

    def run(self, *arguments: Any) -> Any:
        """As the session's own."""
        with self._clock:
            return self._session.run(*arguments)

    def run_with_iobinding(self, binding: Any) -> None:
        """As the session's own."""
        with self._clock:
            self._session.run_with_iobinding(binding)


def make_engines(model: Path, folder: Path) -> Path:
    """Export a model in FP32 and build its engines for this CPU."""
    from reelrt.engines.builder import build_engines
    from reelrt.export.exporter import export_bundle

    bundle = export_bundle(model, folder / "bundle")
    return build_engines(bundle, folder / "engines", backend="onnxruntime").folder


@dataclass(frozen=True, slots=True)
class Rivals:
    """Both pipelines, ready to run.

    Attributes:
        calls: Name to `(prompt, seed, steps) -> uint8 frames [F, H, W, 3]`.
        clock: Times our engines.
        settings: What both were asked for.
    """

    calls: Mapping[str, Callable[[str, int, int], Frames]]
    clock: Clock
    settings: Mapping[str, Any]


def open_rivals(model: Path, folder: Path, threads: int) -> Rivals:
    """Open a diffusers folder and an engine set of it with the same number of CPU threads."""
    import torch
    from diffusers import TextToVideoSDPipeline

    from reelrt.bundle.manifest import EngineSet
    from reelrt.export.folder import open_folder
    from reelrt.runtime.ort import OrtSessions, open_engine
    from reelrt.runtime.pipeline import TextToVideo

    engines = EngineSet.load(folder)
    pipeline = engines.pipeline
    geometry = pipeline.geometry
    if pipeline.model.sha256 != open_folder(model).sha256():
        raise SystemExit(f"{folder} was not built from {model}.")
    clock = Clock()

    def open_timed(path: Path, count: int) -> Timed:
        return Timed(open_engine(path, count), clock)

    pipe = TextToVideo(engines, OrtSessions(engines, threads, open_timed))
    torch.set_num_threads(threads)
    reference = TextToVideoSDPipeline.from_pretrained(model)
    reference.set_progress_bar_config(disable=True)

    def ours(prompt: str, seed: int, steps: int) -> Frames:
        return pipe.generate(prompt, steps=steps, latents=pipe.starting_latents(seed)).frames

    def theirs(prompt: str, seed: int, steps: int) -> Frames:
        pixels = reference(
            prompt,
            negative_prompt="",
            num_inference_steps=steps,
            guidance_scale=pipeline.guidance,
            height=geometry.height,
            width=geometry.width,
            latents=torch.from_numpy(pipe.starting_latents(seed)),
            output_type="np",
        ).frames[0]
        frames: Frames = (pixels * 255).round().astype(np.uint8)
        return frames

    settings = {
        "model": pipeline.model.name,
        "model_sha256": pipeline.model.sha256,
        "solver": pipeline.solver,
        "guidance": pipeline.guidance,
        "cfg": pipeline.cfg,
        "frames": geometry.frames,
        "width": geometry.width,
        "height": geometry.height,
        "precision": engines.engines["step"].precision,
        "threads": threads,
    }
    return Rivals({"reelrt": ours, "diffusers": theirs}, clock, settings)


def measure_loop(rivals: Rivals, steps: int, repeats: int) -> dict[str, Any]:
    """Time both pipelines on the same requests, in pairs.

    Args:
        rivals: Both.
        steps: Denoising steps.
        repeats: Pairs in each order.

    Returns:
        Settings, seconds of every run, and how far apart the pixels are.
    """
    for call in rivals.calls.values():  # what is done once only is not asked here
        call(PROMPTS[0], 0, 2)
    runs: dict[str, Any] = {order: {f"{name}_seconds": [] for name in rivals.calls} for order in ORDERS}
    generate_seconds, engine_seconds, calls, difference = [], [], 0, 0
    for index in range(2 * repeats):
        order, prompt = tuple(ORDERS)[index % 2], PROMPTS[index % len(PROMPTS)]
        frames = {}
        for name in ORDERS[order]:
            inside, before = rivals.clock.seconds, rivals.clock.calls
            began = time.perf_counter()
            frames[name] = rivals.calls[name](prompt, 1 + index, steps)
            seconds = time.perf_counter() - began
            runs[order][f"{name}_seconds"].append(seconds)
            if name == "reelrt":
                generate_seconds.append(seconds)
                engine_seconds.append(rivals.clock.seconds - inside)
                calls = rivals.clock.calls - before
        apart = np.abs(frames["reelrt"].astype(int) - frames["diffusers"].astype(int))
        difference = max(difference, int(apart.max()))
    for each in runs.values():
        each["ratio"] = _median(each["diffusers_seconds"]) / _median(each["reelrt_seconds"])
    ratios = [total / inside for total, inside in zip(generate_seconds, engine_seconds, strict=True)]
    return {
        "settings": {**rivals.settings, "steps": steps, "pairs_per_order": repeats},
        "overhead": {
            "generate_seconds": generate_seconds,
            "engine_seconds": engine_seconds,
            "engine_calls": calls,
            "ratio": _median(ratios),
        },
        "diffusers": {**runs, "largest_pixel_difference": difference},
    }


def measure_waiting(model: Path, folder: Path, threads: int, steps: int, repeats: int) -> dict[str, Any]:
    """`measure_loop` in a process for each way in which threads wait.

    Returns:
        The settings, the overhead with the default way, and by the way of waiting how both compare.
    """
    found = {}
    for waiting, policy in WAITING.items():
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        if policy:
            environment["OMP_WAIT_POLICY"] = policy
        words = {"--model": model, "--engines": folder, "--threads": threads, "--steps": steps}
        options = [str(word) for pair in {**words, "--repeats": repeats}.items() for word in pair]
        command = [sys.executable, "-m", "benchmarks.loop", "--one", *options]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True, text=True
        )
        found[waiting] = json.loads(done.stdout.splitlines()[-1])
    first = next(iter(found.values()))
    return {**first, "diffusers": {waiting: each["diffusers"] for waiting, each in found.items()}}


def _median(values: list[float]) -> float:
    return statistics.median(values)


def goals(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Question to what was measured, what was wanted, and whether it was reached."""
    found: dict[str, dict[str, Any]] = {}
    if "overhead" in result:
        overhead = result["overhead"]["ratio"]
        found["generate over its engine calls"] = _goal(overhead, OVERHEAD_GOAL, overhead <= OVERHEAD_GOAL)
        for waiting, runs in result["diffusers"].items():
            speed = min(runs[order]["ratio"] for order in ORDERS)
            what = f"times faster than diffusers, threads wait {waiting}"
            found[what] = _goal(speed, SPEED_GOAL, speed >= SPEED_GOAL)
    told = result["imports"]["statements"].values()  # the slowest: an empty package imports at once
    seconds = max(each["seconds"] for each in told)
    light = seconds <= IMPORT_GOAL and not any(each["exporters_loaded"] for each in told)
    found["seconds to import reelrt.runtime with its backend"] = _goal(seconds, IMPORT_GOAL, light)
    return found


def _goal(measured: float, wanted: float, reached: bool) -> dict[str, Any]:
    return {"measured": measured, "goal": wanted, "reached": reached}


def show(result: dict[str, Any]) -> None:
    """Print the goals first, then what was measured."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    on = result["machine"]
    console.print(f"{on['cpu']}, {on['cores']} cores, Python {on['python']}")
    table = Table("goal", "wanted", "measured", "")
    for name, goal in result["goals"].items():
        reached = "reached" if goal["reached"] else "missed"
        table.add_row(name, f"{goal['goal']:g}", f"{goal['measured']:.3f}", reached)
    console.print(table)
    if "overhead" in result:
        settings = result["settings"]
        console.print(
            f"{settings['model']}: {settings['frames']} frames of {settings['width']}x{settings['height']}, "
            f"{settings['steps']} steps, {settings['threads']} threads, {settings['precision']}; medians"
        )
        table = Table("threads wait", "order", "reelrt, s", "diffusers, s", "times faster")
        for waiting, order in itertools.product(WAITING, ORDERS):
            runs = result["diffusers"][waiting][order]
            seconds = [_median(runs[f"{name}_seconds"]) for name in ("reelrt", "diffusers")]
            table.add_row(waiting, order, *(f"{each:.3f}" for each in seconds), f"{runs['ratio']:.2f}")
        console.print(table)
        inside = _median(result["overhead"]["engine_seconds"])
        apart = max(result["diffusers"][waiting]["largest_pixel_difference"] for waiting in WAITING)
        console.print(f"{inside:.3f} s inside engine calls; pixels differ by at most {apart} of 255")
        console.print(_about_a_pass(result["pass"]))
    table = Table("import", "seconds", "of the whole process", "the first time")
    for statement, told in result["imports"]["statements"].items():
        columns = (told["seconds"], told["process_seconds"], told["first_seconds"])
        table.add_row(statement, *(f"{each:.3f}" for each in columns))
    console.print(table)
    imports = result["imports"]
    console.print(f"{len(imports['packages'])} packages, {imports['size_bytes'] / 2**20:.0f} MiB installed")


def _about_a_pass(told: dict[str, Any]) -> str:
    """How much of a pass multiplies matrices, and how fast; the rest is what a runtime could save."""
    multiplying = [told["operators"][name] for name in MULTIPLYING if name in told["operators"]]
    flop, seconds = (sum(each[name] for each in multiplying) for name in ("flop", "seconds"))
    return (
        f"a pass of the network takes {1000 * told['seconds']:.1f} ms of one core; "
        f"{1000 * seconds:.1f} ms of it multiply matrices: {flop / 1e9:.2f} GFLOP at "
        f"{flop / seconds / 1e9:.0f} GFLOP/s"
    )


def main() -> None:
    """Measure, show, keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--import-only", action="store_true", help="measure the imports alone")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "moving-shapes")
    parser.add_argument("--engines", type=Path, help="an engine set of the model; made when none is given")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs in each order")
    parser.add_argument("--threads", type=int, default=detect().cpu_cores)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        rivals = open_rivals(options.model, options.engines, options.threads)
        print(json.dumps(measure_loop(rivals, options.steps, options.repeats)))
        return
    result: dict[str, Any] = {"benchmark": "loop-cpu", "machine": machine()}
    if not options.import_only:
        result["machine"] = machine(*LIBRARIES)
        with tempfile.TemporaryDirectory(prefix="reelrt-loop-") as scratch:
            folder = options.engines or make_engines(options.model, Path(scratch))
            asked = (options.threads, options.steps, options.repeats)
            result |= measure_waiting(options.model, folder.absolute(), *asked)
            result["pass"] = profile_pass(folder)
    result["imports"] = measure_imports(options.repeats)
    result["goals"] = goals(result)
    show(result)
    if not options.import_only:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    sys.exit(not all(goal["reached"] for goal in result["goals"].values()))


if __name__ == "__main__":
    main()
