"""What a backend is for the runtime: opened stages, and the buffers of a step loop.

These protocols are all that the loop and the pipeline know of a backend. Which library and which
memory stand behind them is the backend's business.

Threads. Several step sessions may be open; they and the loops over them belong to one thread at a time,
all of them together. `Sessions.run` may be called from any thread at any time, also while that one
launches steps, and by several threads at once. Results do not depend on that.
ONNX Runtime runs such calls side by side on the CPU. On a GPU they run on a stream of their own beside
the step's where the memory plan has room for that (`GpuSessions.overlaps`), else between two launches.
When a call runs out of the GPU's memory, everything is freed: step sessions answer with a BackendError
then until their requests are written again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from itertools import repeat
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from reelrt.bundle.manifest import EngineSet
from reelrt.errors import BackendError, CompatibilityError, InputError
from reelrt.jetson.device import detect
from reelrt.runtime.device_array import DeviceArray
from reelrt.runtime.ranges import span

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]


class StepSession(Protocol):
    """The step engine with buffers for one latent shape, one row of the batch per slot.

    It belongs to one thread at a time; see above.

    Every buffer is allocated once, for `capacity` rows. The state and its counter exist twice:
    a launch reads one side and writes the other, then the sides change roles. Tables, prompts and
    counters are uploaded when a slot is written, never between launches.
    """

    capacity: int
    table_rows: int

    def write(self, row: int, table: Float32, text: Array, latents: Any) -> None:
        """Put a request into a row of the batch, at the first row of its table.

        Args:
            row: 0 to capacity - 1.
            table: float32 [S, K], S at most `table_rows`; copied.
            text: Prompt embeddings [2, L, D], unconditional first; copied.
            latents: Starting latents, float32 [C, F, h, w]; copied. On a GPU also any array there. Or what
                `read_state` gave of a request that had come to the first row of this table.
        """

    def move(self, source: int, target: int) -> None:
        """Copy everything a row holds to another row."""

    def launch(self, active: int) -> None:
        """Advance rows 0 to active - 1 by one row of their tables.

        Raises:
            BackendError: The engine failed.
        """

    def read(self, row: int) -> Float32:
        """The latents in a row, float32 [C, F, h, w]; a copy. Waits for launches to finish."""

    def read_state(self, row: int) -> Float32:
        """The same with the history a solver needs to go on from it, float32 [R, C, F, h, w]."""


class GpuStepSession(StepSession, Protocol):
    """A step session on a GPU."""

    def view(self, row: int) -> DeviceArray:
        """The latents in a row where they lie, valid until the next launch, write or move."""


class Sessions(Protocol):
    """An opened engine set. Any thread may `run` stages; see above."""

    def run(self, stage: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run a stage other than the step once.

        Args:
            stage: `text_encoder` or `vae_decoder`.
            inputs: Name to array, as the stage's spec says.

        Returns:
            Output name to array; the caller's to keep.

        Raises:
            BackendError: The engine failed.
        """

    def open_step(self, latents: tuple[int, int, int, int]) -> StepSession:
        """Allocate the buffers of a step loop for latents of one shape (C, F, h, w)."""


Result = Callable[[], dict[str, Array]]
"""Waits for a stage that was started, and gives its outputs, which are the caller's to keep; called once."""


@runtime_checkable
class GpuSessions(Sessions, Protocol):
    """An opened engine set on a GPU."""

    @property
    def overlaps(self) -> bool:
        """Whether other stages run beside the step, and one is copied to the host while the next one runs."""

    def submit(
        self, stage: str, inputs: Mapping[str, Array], into: Mapping[str, DeviceArray] | None = None
    ) -> Result:
        """Start what `run` does, and return before it is done.

        Args:
            stage: `text_encoder` or `vae_decoder`.
            inputs: As for `run`; they may be changed right after.
            into: Output name to where it shall be copied to as well, on the GPU.

        Raises:
            BackendError: The engine failed; it may also say so only when it is asked for the result.
        """

    def receive(self, array: object) -> DeviceArray:
        """View another library's array.

        Raises:
            InputError: It does not lie in device memory, or not in one piece.
        """

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """Device memory of the caller's, not initialised.

        Raises:
            DeviceMemoryError: There is not so much left.
        """

    def copy(self, source: DeviceArray) -> DeviceArray:
        """A copy in device memory of the caller's, when it is done."""

    def fetch(self, source: DeviceArray) -> Array:
        """A copy in the host's memory, when it is done."""


