"""Videos on a simulated GPU whose calls fail at random, and which are cancelled at random.

Most are encoded while they are decoded, and during many of them another thread runs stages of its own.
"""

from __future__ import annotations

import gc
import threading
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

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
    "cuStreamWaitEvent": FAILED,
}
"""What may fail, and how; `TensorRT` is an allocation of the library's own."""
PROMPTS = ["red circle", "blue", "square", "red square", "circle"]
PAUSE = 0.005
"""Seconds between two turns of the other thread, so that it leaves time to the first one."""
SIZES: list[dict[str, Any]] = [{}, {"frames": 3, "size": (32, 64)}, {"frames": 8, "size": (64, 32)}]


@dataclass(slots=True)
class Tally:
    """What came of it.

    Attributes:
        rounds: Calls of `generate`.
        faults: Calls of the driver that were let fail, by name.
        ends: How rounds ended, by kind.
        wrong: Videos, their files, and the other thread's results that were not ONNX Runtime's to the bit.
        beside: How the other thread's calls ended, by kind.
        leaks: What was left, wherever nothing may be.
        violations: What the simulated GPU found.
    """

    rounds: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    beside: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    leaks: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in self.__slots__}
        counted = {name: dict(getattr(self, name)) for name in ("faults", "ends", "beside")}
        return {**plain, **counted}


class Beside:
    """Another thread that runs text encoder and decoder while a video is made.

    Args:
        pipe: Whose stages.
        cpu: What to compare with.
        tally: Where to count.
    """

    def __init__(self, pipe: reelrt.TextToVideo, cpu: reelrt.TextToVideo, tally: Tally) -> None:
        self._sessions, self._tally = pipe._sessions, tally
        latents = {"latents": cpu.starting_latents(1, frames=2, size=(32, 32))}
        feeds: dict[str, dict[str, Any]] = {
            "text_encoder": {"tokens": np.array([[0, 2, 4, 1, 1, 1]], np.int64)},
            "vae_decoder": latents,
        }
        self._feeds = [(name, feed, cpu._sessions.run(name, feed)) for name, feed in feeds.items()]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(60)
        if self._thread.is_alive():
            self._tally.leaks.append(f"round {self._tally.rounds}: the other thread hangs")

    def _work(self) -> None:
        while not self._over.wait(PAUSE):
            for each in self._feeds:
                self._run(*each)

    def _run(self, stage: str, feed: dict[str, Any], wanted: dict[str, Any]) -> None:
        try:
            found = self._sessions.run(stage, feed)
        except BackendError as error:
            self._tally.beside[type(error).__name__] += 1
        else:
            self._tally.beside["right"] += 1
            self._tally.wrong += any(not np.array_equal(found[name], wanted[name]) for name in wanted)


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
    chance, luck = 0.0, np.random.default_rng(seed + 1)  # its order depends on the threads

    def fault(call):
        if call in FAULTS and luck.random() < chance:
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
        saved = folder.with_name("saved") / "a.png" if rng.random() < 0.5 else None
        names = [saved.with_stem(f"a{index}") for index in range(count)] if saved else None
        beside = Beside(pipe, cpu, tally) if rng.random() < 0.3 else nullcontext()
        stop = Stop(int(rng.integers(1, 60)) if rng.random() < 0.3 else 0, rng.random() < 0.5)
        chance, driver.faults = float(rng.choice([0, 0.003, 0.03, 0.1, 0.2])), fault
        try:
            with beside:
                videos = pipe.generate(
                    list(request[0]),
                    **options,
                    save_to=names,
                    progress=stop.progress,
                    should_cancel=stop.cancelled,
                )
        except DeviceMemoryError:
            tally.ends["out of memory"] += 1
            driver.faults = lambda call: None
            if driver.used and isinstance(beside, nullcontext):  # the other thread loads what it needs
                tally.leaks.append(f"round {tally.rounds}: {driver.used} bytes after running out of memory")
        except (BackendError, Cancelled, KeyboardInterrupt) as error:
            tally.ends[type(error).__name__] += 1
        else:
            tally.ends["video"] += 1
            for ours, theirs in zip(videos, wanted[request], strict=True):
                same = ours.latents.tobytes() == theirs.latents.tobytes()
                tally.wrong += not (same and ours.frames.tobytes() == theirs.frames.tobytes())
                if saved:
                    tally.wrong += not _is_saved(saved.with_stem(f"a{theirs.metadata['seed'] - 1}"), theirs)
            del videos, ours, theirs
        driver.faults = lambda call: None
        if left := [name for name in _names(folder.with_name("saved")) if name.startswith(".")]:
            tally.leaks.append(f"round {tally.rounds}: {left} half-written")
        if any(thread.name == "reelrt-encoder" for thread in threading.enumerate()):
            tally.leaks.append(f"round {tally.rounds}: an encoder's thread is left")
        del beside
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


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.exists() else []


def _is_saved(path: Path, video: reelrt.Video) -> bool:
    """Whether the files of a video hold its frames."""
    files = [path.with_stem(f"{path.stem}_{index:03d}") for index in range(len(video.frames))]
    frames = [np.asarray(Image.open(file)) for file in files]
    return np.array_equal(np.stack(frames), video.frames)
