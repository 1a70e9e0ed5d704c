"""Videos on a simulated GPU whose calls fail at random, and which are cancelled at random."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import reelrt
from reelrt.bundle.manifest import EngineSet
from reelrt.errors import BackendError, Cancelled, DeviceMemoryError
from tests.simulated.driver import Status
from tests.simulated.machine import Machine

MEMORY = Status.CUDA_ERROR_OUT_OF_MEMORY
FAILED = Status.CUDA_ERROR_LAUNCH_FAILED
FAULTS = {
    **dict.fromkeys(("cuMemAlloc", "cuMemHostAlloc", "TensorRT", "cuEventCreate"), MEMORY),
    **dict.fromkeys(("enqueueV3", "cuGraphLaunch", "cuStreamSynchronize", "cuEventSynchronize"), FAILED),
    **dict.fromkeys(("cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuMemcpyDtoDAsync", "cuEventRecord"), FAILED),
    **dict.fromkeys(("cuStreamBeginCapture", "cuGraphInstantiate", "cuMemsetD8Async"), FAILED),
}
"""What may fail, and how; `TensorRT` is an allocation of the library's own."""
PROMPTS = ["red circle", "blue", "square", "red square", "circle"]
SIZES: list[dict[str, Any]] = [{}, {"frames": 3, "size": (32, 64)}, {"frames": 8, "size": (64, 32)}]


@dataclass(slots=True)
class Tally:
    """What came of it.

    Attributes:
        rounds: Calls of `generate`.
        faults: Calls of the driver that were let fail, by name.
        ends: How rounds ended, by kind.
        wrong: Rounds whose video was not ONNX Runtime's to the bit.
        leaks: What was left, wherever nothing may be.
        violations: What the simulated GPU found.
    """

    rounds: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    leaks: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in self.__slots__}
        return {**plain, "faults": dict(self.faults), "ends": dict(self.ends)}


class Stop:
    """Cancels or interrupts at the nth time that progress is told; 0 is never."""

    def __init__(self, at: int, keyboard: bool) -> None:
        self.at, self.keyboard, self.told = at, keyboard, 0

    def progress(self, what: str, done: int, total: int) -> None:
        self.told += 1
        if self.told == self.at and self.keyboard:
            raise KeyboardInterrupt

    def cancelled(self) -> bool:
        return 0 < self.at <= self.told


def run(
    machine: Machine, source: EngineSet, folder: Path, rounds: int, seed: int = 0, until: int = 0
) -> Tally:
    """Generate videos under random faults.

    Args:
        machine: The simulated GPU.
        source: The ONNX Runtime engine set to compare with.
        folder: Where to write the simulation's engine set.
        rounds: How many times.
        seed: Of everything random.
        until: Stop when so many calls have failed; 0 does not.
    """
    rng = np.random.default_rng(seed)
    engines, cpu = machine.engines(source, folder), reelrt.load(source.folder, threads=1)
    driver, tally, wanted, pipe = machine.driver, Tally(), {}, None
    chance = 0.0

    def fault(call):
        if call in FAULTS and rng.random() < chance:
            tally.faults[call] += 1
            return FAULTS[call]
        return None

    for tally.rounds in range(1, rounds + 1):
        if pipe is None:
            pipe = reelrt.load(engines.folder, residency=("all", "staged")[tally.rounds // 50 % 2])
        count, steps, size = rng.integers(1, 6), int(rng.integers(1, 4)), int(rng.integers(len(SIZES)))
        request = tuple(PROMPTS[:count]), steps, size
        options: dict[str, Any] = {"steps": steps, "seed": 1, "solver": "two", **SIZES[size]}
        if request not in wanted:
            wanted[request] = cpu.generate(list(request[0]), **options)
        stop = Stop(int(rng.integers(1, 60)) if rng.random() < 0.3 else 0, rng.random() < 0.5)
        chance, driver.faults = float(rng.choice([0, 0.003, 0.03, 0.1])), fault
        try:
            videos = pipe.generate(
                list(request[0]), **options, progress=stop.progress, should_cancel=stop.cancelled
            )
        except DeviceMemoryError:
            tally.ends["out of memory"] += 1
            driver.faults = lambda call: None
            if driver.used:
                tally.leaks.append(f"round {tally.rounds}: {driver.used} bytes after running out of memory")
        except (BackendError, Cancelled, KeyboardInterrupt) as error:
            tally.ends[type(error).__name__] += 1
        else:
            tally.ends["video"] += 1
            for ours, theirs in zip(videos, wanted[request], strict=True):
                same = ours.latents.tobytes() == theirs.latents.tobytes()
                tally.wrong += not (same and ours.frames.tobytes() == theirs.frames.tobytes())
            del videos, ours, theirs
        driver.faults = lambda call: None
        last = tally.rounds == rounds or 0 < until <= tally.faults.total()
        if tally.rounds % 25 == 0 or last:
            pipe = None
            gc.collect()
            if leaks := driver.leaks():
                tally.leaks.append(f"round {tally.rounds}: {leaks}")
        if last:
            break
    tally.violations = driver.violations[:20]
    return tally