def run_each(
    sessions: Sessions,
    stage: str,
    inputs: Iterable[Mapping[str, Array]],
    into: Iterable[Mapping[str, DeviceArray]] | None = None,
) -> Iterator[dict[str, Array]]:
    """Run a stage on one after the other; where a GPU overlaps, the next one runs while this one is used.

    Args:
        sessions: The opened engine set.
        stage: `text_encoder` or `vae_decoder`.
        inputs: Of each run.
        into: Of each run, where outputs shall be copied to as well, on a GPU.

    Yields:
        The outputs of each, in order.
    """
    if not isinstance(sessions, GpuSessions):
        for each in inputs:
            with span(stage):
                outputs = sessions.run(stage, each)
            yield outputs
        return
    ahead: deque[Result] = deque()
    nowhere: Iterable[Mapping[str, DeviceArray]] = repeat({})
    for each, targets in zip(inputs, into or nowhere, strict=False):
        with span(stage):
            ahead.append(sessions.submit(stage, each, targets))
        if len(ahead) == (AHEAD if sessions.overlaps else 1):
            yield ahead.popleft()()
    while ahead:
        yield ahead.popleft()()


AHEAD = 2
"""Runs of a stage that are started before the first one's outputs are asked for."""

Opener = Callable[..., Sessions]

BACKENDS = {
    "onnxruntime": "reelrt.runtime.ort",
    "tensorrt": "reelrt.runtime.trt",
    "tensorrt_rtx": "reelrt.runtime.trt",
}
"""Backend name to the module whose `open_sessions` opens its engine sets."""


def open_sessions(
    engines: EngineSet,
    threads: int | None = None,
    *,
    stream: object = None,
    residency: str | None = None,
) -> Sessions:
    """Open every engine of a set with the backend it was built for.

    Args:
        engines: The engine set, verified.
        threads: CPU threads per engine; None leaves it to the backend.
        stream: A CUDA stream of the caller's that a GPU backend shall use; see
            `reelrt.runtime.cuda.stream_handle`.
        residency: `all` engines in the GPU's memory, `staged`, one at a time, or `streamed`, with what
            does not fit of the step's weights left to the host; None takes the first that fits.

    Raises:
        BackendError: This version has no session for that backend, or the backend is not
            installed, or it cannot open an engine.
        CompatibilityError: The set was built for another version, GPU or machine.
        InputError: A stream or residency for engines that run on the CPU.
    """
    _check_gpu(engines)
    if engines.backend not in BACKENDS:
        device = f"{engines.backend} engines for {engines.target}"
        raise BackendError(
            f"{engines.folder} holds {device}; this version of reelrt runs {', '.join(BACKENDS)} engines.",
            "Build for this machine with `reelrt build BUNDLE -o ENGINES --backend onnxruntime`.",
        )
    opener: Opener = import_module(BACKENDS[engines.backend]).open_sessions
    if engines.compute_capability:
        return opener(engines, threads, stream=stream, residency=residency)
    for name, value in (("stream", stream), ("residency", residency)):
        if value is not None:
            raise InputError(f"{name} {value!r} is for a GPU; {engines.folder} runs on the CPU.")
    return opener(engines, threads)


def _check_gpu(engines: EngineSet) -> None:
    """Refuse engines of another compute capability before any library tries to open them."""
    wanted = engines.compute_capability
    if not wanted:
        return
    device = detect()
    if device.gpu is None:
        here = device.gpu_fault or "no NVIDIA GPU"
    elif device.gpu.compute_capability == wanted:
        return
    else:
        here = f"{device.gpu.name}, compute capability {device.gpu.compute_capability}"
    built = f"{engines.folder} was built for {engines.target}, compute capability {wanted}"
    raise CompatibilityError(
        f"{built}; this machine has {here}.",
        "`reelrt doctor` says what is wrong."
        if device.gpu_fault
        else "Build the engines for this machine: `reelrt build BUNDLE -o ENGINES`.",
    )
