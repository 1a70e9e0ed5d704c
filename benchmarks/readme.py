"""Writes the README's table of figures from `benchmarks/results/`.

    python -m benchmarks.readme            write it
    python -m benchmarks.readme --check    only say whether it is as it should be

A row appears when its JSON file is there. Knows the files' names, and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
ACTIVATIONS = "int8-activations"
GIB, MIB = 1 << 30, 1 << 20

Row = tuple[str, str, str]


def loop(found: Mapping[str, Any]) -> list[Row]:
    """Rows of `loop-cpu.json`."""
    settings, overhead, imports = found["settings"], found["overhead"], found["imports"]
    rivals = {waiting: _rivals(runs) for waiting, runs in found["diffusers"].items()}
    (ours, awake, faster), (_, asleep, faster_asleep) = rivals["awake"], rivals["asleep"]
    video = f"{settings['frames']} frames of {settings['width']}×{settings['height']}"
    how = f"{settings['steps']} steps, {settings['precision'].upper()}"
    light = max(each["seconds"] for each in imports["statements"].values())
    packages, size = len(imports["packages"]), imports["size_bytes"] / MIB
    return [
        (
            f"A video of the bundled model: {video}, {how}",
            f"{ours:.2f} s; diffusers {awake:.2f} s, with threads that wait asleep {asleep:.2f} s",
            f"**{faster:.1f}×** faster, **{faster_asleep:.1f}×**{_least()}",
        ),
        (
            "`generate` beside the time inside its engine calls",
            f"{ours:.2f} s; {statistics.median(overhead['engine_seconds']):.2f} s",
            f"{overhead['ratio']:.3f}",
        ),
        (
            "Importing the runtime and its backend; what their environment holds",
            f"{light:.3f} s; {packages} packages, {size:.0f} MiB",
            "no torch",
        ),
    ]


def _least() -> str:
    """The bound that stands beside a speed, of `roofline-cpu.json`."""
    found = json.loads((RESULTS / "roofline-cpu.json").read_text(encoding="utf-8"))
    rate = found["flops_per_second"] * found["cores"] / 1e9
    work, least = found["flop"] / 1e9, found["least_seconds"]
    return (
        f"; [no FP32 runtime](benchmarks/results/roofline-cpu.json) below {least:.2f} s here: "
        f"{work:.0f} GFLOP at {rate:.0f} GFLOP/s"
    )


def _rivals(runs: Mapping[str, Any]) -> tuple[float, float, float]:
    """Median seconds of ours and of diffusers, and the worse ratio of both orders."""
    orders = [value for value in runs.values() if isinstance(value, dict)]
    ours, theirs = (
        statistics.median([each for order in orders for each in order[f"{name}_seconds"]])
        for name in ("reelrt", "diffusers")
    )
    return ours, theirs, min(order["ratio"] for order in orders)


def export_memory(found: Mapping[str, Any]) -> list[Row]:
    """The row of `export-memory.json`."""
    weights, peak = found["weight_bytes"] / GIB, found["peak_bytes"] / GIB
    what = f"Peak memory of exporting a model of ms-1.7b's size, {found['precision'].upper()}"
    return [(what, f"{peak:.1f} GiB; weights {weights:.1f} GiB", f"{peak / weights:.1f}× the weights")]


def adherence(found: Mapping[str, Any]) -> list[Row]:
    """The row of `adherence.json`, the bundled model's first run."""
    run = found["runs"][0]
    shares = [f"{name} {score['percent']:.0f} %" for name, score in run["scores"].items()]
    of = run["scores"]["color"]["of"]
    what = f"Videos of {of} prompts that show what was asked for, judged from their pixels"
    return [(what, ", ".join(shares[:-1]), f"all of it: {shares[-1].removeprefix('everything ')}")]


def memory(found: Mapping[str, Any]) -> list[Row]:
    """The row of `memory.json`."""
    peaks = found["peak_gb"]
    both = f"; INT8 activations too {peaks[ACTIVATIONS]:.2f} GB" if ACTIVATIONS in peaks else ""
    picture = f"{found['width']}×{found['height']}, {found['frames']} frames"
    return [
        (
            f"Peak GPU memory of a model of ms-1.7b's size, {picture}, RTX 3060: TensorRT-RTX's own "
            "figures and our buffers, one stage at a time, without a CUDA context; no GPU was there",
            f"FP16 {peaks['fp16']:.2f} GB; INT8 weights {peaks['int8']:.2f} GB{both}",
            f"wanted: {found['goal_gb']['fp16']:g} and {found['goal_gb']['int8']:g} GB",
        )
    ]


def quality(found: Mapping[str, Any]) -> list[Row]:
    """The row of `quality-int8.json` or `quality-fp16.json`: its first run."""
    run, precision = found["runs"][0], found["candidate"]["precision"].upper()
    emulated = " (emulated: each layer rounded, sums in FP32)" if "arithmetic" in found["candidate"] else ""
    points = {name: each["difference_points"] for name, each in run["adherence"].items()}
    worst = min((name for name in points if name != "everything"), key=lambda name: points[name])
    return [
        (
            f"Videos of the bundled model in {precision} against FP32{emulated}, "
            f"{found['settings']['prompts']} prompts, {run['steps']} steps",
            f"SSIM {run['ssim']['mean']:.4f}; adherence {points[worst]:+.1f} points at worst ({worst})",
            f"last latents {100 * run['latent_error']['last_step']['mean']:.2g} % apart",
        )
    ]


PARTS = {
    "loop-cpu": loop,
    "adherence": adherence,
    "memory": memory,
    "quality-int8": quality,
    "quality-fp16": quality,
    "export-memory": export_memory,
}
"""Name of a JSON file to what makes rows of it, in the order of the table."""


def block() -> str:
    """The text between the README's marks."""
    rows, machines = [], []
    for name, make in PARTS.items():
        path = RESULTS / f"{name}.json"
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            rows += [(*row, f"[{name}](benchmarks/results/{name}.json)") for row in make(found)]
            machines += [found["machine"]] if "machine" in found else []
    if not rows:
        return ""
    lines = ["| | measured | | figures |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    on = list(dict.fromkeys(f"{each['cpu']}, {each['cores']} cores" for each in machines))
    where = f"On a CPU: {'; '.join(on)}. Medians; " if on else ""
    return "\n".join([*lines, "", f"{where}[how it was measured](benchmarks/README.md)."])


def main() -> None:
    """Write the table, or check it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 when the table is out of date")
    options = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    wanted = f"{head}{BEGIN}\n{block()}\n{END}{rest.split(END)[1]}"
    if not options.check:
        README.write_text(wanted, encoding="utf-8")
    elif text != wanted:
        print("README.md is out of date: python -m benchmarks.readme", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
