"""What a TensorRT session costs on this machine's GPU, and beside diffusers on the same GPU and weights.

    python -m benchmarks.gpu ENGINES [--bundle BUNDLE] [--board rtx3060-laptop-6gb] [--model DIFFUSERS_FOLDER]

Times by CUDA events: each stage; each launch of the step with and without captured graphs; the share of the
loop in which the GPU waits for the host. With the bundle that the engines were built from, also the share of
the roofline that step and decoder reach (the board is the engines' target's, or a named one), and the same
loop by ONNX Runtime's CUDA provider where there is one, which is also what is measured when the library
refuses the GPU. With `--model`, whole videos of the same latents by ours, by
diffusers eager and by diffusers with `torch.compile`, medians of alternating runs. The last line on
stdout is JSON; it is also written to `benchmarks/results/gpu-DEVICE.json`. Where there is no GPU, or
the library refuses it, the JSON holds the reason; without any GPU nothing is written. Exit code 1 when the
GPU idles more than is allowed.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from reelrt.bundle.manifest import Bundle, Engine
from reelrt.engines.memory import Planner, Video
from reelrt.engines.roofline import bounds
from reelrt.errors import ReelError
from reelrt.jetson.boards import Board, boards
from reelrt.jetson.device import detect
from reelrt.jetson.targets import Target, find
from reelrt.runtime.cuda import Event
from reelrt.runtime.loop import Request, StepLoop
from reelrt.runtime.ort import CUDA
from reelrt.runtime.pipeline import TextToVideo, load
from reelrt.runtime.trt import TrtSessions
from reelrt.runtime.unbuilt import open_pipeline

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("onnxruntime", "cuda-bindings", "cuda-core")
IDLE_ALLOWED = 0.02
PROMPT = "a red circle moving right on a black background"
REPEATS = 20


def measure(pipe: TextToVideo, steps: int) -> dict[str, Any]:
    """Time the stages and the step loop of an opened GPU engine set.

    Args:
        pipe: The pipeline, loaded.
        steps: Denoising steps of the loop.
    """
    sessions = pipe._sessions  # noqa: SLF001 # a measurement looks inside
    assert isinstance(sessions, TrtSessions)
    engines = pipe.engines.engines
    stages = {name: _stage(sessions, engines[name], name) for name in ("text_encoder", "vae_decoder")}
    with_graphs = _loop(pipe, sessions, steps, graphs=True)
    return {
        "stage_milliseconds": stages,
        "graphs": with_graphs,
        "plain": _loop(pipe, sessions, steps, graphs=False),
        "memory_bytes": {
            "planned": sessions.memory().plan.total,
            "peak": sessions.memory().peak,
            "engines": sessions.memory().engines,
        },
    }


def _stage(sessions: TrtSessions, engine: Engine, name: str) -> float:
    """Median milliseconds of a stage at its tuned size, copies of its inputs and outputs included."""
    sizes = {axis: extent.opt for axis, extent in engine.profile.items()}
    feed = {
        each: np.zeros(tensor.shape(sizes), tensor.numpy_dtype(engine.precision))
        for each, tensor in engine.spec.inputs.items()
    }
    begin, end = Event(sessions.device, timed=True), Event(sessions.device, timed=True)
    times = []
    for _ in range(REPEATS + 2):
        with sessions.device.current():
            sessions.stream.record(begin)
        sessions.run(name, feed)
        with sessions.device.current():
            sessions.stream.record(end)
            end.wait()
        times.append(end.elapsed(begin))
    return statistics.median(times[2:])


def _loop(pipe: TextToVideo, sessions: TrtSessions, steps: int, graphs: bool) -> dict[str, Any]:
    """Each launch of one request between two events, and the gaps between launches.

    The events themselves take a few microseconds of each gap.
    """
    limits = pipe._limits  # noqa: SLF001
    table, _ = limits.table(pipe.engines.pipeline.solver, steps, pipe.engines.pipeline.guidance)
    shape = limits.latent_shape(None, None)
    text = np.stack([pipe._text("")[0], pipe._text(PROMPT)[0]])  # noqa: SLF001
    session = sessions.open_step(shape)
    if not graphs:
        session.graphs_off = "measured without"
    loop, request = StepLoop(session), Request(table, text, pipe.starting_latents(1)[0])
    device, stream = sessions.device, sessions.stream
    events = [(Event(device, timed=True), Event(device, timed=True)) for _ in table]
    host: list[float] = []
    for measured in (False, True):  # the first time contexts are made and graphs captured
        slot = loop.admit(request)
        with device.current():
            stream.wait()
            for begin, end in events:
                stream.record(begin)
                began = time.perf_counter()
                loop.step()
                if measured:
                    host.append(time.perf_counter() - began)
                stream.record(end)
            stream.wait()
        loop.release(slot)
    launches = [end.elapsed(begin) for begin, end in events]
    gaps = [after[0].elapsed(before[1]) for before, after in pairwise(events)]
    span = events[-1][1].elapsed(events[0][0])
    return {
        "launches": len(launches),
        "launch_milliseconds": statistics.median(launches),
        "idle_share": sum(gaps) / span if span else 0.0,
        # From the third on, a launch waits for the one before the last.
        "host_milliseconds_of_a_launch": 1000 * statistics.median(host[:2]),
        "without_graphs_because": session.graphs_off,
    }


def roofline(pipe: TextToVideo, bundle: Bundle, board: Board, measured: dict[str, Any]) -> dict[str, Any]:
    """How much of what the board could do at most a launch of the step and of the decoder does.

    Args:
        pipe: What was measured.
        bundle: What its engines were built from; the operations are counted in its graphs.
        board: Whose peaks.
        measured: What `measure` gave.
    """
    geometry, engines = pipe.engines.pipeline.geometry, pipe.engines.engines
    decoder = engines["vae_decoder"].profile["frames"].opt
    video = Video(
        width=geometry.width,
        height=geometry.height,
        frames=geometry.frames,
        batch=1,
        precision=engines["step"].precision,
        cfg=pipe.engines.pipeline.cfg,
        decoder_frames=decoder,
    )
    target = Target(board.name, board.title, board.compute_capability, board.memory_gib, pipe.engines.backend)
    least = bounds(Planner(bundle, target).plan(video), board, 1)
    times = {
        "step": measured["graphs"]["launch_milliseconds"],
        "vae_decoder": measured["stage_milliseconds"]["vae_decoder"],
    }
    return {
        "board": board.name,
        **{
            name: {
                "flops": least[name].flops,
                "bytes": least[name].bytes,
                "limit": least[name].limit,
                "least_milliseconds": 1000 * least[name].seconds / least[name].launches,
                "share": 1000 * least[name].seconds / least[name].launches / milliseconds,
            }
            for name, milliseconds in times.items()
        },
    }


def by_onnxruntime(bundle: Path, steps: int, provider: str = CUDA) -> dict[str, Any]:
    """The loop by a provider of ONNX Runtime, from the same bundle; or why there is none."""
    try:
        pipe = open_pipeline(bundle, provider=provider)
        pipe.generate(PROMPT, steps=1, seed=1)
        video = pipe.generate(PROMPT, steps=steps, seed=1)
    except ReelError as error:
        return {"provider": provider, "refused": str(error)}
    return {"provider": provider, "steps": steps, "seconds": dict(video.timings)}


def rivals(pipe: TextToVideo, model: Path, steps: int, runs: int) -> dict[str, Any]:
    """Whole videos by ours and by diffusers, eager and compiled, from the same latents."""
    import torch
    from diffusers import TextToVideoSDPipeline

    theirs = TextToVideoSDPipeline.from_pretrained(model, torch_dtype=torch.float16).to("cuda")
    theirs.set_progress_bar_config(disable=True)
    latents = pipe.starting_latents(1)
    shape = limits_of(pipe)
    guidance = pipe.engines.pipeline.guidance

    def ours() -> None:
        pipe.generate(PROMPT, steps=steps, latents=latents)

    def diffusers() -> None:
        theirs(
            PROMPT,
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=torch.from_numpy(latents).half().cuda(),
            num_frames=shape[0],
            height=shape[1],
            width=shape[2],
        )
        torch.cuda.synchronize()

    found: dict[str, Any] = {"eager": _alternate(ours, diffusers, runs)}
    theirs.unet = torch.compile(theirs.unet)
    return {**found, "compiled": _alternate(ours, diffusers, runs)}


def limits_of(pipe: TextToVideo) -> tuple[int, int, int]:
    """The model's own frames, height and width."""
    geometry = pipe.engines.pipeline.geometry
    return geometry.frames, geometry.height, geometry.width


