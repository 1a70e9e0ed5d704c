"""The step graph run one row of the batch at a time, with a look at all it reads and writes.

A `StepSession` like any other to the loop. Knows nothing of what is done with what it sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reelrt.bundle.manifest import TOKENIZER, Bundle
from reelrt.errors import BackendError, CalibrationError
from reelrt.runtime.loop import Request, StepLoop
from reelrt.runtime.request import Limits, plan
from reelrt.runtime.session import Array, Float32
from reelrt.runtime.text import TextEncoder, Tokenizer
from reelrt.runtime.unbuilt import as_engines


@dataclass(frozen=True, slots=True, eq=False)
class Feed:
    """What the step graph is about to read; the arrays belong to the session and change.

    Attributes:
        state: float32 [R, C, F, h, w].
        table: The whole table, float32 [S, K].
        row: Of the table.
        text: [2, L, D].
    """

    state: Float32
    table: Float32
    row: int
    text: Array

    def copy(self) -> Feed:
        """The same, to keep."""
        return Feed(self.state.copy(), self.table.copy(), self.row, self.text.copy())

    @property
    def inputs(self) -> dict[str, Array]:
        """The graph's feed for a batch of 1, its table reduced to the one row."""
        row = self.table[self.row][None, None]
        return {
            "state": self.state[None],
            "table": row,
            "step": np.zeros(1, np.int64),
            "text": self.text[None],
        }


Listener = Callable[[Feed], None]


class Recorder:
    """A bundle's stages, its step run one row at a time; see `reelrt.runtime.session.Sessions`.

    A stage is opened when it is first run.

    Attributes:
        started: The starting latents of the last request, float32 [C, F, h, w].

    Args:
        bundle: The bundle.
        graph: Another step graph to run instead of the bundle's own.
        threads: CPU threads of each graph; 0 takes one per physical core.
    """

    def __init__(self, bundle: Bundle, graph: Path | None = None, threads: int = 0) -> None:
        self._bundle = bundle
        self._files = {name: bundle.folder / stage.file for name, stage in bundle.stages.items()}
        if graph is not None:
            self._files["step"] = graph
        self._opened: dict[str, Any] = {}
        self._threads = threads
        self._limits = Limits(as_engines(bundle))
        self._text = TextEncoder(Tokenizer(bundle.folder / TOKENIZER, bundle.pipeline), self)
        self.started: Float32 = np.zeros((1, 1, 1, 1), np.float32)
        self._listener: Listener | None = None

    def denoise(self, prompt: str, *, steps: int, guidance: float, seed: int) -> Float32:
        """Take a prompt through the loop, at the model's own size and with its own solver.

        Returns:
            The final latents, float32 [C, F, h, w]; nothing is decoded.

        Raises:
            InputError: An empty prompt or an impossible number, as `TextToVideo.generate`.
            CalibrationError: Numbers that are not finite.
        """
        (job,) = plan(
            self._limits,
            [prompt],
            negative_prompt="",
            steps=steps,
            guidance=guidance,
            seed=seed,
            frames=None,
            size=None,
            solver=None,
            latents=None,
        )
        text = np.stack([self._text(words)[0] for words in ("", prompt)])
        loop = StepLoop(self.open_step(job.shape))
        slot = loop.admit(Request(job.table, text, job.latents))
        while not slot.finished:
            loop.step()
        return loop.latents(slot)

    @contextmanager
    def listen(self, listener: Listener) -> Iterator[None]:
        """Have each launch told to a listener before it happens."""
        self._listener = listener
        try:
            yield
        finally:
            self._listener = None

    def run(self, stage: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run a stage once.

        Raises:
            BackendError: The graph failed.
        """
        names = list(self._bundle.stages[stage].spec.outputs)
        if stage not in self._opened:
            self._opened[stage] = open_graph(self._files[stage], self._threads)
        try:
            outputs = self._opened[stage].run(names, dict(inputs))
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise BackendError(f"ONNX Runtime failed in {self._files[stage]}: {error}") from error
        return dict(zip(names, outputs, strict=True))

    def open_step(self, latents: tuple[int, int, int, int]) -> RowSession:
        """A step session of one row for latents (C, F, h, w)."""
        return RowSession(self, self._bundle.pipeline.geometry.state_rows, latents)

    def advance(self, feed: Feed) -> Float32:
        """The next state, float32 [R, C, F, h, w].

        Raises:
            CalibrationError: It is not finite.
            BackendError: The graph failed.
        """
        if self._listener:
            self._listener(feed)
        following: Float32 = self.run("step", feed.inputs)["state_next"][0]
        if not np.isfinite(following).all():
            from reelrt.calibration.finite import first_not_finite

            path = self._files["step"]
            layer = first_not_finite(path, feed.inputs)
            raise CalibrationError(
                f"{path.name} produces numbers that are not finite at row {feed.row} of the schedule's "
                f"{len(feed.table)} (timestep {feed.table[feed.row, 0]:g}), first in layer {layer}.",
                "Export the model again with `--precision fp32`, and check its weights.",
            )
        return following


class RowSession:
    """A step session of one row; see `reelrt.runtime.session.StepSession`.

    Args:
        recorder: What runs the graph.
        state_rows: R of the state.
        latents: (C, F, h, w).
    """

    capacity = 1
    table_rows = 1 << 16

    def __init__(self, recorder: Recorder, state_rows: int, latents: tuple[int, int, int, int]) -> None:
        self._recorder = recorder
        self._state: Any = np.zeros((state_rows, *latents), np.float32)
        self._table: Any = None
        self._text: Any = None
        self._step = 0

    def write(self, row: int, table: Float32, text: Array, latents: Float32) -> None:
        """Begin a request."""
        assert row == 0
        self._table, self._text, self._step = table.copy(), text.copy(), 0
        self._state = np.zeros_like(self._state)
        self._state[: len(latents) if latents.ndim == self._state.ndim else 1] = latents
        self._recorder.started = latents.copy()

    def move(self, source: int, target: int) -> None:
        """There is one row only."""
        assert source == target == 0

    def launch(self, active: int) -> None:
        """Run one row of the table."""
        assert active == 1
        self._state = self._recorder.advance(Feed(self._state, self._table, self._step, self._text))
        self._step += 1

    def read(self, row: int) -> Float32:
        """The latents; a copy."""
        assert row == 0
        latents: Float32 = self._state[0].copy()
        return latents

    def read_state(self, row: int) -> Float32:
        """The latents and the history; a copy."""
        assert row == 0
        state: Float32 = self._state.copy()
        return state


def open_graph(path: Path, threads: int = 0) -> Any:
    """ONNX Runtime on a graph, its threads asleep while they wait: nobody measures time here.

    Raises:
        BackendError: It cannot be opened.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class
        raise BackendError(f"ONNX Runtime cannot open {path}: {error}") from error
