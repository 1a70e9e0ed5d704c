"""Peak host memory of an export at ms-1.7b size, against 1.5 times the weights plus 2 GiB.

    python -m benchmarks.export_memory

Writes a diffusers folder of random FP16 weights to `build/`, exports it in a process of its own
with every stage validated, and asks the kernel for that process's peak resident set size (`wait4`),
which counts mapped files too. The last line on stdout is JSON; a run at full size also writes it to
`benchmarks/results/export-memory.json`. Exit code 1 when the limit is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from reelrt.export.exporter import Precision, export_bundle
from reelrt.runtime.memory import peak_memory

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "export-memory"
RESULT = ROOT / "benchmarks" / "results" / "export-memory.json"
LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")
GIB = 1 << 30
FACTOR, SLACK = 1.5, 2 * GIB
HEAD = 64
NOISE = 1 << 23


def write_model(folder: Path, scale: float) -> None:
    """Write the model: ms-1.7b's configuration, its channels times `scale`, its weights random."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from models.moving_shapes import make_tokenizer

    def channels(*full: int) -> tuple[int, ...]:
        return tuple(max(HEAD, round(number * scale / HEAD) * HEAD) for number in full)

    text_width, text_inner = channels(1024, 4096)
    text = CLIPTextConfig(
        hidden_size=text_width,
        intermediate_size=text_inner,
        num_hidden_layers=23,
        num_attention_heads=text_width // HEAD,
        hidden_act="gelu",
        projection_dim=512,
    )
    with torch.device("meta"):
        unet = UNet3DConditionModel(
            block_out_channels=channels(320, 640, 1280, 1280),
            cross_attention_dim=text_width,
            attention_head_dim=HEAD,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=channels(128, 256, 512, 512),
            layers_per_block=2,
            sample_size=256,
        )
        encoder = CLIPTextModel(text)
    for module in (unet, vae, encoder):
        _randomise(module.half().to_empty(device="cpu"))
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = TextToVideoSDPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=make_tokenizer(folder / "tokenizer"),
        unet=unet,
        scheduler=scheduler,
    )
    pipeline.save_pretrained(folder)


def _randomise(module: Any) -> None:
    """Normal weights that keep a signal's size, out of one block of noise: 1.7 G draws take minutes."""
    import torch

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(NOISE, generator=generator).half()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(1 if name.endswith("weight") else 0)
                continue
            scale = parameter[0].numel() ** -0.5
            for piece in parameter.view(-1).split(NOISE // 2):
                start = int(torch.randint(NOISE // 2, (1,), generator=generator))
                torch.mul(noise[start : start + len(piece)], scale, out=piece)


def export(model: Path, bundle: Path, precision: Precision) -> None:
    """Export, validate, and print as JSON each stage's weights and the process's peak when it ended."""
    peaks: dict[str, int] = {}

    def progress(what: str, done: int, total: int) -> None:
        if done == total:
            peaks[what] = peak_memory()

    made = export_bundle(model, bundle, precision=precision, progress=progress)
    stages = {
        name: {"weight_bytes": stage.weight_bytes, "peak_bytes": peaks[name]}
        for name, stage in made.stages.items()
    }
    print(json.dumps(stages))


def worker(*words: object, module: str = "benchmarks.export_memory") -> tuple[str, int, float]:
    """Run a benchmark's other half in a process of its own.

    This process stays small: a child's peak starts from its parent's.

    Args:
        words: Of its command line.
        module: The benchmark.

    Returns:
        The last line it prints, its peak resident set size in bytes, and seconds.
    """
    began = time.perf_counter()
    command = [sys.executable, "-m", module, *map(str, words)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    return lines[-1] if lines else "", usage.ru_maxrss * 1024, time.perf_counter() - began


def measure(scale: float, precision: str) -> dict[str, Any]:
    """Make the model, export it, and put the figures together."""
    shutil.rmtree(WORK, ignore_errors=True)
    try:
        worker("--write", "--scale", scale)
        line, peak, seconds = worker("--export", "--precision", precision)
    finally:
        shutil.rmtree(WORK, ignore_errors=True)
    stages = json.loads(line)
    weights = sum(stage["weight_bytes"] for stage in stages.values())
    return {
        "benchmark": "export_memory",
        "scale": scale,
        "precision": precision,
        "weight_bytes": weights,
        "peak_bytes": peak,
        "limit_bytes": int(FACTOR * weights + SLACK),
        "seconds": round(seconds, 1),
        "stages": stages,
        "measured_by": "ru_maxrss of the exporting process, from wait4; mapped files included",
        "machine": machine(*LIBRARIES),
    }


def show(result: dict[str, Any]) -> None:
    """Print the limit, then what was measured."""
    console = Console()
    limit, peak = result["limit_bytes"], result["peak_bytes"]
    console.print(f"Limit: {FACTOR} x weights + {SLACK / GIB:.0f} GiB = {limit / GIB:.2f} GiB")
    table = Table("stage", "weights, GiB", "peak when it ended, GiB")
    for name, stage in result["stages"].items():
        table.add_row(name, f"{stage['weight_bytes'] / GIB:.2f}", f"{stage['peak_bytes'] / GIB:.2f}")
    table.add_row("export", f"{result['weight_bytes'] / GIB:.2f}", f"{peak / GIB:.2f}")
    console.print(table)
    console.print(f"{result['seconds']} s on {result['machine']['cpu']}, {result['machine']['cores']} cores")
    console.print(f"Peak is {peak / limit:.0%} of the limit.")


def main() -> None:
    """Measure; or be the process that is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on every width, for a quick try")
    parser.add_argument("--precision", choices=("fp16", "fp32"), default="fp16")
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--export", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write_model(WORK / "model", options.scale)
    elif options.export:
        export(WORK / "model", WORK / "bundle", options.precision)
    else:
        result = measure(options.scale, options.precision)
        show(result)
        if options.scale == 1:
            RESULT.parent.mkdir(parents=True, exist_ok=True)
            RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(result))
        sys.exit(result["peak_bytes"] > result["limit_bytes"])


if __name__ == "__main__":
    main()