def _alternate(ours: Callable[[], None], theirs: Callable[[], None], runs: int) -> dict[str, Any]:
    """Seconds of each, taking turns, after each has run once."""
    seconds: dict[str, list[float]] = {"ours_seconds": [], "theirs_seconds": []}
    for index in range(runs + 1):
        for name, run in zip(seconds, (ours, theirs), strict=True):
            began = time.perf_counter()
            run()
            if index:
                seconds[name].append(time.perf_counter() - began)
    ratio = statistics.median(seconds["theirs_seconds"]) / statistics.median(seconds["ours_seconds"])
    return {**seconds, "ratio": ratio}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("engines", type=Path, help="a tensorrt or tensorrt_rtx engine set of this GPU")
    parser.add_argument("--model", type=Path, help="the diffusers folder it was made from")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--runs", type=int, default=5, help="videos of each rival")
    parser.add_argument("--bundle", type=Path, help="the bundle that the engines were built from")
    parser.add_argument("--board", choices=sorted(boards()), help="this GPU; the engines' target by default")
    options = parser.parse_args()
    console = Console(stderr=True)
    console.print(f"wanted: the GPU idles at most {IDLE_ALLOWED:.0%} of the loop")
    gpu = detect().gpu
    if gpu is None:
        print(json.dumps({"skipped": f"this machine has {detect().gpu_fault or 'no NVIDIA GPU'}"}))
        return 0
    try:
        pipe = load(options.engines)
        result = measure(pipe, options.steps)
    except ReelError as error:
        refused: dict[str, Any] = {"gpu": gpu.name, "refused": str(error), "machine": machine(*LIBRARIES)}
        if options.bundle:
            refused["onnxruntime"] = by_onnxruntime(options.bundle, options.steps)
        _write(gpu.name, refused)
        return 0
    result = {"gpu": gpu.name, "cuda": gpu.cuda, "steps": options.steps, **result}
    result["engines"] = f"{pipe.engines.backend} {pipe.engines.backend_version}"
    result["precision"] = pipe.engines.engines["step"].precision
    board = boards().get(options.board) or find(pipe.engines.target).board
    if options.bundle and board:
        bundle = Bundle.load(options.bundle)
        if bundle.sha256 != pipe.engines.bundle:
            parser.error(f"{options.engines} was not built from {options.bundle}")
        result["roofline"] = roofline(pipe, bundle, board, result)
    else:
        missing = "--bundle" if board else "--board: the target of the engines is none"
        result["roofline"] = {"missing": missing}
    if options.bundle:
        result["onnxruntime"] = by_onnxruntime(options.bundle, options.steps)
    if options.model:
        result["diffusers"] = rivals(pipe, options.model, options.steps, options.runs)
    result["machine"] = machine(*LIBRARIES)
    table = Table("what", "ms")
    for name, milliseconds in result["stage_milliseconds"].items():
        table.add_row(name, f"{milliseconds:.2f}")
    for name in ("graphs", "plain"):
        table.add_row(f"a launch ({name})", f"{result[name]['launch_milliseconds']:.3f}")
    console.print(table)
    for name in ("step", "vae_decoder"):
        if share := result["roofline"].get(name):
            console.print(
                f"{name}: {share['share']:.0%} of what {result['roofline']['board']} can do at most"
            )
    console.print(f"the GPU idles {result['graphs']['idle_share']:.1%} of the loop")
    _write(gpu.name, result)
    return int(result["graphs"]["idle_share"] > IDLE_ALLOWED)


def _write(gpu: str, result: dict[str, Any]) -> None:
    """Keep what was found of a GPU, and print it."""
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    (RESULTS / f"gpu-{slug}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
