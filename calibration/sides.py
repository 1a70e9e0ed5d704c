"""The two sides of a comparison: a reference and a candidate, opened, alike, and watched at each step.

A side is a bundle or an engine set. Both run their own trajectory from the same noise; a recorder
keeps the latents that each has after every denoising step. Knows no metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reelrt.bundle.files import sha256, verify
from reelrt.bundle.manifest import MANIFEST, SCHEDULES, Bundle, EngineSet, check_either, kind_of
from reelrt.bundle.report import coarsest
from reelrt.bundle.schedule import Cfg, Schedule, first_passes
from reelrt.calibration.emulated import emulate_fp16
from reelrt.errors import BackendError, InputError
from reelrt.runtime.pipeline import TextToVideo
from reelrt.runtime.request import Limits
from reelrt.runtime.session import Array, Float32, Sessions, StepSession
from reelrt.runtime.unbuilt import as_engines, open_pipeline
from reelrt.runtime.video import Video
from reelrt.wording import counted

GEOMETRY = ("latent_channels", "spatial_scale", "tokens", "text_width", "frames", "height", "width")
"""What of a model's geometry has to be alike for two trajectories to be comparable."""
EMULATED = "FP16 emulated: inputs, weights and result of each layer rounded to FP16, sums in FP32"
SCHEDULE_TOLERANCE = 1e-6
"""Largest difference of two schedules' coefficients: another version of the scheduler rounds otherwise."""


class Recorder:
    """Keeps the latents after every denoising step of one video at a time.

    Attributes:
        latents: Of the video being made or made last, float32 [C, F, h, w] per step.
        cfg: How guidance is computed; with `split`, a guided step is two launches.
    """

    def __init__(self) -> None:
        self.latents: list[Float32] = []
        self.cfg: Cfg = "split"

    def wrap(self, sessions: Sessions) -> Sessions:
        """The same sessions, watched."""
        return _Watched(sessions, self)


