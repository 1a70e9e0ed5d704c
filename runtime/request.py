"""A request, checked once at the boundary and turned into what the loop and the metadata need.

Knows the ranges of the engine set in the user's own units. Runs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reelrt.bundle.manifest import EngineSet
from reelrt.bundle.schedule import MAX_GUIDANCE
from reelrt.bundle.spec import is_whole
from reelrt.errors import InputError, RangeError
from reelrt.runtime.device_array import DeviceArray, is_on_device
from reelrt.runtime.noise import check_seed, draw_seed, starting_noise
from reelrt.runtime.session import Float32, GpuSessions, Sessions
from reelrt.wording import counted

Shape = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One video to make.

    Attributes:
        prompt: What to show.
        negative_prompt: What to steer away from.
        seed: Of its starting noise; None when the latents were given.
        steps: Denoising steps.
        guidance: Guidance scale.
        solver: Solver's name.
        shape: Of the latents: (C, F, h, w).
        table: The schedule's rows, float32 [S, K].
        latents: Starting latents at the schedule's scale, float32 [C, F, h, w]; in the GPU's memory
            where they were given there.
    """

    prompt: str
    negative_prompt: str
    seed: int | None
    steps: int
    guidance: float
    solver: str
    shape: Shape
    table: Float32
    latents: Float32 | DeviceArray


