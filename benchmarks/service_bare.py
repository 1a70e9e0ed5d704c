"""The bare runtime in a process of its own, beside which the load test measures the service.

    python -m benchmarks.service_bare ENGINES    takes JSON lines on standard input and answers each

`{"do": "video", "prompt", "seed", "steps", "path"}` makes a video; `{"do": "launches", "batch", "steps",
"count"}` times launches of the step engine. `Bare` is the other end.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import reelrt
from benchmarks.verdicts import Costs
from reelrt.runtime.loop import StepLoop
from reelrt.runtime.pipeline import TextToVideo
from reelrt.runtime.request import plan

ROOT = Path(__file__).parents[1]


class Bare:
    """That process, asked and waited for.

    Attributes:
        slots: Most videos that its step engine takes in a batch.
        cores: Cores that it may use.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        told = self._answer()
        self.slots, self.cores = int(told["slots"]), int(told["cores"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise SystemExit("the bare runtime has ended; what it said is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **order: Any) -> dict[str, Any]:
        """Let it do something; what it answers."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def video(self, prompt: str, seed: int, steps: int, path: Path) -> dict[str, float]:
        """Make a video; its `seconds`, and `cpu`, the processors' seconds in them."""
        return self.ask(do="video", prompt=prompt, seed=seed, steps=steps, path=str(path))

    def costs(self, steps: int, batch: int, count: int, folder: Path) -> Costs:
        """What a video and launches take; medians of `count` launches and of three videos."""
        one, full = (self.ask(do="launches", batch=n, steps=steps, count=count) for n in (1, batch))
        path = folder / "alone.mp4"
        videos = [self.video(f"a video alone, number {n}", n, steps, path) for n in range(3)]
        alone = sorted(videos, key=lambda each: each["seconds"])[1]
        return Costs(
            self.cores,
            int(one["launches"]),
            (alone["seconds"], alone["cpu"]),
            (one["seconds"], one["cpu"]),
            (full["seconds"], full["cpu"]),
            batch,
        )


@contextmanager
def bare(engines: Path) -> Iterator[Bare]:
    """Start it; it ends with the block."""
    command = [sys.executable, "-m", "benchmarks.service_bare", str(engines)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    try:
        yield Bare(process)
    finally:
        process.kill()  # it keeps nothing
        process.communicate()


def timed_launches(pipe: TextToVideo, batch: int, steps: int, count: int) -> dict[str, float]:
    """Seconds of a launch, and the processors'; of a guided step's two, which differ in cost, the mean."""
    jobs = plan(
        pipe.limits,
        [f"a launch, number {number}" for number in range(batch)],
        negative_prompt="",
        steps=steps,
        guidance=None,
        seed=0,
        frames=None,
        size=None,
        solver=None,
        latents=None,
    )
    requests = [pipe.encode(job)[0] for job in jobs]
    loop, launches = StepLoop(pipe.sessions.open_step(jobs[0].shape)), len(jobs[0].table)
    found, pair = list[tuple[float, float]](), launches // steps
    while len(found) < count:
        for request in requests:
            loop.admit(request)
        for _ in range(steps):
            began, cpu = time.perf_counter(), time.process_time()
            for _ in range(pair):
                loop.step()
            found.append(((time.perf_counter() - began) / pair, (time.process_time() - cpu) / pair))
        loop.clear()
    seconds, cpu = (statistics.median(values) for values in zip(*found[1:], strict=True))
    return {"seconds": seconds, "cpu": cpu, "launches": launches}


def main() -> int:
    from reelrt.jetson.device import detect

    pipe = reelrt.load(sys.argv[1])
    slots = pipe.engines.engines["step"].profile["batch"].max
    print(json.dumps({"slots": slots, "cores": detect().cpu_cores}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "launches":
            answer = timed_launches(pipe, order["batch"], order["steps"], order["count"])
        else:
            began, cpu = time.perf_counter(), time.process_time()
            pipe.generate(order["prompt"], steps=order["steps"], seed=order["seed"], save_to=order["path"])
            answer = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