class _Watched:
    """Sessions whose step loops report to a recorder."""

    def __init__(self, sessions: Sessions, recorder: Recorder) -> None:
        self._sessions, self._recorder = sessions, recorder

    def run(self, stage: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return self._sessions.run(stage, inputs)

    def open_step(self, latents: tuple[int, int, int, int]) -> StepSession:
        return _WatchedStep(self._sessions.open_step(latents), self._recorder)


class _WatchedStep:
    """A step loop that reports row 0 after each launch that ends a step."""

    def __init__(self, session: StepSession, recorder: Recorder) -> None:
        self._session, self._recorder = session, recorder
        self.capacity, self.table_rows = 1, session.table_rows  # one video at a time
        self._ends = np.zeros(0, np.bool_)
        self._at = 0

    def write(self, row: int, table: Float32, text: Array, latents: Float32) -> None:
        split = self._recorder.cfg == "split"
        self._ends = ~first_passes(table) if split else np.ones(len(table), np.bool_)
        self._at = 0
        self._recorder.latents = []
        self._session.write(row, table, text, latents)

    def move(self, source: int, target: int) -> None:
        self._session.move(source, target)

    def launch(self, active: int) -> None:
        self._session.launch(active)
        if self._ends[self._at]:
            self._recorder.latents.append(self._session.read(0))
        self._at += 1

    def read(self, row: int) -> Float32:
        return self._session.read(row)

    def read_state(self, row: int) -> Float32:
        return self._session.read_state(row)


@dataclass(frozen=True, slots=True)
class Side:
    """A bundle or an engine set, opened for a comparison.

    Attributes:
        folder: Where it is.
        kind: `bundle` or `engines`.
        sha256: Of its manifest.
        pipe: It, loaded.
        recorder: What its step loop reports to.
        emulated: Whether what it has in FP32 computes as FP16 would; see `reelrt.calibration.emulated`.
    """

    folder: Path
    kind: str
    sha256: str
    pipe: TextToVideo
    recorder: Recorder
    emulated: bool = False

    @classmethod
    def open(cls, folder: Path, emulated: Path | None = None) -> Side:
        """Open one.

        Args:
            folder: A bundle or an engine set.
            emulated: An empty folder for the graphs that compute as FP16 would, if they shall; only a
                bundle's can. It has to last as long as the side.

        Raises:
            InputError: A bundle that cannot be emulated.
            IntegrityError: As `reelrt.runtime.unbuilt.open_pipeline`, as are the other errors.
        """
        recorder = Recorder()
        if emulated is not None:
            emulate_fp16(Bundle.load(folder), emulated)
        pipe = open_pipeline(emulated or folder, wrap=recorder.wrap)
        recorder.cfg = pipe.engines.pipeline.cfg
        kind, digest = kind_of(folder), sha256(folder / MANIFEST)
        return cls(folder, kind, digest, pipe, recorder, emulated is not None)

    @property
    def precisions(self) -> dict[str, str]:
        """Stage to the precision that its arithmetic stands for."""
        found = {name: engine.precision for name, engine in self.pipe.engines.engines.items()}
        half = {"fp32": "fp16"} if self.emulated else {}
        return {name: half.get(precision, precision) for name, precision in found.items()}

    def generate(
        self, prompt: str, *, seed: int, steps: int, guidance: float, solver: str
    ) -> tuple[Video, list[Float32]]:
        """A video, and the latents [C, F, h, w] after each of its steps.

        Raises:
            BackendError: An engine failed or produced numbers that are none; names this side.
        """
        try:
            video = self.pipe.generate(prompt, seed=seed, steps=steps, guidance=guidance, solver=solver)
        except BackendError as error:
            request = f"{counted(steps, 'step')}, seed {seed}, {prompt!r}"
            raise BackendError(f"{self.folder} failed at {request}: {error.message}", error.remedy) from error
        return video, self.recorder.latents

    def document(self) -> dict[str, Any]:
        """What it is, as plain JSON values."""
        engines = self.pipe.engines
        return {
            "folder": self.folder.resolve().name,
            "kind": self.kind,
            "sha256": self.sha256,
            "bundle_sha256": self.sha256 if self.kind == Bundle.kind else engines.bundle,
            "model": engines.pipeline.model.name,
            "model_sha256": engines.pipeline.model.sha256,
            "licence": engines.pipeline.model.licence,
            "precision": coarsest(self.precisions.values()),
            "precisions": self.precisions,
            **({"arithmetic": EMULATED} if self.emulated else {}),
            "weight_bytes": sum(engine.weight_bytes for engine in engines.engines.values()),
            "cfg": engines.pipeline.cfg,
            "backend": f"{engines.backend} {engines.backend_version}",
            "reelrt": engines.version,
        }


def precision(engines: EngineSet) -> str:
    """The coarsest of a side's stages."""
    return coarsest(engine.precision for engine in engines.engines.values())


def read(folder: Path) -> EngineSet:
    """What a side is, from its manifest and schedules: nothing else is verified or opened.

    Raises:
        IntegrityError: Neither a bundle nor an engine set, or its schedules are damaged.
    """
    check_either(folder)
    if kind_of(folder) == EngineSet.kind:
        found = EngineSet.load(folder, check=False)
    else:
        found = as_engines(Bundle.load(folder, check=False))
    verify(folder, {SCHEDULES: found.files.get(SCHEDULES, "")})
    return found


def check_alike(
    reference: EngineSet, candidate: EngineSet, solver: str, steps: Sequence[int], guidance: float
) -> None:
    """Refuse two sides whose videos could not be compared one by one.

    Args:
        reference: One of them; see `read`.
        candidate: The other.
        solver: The sampler that both shall use.
        steps: Denoising steps that both shall take.
        guidance: Guidance scale that both shall use.

    Raises:
        InputError: They come from different models, sizes or schedules.
        RangeError: One of them does not have the solver, a step count, or its own model's size.
    """
    sides = (reference, candidate)
    names = " and ".join(str(side.folder) for side in sides)
    ours, theirs = (side.pipeline for side in sides)
    if ours.model.sha256 != theirs.model.sha256:
        models = " and ".join(f"{each.model.name} ({each.model.sha256[:12]})" for each in (ours, theirs))
        raise InputError(
            f"{names} come from different models: {models}.",
            "Compare two that were exported from the same model folder.",
        )
    for name in GEOMETRY:
        one, other = getattr(ours.geometry, name), getattr(theirs.geometry, name)
        if one != other:
            raise InputError(f"{names} differ in their {name.replace('_', ' ')}: {one} and {other}.")
    for side in sides:
        limits = Limits(side)
        limits.latent_shape(None, None)
        for count in steps:
            limits.table(solver, count, guidance)
    for count in steps:
        one, other = (side.schedules.get(solver, count) for side in sides)
        if not _same_schedule(one, other):
            raise InputError(
                f"{names} hold different schedules of {solver} at {counted(count, 'step')}.",
                "Export both from the same model with the same version of diffusers.",
            )


def _same_schedule(one: Schedule, other: Schedule) -> bool:
    arrays = ("timesteps", "input_scale", "samples", "outputs", "init_noise_sigma")
    pairs = [(np.asarray(getattr(one, name)), np.asarray(getattr(other, name))) for name in arrays]
    return all(
        a.shape == b.shape and np.allclose(a, b, rtol=SCHEDULE_TOLERANCE, atol=SCHEDULE_TOLERANCE)
        for a, b in pairs
    )