class Limits:
    """What the engines of a set accept together, in pixels, frames and steps.

    Args:
        engines: The engine set.
    """

    def __init__(self, engines: EngineSet) -> None:
        self.pipeline, self.geometry = engines.pipeline, engines.pipeline.geometry
        self.schedules = engines.schedules
        self._built = engines.is_built
        self._step = engines.engines["step"].profile
        self._decoder = engines.engines["vae_decoder"].profile

    @property
    def decoder_frames(self) -> int:
        """Latent frames per call of the decoder."""
        return self._decoder["frames"].opt

    def latent_shape(self, frames: int | None, size: tuple[int, int] | None) -> Shape:
        """Latents' (C, F, h, w) for a number of frames and a (width, height) in pixels.

        Raises:
            InputError: Not whole numbers, or the size is no multiple of what the model needs.
            RangeError: Outside the engines' profile.
        """
        geometry = self.geometry
        frames = geometry.frames if frames is None else frames
        width, height = (geometry.width, geometry.height) if size is None else _pair(size)
        if not is_whole(frames):
            raise InputError(f"frames {frames!r} is not a whole number.")
        for name, value in (("width", width), ("height", height)):
            if not is_whole(value) or value <= 0 or value % geometry.size_multiple:
                raise InputError(f"{name} {value!r} is not a multiple of {geometry.size_multiple} pixels.")
        self._step["frames"].check("frames", frames, built=self._built)
        scale = geometry.spatial_scale
        for profile in (self._step, self._decoder):
            profile["width"].check("width", width // scale, scale, self._built)
            profile["height"].check("height", height // scale, scale, self._built)
        return geometry.latent_channels, int(frames), int(height) // scale, int(width) // scale

    def table(self, solver: str, steps: int, guidance: float) -> tuple[Float32, float]:
        """A schedule's table and the standard deviation of its starting latents.

        Raises:
            InputError: Steps or guidance are no such numbers.
            RangeError: The solver or step count was not compiled, or the engines' table is too
                short for it.
        """
        if not is_whole(steps):
            raise InputError(f"steps {steps!r} is not a whole number.")
        check_guidance(guidance)
        schedule = self.schedules.get(solver, steps)
        cfg, room = self.pipeline.cfg, self._step["rows"].max
        if schedule.rows(guidance, cfg) > room:
            most = room // 2 if cfg == "split" and guidance != 1 else room
            raise RangeError("steps", steps, f"these engines take up to {most} at this guidance")
        return schedule.table(guidance, cfg, self.geometry.state_rows), schedule.init_noise_sigma

    def device_starts(self, latents: Any, count: int, sessions: Sessions | None) -> list[DeviceArray]:
        """Check starting latents in the GPU's memory, whose values nobody sees, as `starts` does.

        Raises:
            InputError: Another shape or dtype, or engines that run on the CPU.
            RangeError: A size outside the engines' profile.
        """
        if not isinstance(sessions, GpuSessions):
            raise InputError(
                "the latents lie in a GPU's memory, and these engines run on the CPU.", "Give a NumPy array."
            )
        found = sessions.receive(latents)
        self._check_shape(found.shape, count)
        if found.dtype != np.float32:
            raise InputError(f"the latents in the GPU's memory are {found.dtype}.", "Make them float32.")
        return [found[index % found.shape[0]] for index in range(count)]

    def _check_shape(self, shape: tuple[int, ...], count: int) -> None:
        geometry, scale = self.geometry, self.geometry.spatial_scale
        if len(shape) != 5 or shape[0] not in (1, count) or shape[1] != geometry.latent_channels:
            raise InputError(
                f"latents have shape {shape}; give [1 or {count}, {geometry.latent_channels}, "
                "frames, height, width] in latent cells."
            )
        self.latent_shape(shape[2], (shape[4] * scale, shape[3] * scale))

    def starts(self, latents: Float32, count: int) -> list[Float32]:
        """Check given starting latents, one for each of several prompts.

        Args:
            latents: float32 [1, C, F, h, w] for all prompts, or [count, C, F, h, w].
            count: Number of prompts.

        Raises:
            InputError: Another shape or dtype, or numbers that are not finite.
            RangeError: A size outside the engines' profile.
        """
        try:
            shape = np.shape(latents)
        except ValueError as error:
            raise InputError(f"latents are no array: {error}.") from error
        self._check_shape(shape, count)
        latents = np.asarray(latents)
        if latents.dtype.kind != "f" or not np.isfinite(latents).all():
            raise InputError("latents are not all finite floating-point numbers.")
        with np.errstate(over="ignore"):
            small = latents.astype(np.float32)
        if not np.isfinite(small).all():
            raise InputError(
                f"latents are as large as {np.abs(latents).max():.1e}, which float32 does not hold."
            )
        return [small[index % len(small)].copy() for index in range(count)]


def plan(
    limits: Limits,
    prompts: Sequence[str],
    *,
    negative_prompt: str,
    steps: int,
    guidance: float | None,
    seed: int | Sequence[int] | None,
    frames: int | None,
    size: tuple[int, int] | None,
    solver: str | None,
    latents: Any,
    sessions: Sessions | None = None,
) -> list[Job]:
    """Check a call of `TextToVideo.generate` and make a job of each prompt.

    Raises:
        InputError: See `TextToVideo.generate`.
        RangeError: As above.
    """
    if not isinstance(prompts, list | tuple):
        raise InputError(f"the prompt is a {type(prompts).__name__}.", "Give a text, or a list of texts.")
    if not prompts:
        raise InputError("no prompt was given.")
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"the prompt {prompt!r} is empty or no text.", "Say what the video shall show.")
        _check_text(prompt)
    if not isinstance(negative_prompt, str):
        raise InputError(f"the negative prompt {negative_prompt!r} is no text.")
    _check_text(negative_prompt)
    solver = limits.pipeline.solver if solver is None else solver
    guidance = limits.pipeline.guidance if guidance is None else guidance
    table, sigma = limits.table(solver, steps, guidance)
    seeds: Sequence[int | None]
    starts: Sequence[Float32 | DeviceArray]
    if latents is None:
        shape = limits.latent_shape(frames, size)
        seeds = _seeds(seed, len(prompts))
        starts = [starting_noise(each, shape) for each in seeds if each is not None]
    else:
        given = limits.device_starts(latents, len(prompts), sessions) if is_on_device(latents) else None
        seeds, starts = [None] * len(prompts), given or limits.starts(latents, len(prompts))
        shape = _same_shape(starts[0].shape, limits, seed, frames, size)
    return [
        Job(
            prompt=prompt,
            negative_prompt=negative_prompt,
            seed=each,
            steps=int(steps),
            guidance=float(guidance),
            solver=solver,
            shape=shape,
            table=table,
            latents=_scaled(start, np.float32(sigma), sessions),
        )
        for prompt, each, start in zip(prompts, seeds, starts, strict=True)
    ]


def _scaled(
    start: Float32 | DeviceArray, sigma: np.float32, sessions: Sessions | None
) -> Float32 | DeviceArray:
    """Latents at the schedule's scale. Most schedules have 1; for the others the host has to multiply."""
    if not isinstance(start, DeviceArray):
        return start * sigma
    if sigma == 1:
        return start
    assert isinstance(sessions, GpuSessions)
    fetched: Float32 = sessions.fetch(start)
    return fetched * sigma


def check_guidance(guidance: Any) -> None:
    """Refuse an impossible guidance scale.

    Raises:
        InputError: It is no number that a schedule takes.
    """
    if not _number(guidance) or not 0 <= guidance <= MAX_GUIDANCE:
        raise InputError(f"guidance {guidance!r} is not possible: give a number from 0 to {MAX_GUIDANCE}.")


def _check_text(text: str) -> None:
    """Refuse what no tokenizer reads; a terminal's words need not be UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt {text!r} is not UTF-8.", "Write it in UTF-8.") from error


def _seeds(seed: Any, count: int) -> list[int]:
    if seed is None:
        seed = draw_seed()
    if isinstance(seed, list | tuple | range | np.ndarray):
        if len(seed) != count:
            raise InputError(f"{counted(len(seed), 'seed')} for {counted(count, 'prompt')}; give one each.")
        seeds = [*seed]
    else:
        check_seed(seed)
        seeds = [int(seed) + index for index in range(count)]
    for each in seeds:
        check_seed(each)
    return seeds


def _same_shape(
    shape: tuple[int, ...],
    limits: Limits,
    seed: int | Sequence[int] | None,
    frames: int | None,
    size: tuple[int, int] | None,
) -> Shape:
    """The shape of given latents, if nothing else that was asked for contradicts it."""
    if seed is not None:
        raise InputError("both seed and latents were given; the latents are the noise of a seed.")
    channels, count, height, width = shape
    scale = limits.geometry.spatial_scale
    own = (width * scale, height * scale)
    if frames not in (None, count):
        raise InputError(
            f"frames {frames} was asked for, and latents of {counted(count, 'frame')} were given."
        )
    if size is not None and _pair(size) != own:
        raise InputError(f"size {_pair(size)} was asked for, and latents of size {own} were given.")
    return channels, count, height, width


def _pair(size: tuple[int, int]) -> tuple[int, int]:
    try:
        width, height = size
    except (TypeError, ValueError):
        raise InputError(f"size {size!r} is not (width, height).") from None
    return width, height


def _number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
