"""Text to video: from a prompt and an engine set to frames.

`load` opens an engine set; `TextToVideo.generate` checks a request, drives the step loop and
decodes. Which library runs the engines stands behind `reelrt.runtime.session`.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from reelrt import __version__
from reelrt.bundle.manifest import TOKENIZER, EngineSet
from reelrt.bundle.spec import is_whole
from reelrt.errors import BackendError, Cancelled, InputError
from reelrt.progress import Progress, silent
from reelrt.runtime.device_array import DeviceArray
from reelrt.runtime.formats import Frames
from reelrt.runtime.loop import Request, Slot, StepLoop
from reelrt.runtime.memory import peak_memory
from reelrt.runtime.noise import starting_noise
from reelrt.runtime.ranges import span
from reelrt.runtime.request import Job, Limits, plan
from reelrt.runtime.saving import nowhere, saving, targets
from reelrt.runtime.session import Array, Float32, GpuSessions, Sessions, open_sessions, run_each
from reelrt.runtime.text import TextEncoder, Tokenizer
from reelrt.runtime.video import FilePath, Video, first_file

MOST_THREADS = 1024
CUT_SHOWN = 60
"""Letters of a prompt's cut end that a warning shows; the metadata keep all of it."""

Encoded = tuple[list[Request], float, list[dict[str, str]]]
"""The loop's requests, the seconds that encoding took, and per job which words did not fit."""

Denoised = tuple[Float32, float, dict[str, DeviceArray]]
"""Final latents [C, F, h, w], seconds in the batch, and what is kept on the GPU."""

Prompts = list[str] | tuple[str, ...]  # a str is a Sequence[str] too, so that would not tell them apart


def load(
    folder: FilePath,
    *,
    threads: int | None = None,
    check: bool = True,
    stream: object = None,
    residency: str | None = None,
) -> TextToVideo:
    """Open an engine set.

    Args:
        folder: What `reelrt build` or `make engines` wrote.
        threads: CPU threads of each engine; None takes one per physical core.
        check: Whether to verify the SHA-256 of every file first.
        stream: On a GPU, the CUDA stream to run on, of pycuda, CuPy, torch or any other library;
            it must outlive the pipeline. None makes one.
        residency: On a GPU, `all` engines in its memory, `staged`, one at a time, or `streamed`, with
            what does not fit of the step's weights left to the host. None takes the first that fits.

    Raises:
        InputError: An impossible number of threads, stream or residency.
        DeviceMemoryError: The engines do not fit into the GPU's memory.
        IntegrityError: Not an engine set, or a file of it is missing or damaged.
        CompatibilityError: It was built for another backend version, device or machine.
        BackendError: No session of this version runs it, or its backend cannot open it.
    """
    if threads is not None and not (is_whole(threads) and 1 <= threads <= MOST_THREADS):
        raise InputError(f"threads {threads!r} is not possible: give a number from 1 to {MOST_THREADS}.")
    engines = EngineSet.load(Path(folder), check)
    return TextToVideo(engines, open_sessions(engines, threads, stream=stream, residency=residency))


class TextToVideo:
    """A loaded text-to-video pipeline. Calls from several threads take turns.

    While one call denoises, the prompts of the next one are encoded already.

    Attributes:
        engines: The engine set it runs.

    Args:
        engines: The engine set.
        sessions: The same, opened.
    """

    def __init__(self, engines: EngineSet, sessions: Sessions) -> None:
        self.engines = engines
        self._sessions = sessions
        self._limits = Limits(engines)
        self._text = TextEncoder(Tokenizer(engines.folder / TOKENIZER, engines.pipeline), sessions)
        self._loop: tuple[tuple[int, ...], StepLoop] | None = None
        self._turn, self._inside = threading.Lock(), set[int]()
        # Where stages take turns, a prompt would stop the video that is being made; where one engine is
        # loaded at a time, it would throw the step's out.
        self._encodes_ahead = not isinstance(sessions, GpuSessions) or sessions.overlaps

    @property
    def solvers(self) -> tuple[str, ...]:
        """The solvers `generate` takes, in no order of merit."""
        return self._limits.schedules.solvers

    @property
    def limits(self) -> Limits:
        """What the engines accept, and the schedules."""
        return self._limits

    @property
    def sessions(self) -> Sessions:
        """The opened engines. Stages but the step may run beside a step loop of theirs."""
        return self._sessions

    @property
    def text(self) -> TextEncoder:
        """Prompts to embeddings; any thread may ask, also while a step loop runs."""
        return self._text

    @overload
    def generate(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        steps: int = 25,
        guidance: float | None = None,
        seed: int | Sequence[int] | None = None,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        solver: str | None = None,
        latents: Any = None,
        on_device: bool = False,
        save_to: FilePath | Sequence[FilePath] | None = None,
        fps: float = 8,
        progress: Progress | None = None,
        should_cancel: Callable[[], bool] | None = None,
    ) -> Video: ...

    @overload
    def generate(
        self,
        prompt: Prompts,
        *,
        negative_prompt: str = "",
        steps: int = 25,
        guidance: float | None = None,
        seed: int | Sequence[int] | None = None,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        solver: str | None = None,
        latents: Any = None,
        on_device: bool = False,
        save_to: FilePath | Sequence[FilePath] | None = None,
        fps: float = 8,
        progress: Progress | None = None,
        should_cancel: Callable[[], bool] | None = None,
    ) -> list[Video]: ...

    def generate(
        self,
        prompt: str | Prompts,
        *,
        negative_prompt: str = "",
        steps: int = 25,
        guidance: float | None = None,
        seed: int | Sequence[int] | None = None,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        solver: str | None = None,
        latents: Any = None,
        on_device: bool = False,
        save_to: FilePath | Sequence[FilePath] | None = None,
        fps: float = 8,
        progress: Progress | None = None,
        should_cancel: Callable[[], bool] | None = None,
    ) -> Video | list[Video]:
        """Make a video of each prompt.

        Several prompts share the batch; when there are more than it holds, the next one takes
        the place of the first to finish. On one backend a request gives the same bytes whatever
        else is in the batch.

        Args:
            prompt: What to show, or several of them.
            negative_prompt: What to steer away from.
            steps: Number of denoising steps.
            guidance: Classifier-free guidance scale; 1 is none. Default: the model's own.
            seed: Of the starting noise, 0 to 2**63 - 1. Several prompts take seed, seed + 1 and
                so on, or one each from a sequence. Default: drawn, and kept in the metadata.
            frames: Number of frames. Default: the model's own.
            size: (width, height) in pixels. Default: the model's own.
            solver: One of `solvers`. Default: the model's own.
            latents: Starting noise of unit variance instead of a seed, float32 [1, C, F, h, w] for
                every prompt or [N, C, F, h, w] for N prompts; it sets frames and size. See
                `starting_latents`. On a GPU also an array in its memory, of pycuda, CuPy, torch or any
                other library, which is read there; only solvers that scale their noise (Euler) take
                it through the host.
            on_device: On a GPU, whether to keep latents and frames in its memory as well; see
                `Video.on_device`.
            save_to: Where to write the videos, a path for one prompt and one each for several: the
                files that `Video.save` gives. Frames are encoded while later ones are decoded; each
                file appears when it is whole.
            fps: Frames per second of the files.
            progress: Told of the stages `text` (prompts), `denoise` (launches) and `decode`
                (frames).
            should_cancel: Asked between launches (`threading.Event().is_set`, say).

        Returns:
            A video for one prompt, a list in the order of the prompts for several.

        Raises:
            InputError: An empty prompt, any value that is not possible, or a file that cannot be written.
            RangeError: Steps, solver, frames or size that the engines do not take.
            Cancelled: `should_cancel` said so. The pipeline stays usable, as after Ctrl-C; no file is
                left half-written.
            BackendError: An engine failed or produced numbers that are none.
        """
        jobs = plan(
            self._limits,
            [prompt] if isinstance(prompt, str) else prompt,
            negative_prompt=negative_prompt,
            steps=steps,
            guidance=guidance,
            seed=seed,
            frames=frames,
            size=size,
            solver=solver,
            latents=latents,
            sessions=self._sessions,
        )
        if on_device and not isinstance(self._sessions, GpuSessions):
            raise InputError("on_device is for engines of a GPU, and these run on the CPU.")
        paths = targets(save_to, len(jobs), fps)
        me, told = threading.get_ident(), _checked(progress or silent, should_cancel or (lambda: False))
        if me in self._inside:
            raise InputError("generate was called from its own progress or should_cancel.")
        try:
            self._inside.add(me)
            encoded = self._encode(jobs, told) if self._encodes_ahead else None
            with self._turn:
                videos = self._run(jobs, encoded or self._encode(jobs, told), paths, fps, told, on_device)
        finally:
            self._inside.discard(me)
        return videos[0] if isinstance(prompt, str) else videos

    def starting_latents(
        self, seed: int, *, frames: int | None = None, size: tuple[int, int] | None = None
    ) -> Float32:
        """The noise that `generate` starts from for a seed, float32 [1, C, F, h, w].

        Raises:
            RangeError: Frames or size that the engines do not take.
            InputError: An impossible seed.
        """
        return starting_noise(seed, self._limits.latent_shape(frames, size))[None]

    def decode(self, latents: Float32) -> Iterator[Frames]:
        """Turn final latents into frames, a few at a time, so that they can be encoded meanwhile.

        Args:
            latents: float32 [1, C, F, h, w].

        Returns:
            An iterator of RGB frames, uint8 [n, H, W, 3], F of them in all.

        Raises:
            InputError: Another shape, or numbers that are not finite.
            RangeError: A size outside the engines' profile.
        """
        self._limits.starts(latents, 1)
        return self._decode(latents)

    def _decode(self, latents: Float32, target: DeviceArray | None = None) -> Iterator[Frames]:
        """As `decode`; frames are copied to `target` [F, H, W, 3] in the GPU's memory as well."""
        size = self._limits.decoder_frames
        parts = (
            np.ascontiguousarray(latents[:, :, begin : begin + size])
            for begin in range(0, latents.shape[2], size)
        )
        into = None if target is None else [{"frames": part} for part in target.split(size)]
        for outputs in run_each(self._sessions, "vae_decoder", ({"latents": part} for part in parts), into):
            yield outputs["frames"][0]

    def _run(
        self,
        jobs: Sequence[Job],
        encoded: Encoded,
        paths: Sequence[Path | None],
        fps: float,
        told: Progress,
        on_device: bool,
    ) -> list[Video]:
        requests, text_seconds, cuts = encoded
        for words in dict.fromkeys(words for cut in cuts for words in cut.values()):
            length = self.engines.pipeline.geometry.tokens
            shown = words if len(words) <= CUT_SHOWN else f"{words[:CUT_SHOWN]}…"
            count = f"{len(words.split())} words were" if " " in words else "this was"
            message = f"a prompt is longer than the model's {length} tokens; {count} cut: {shown!r}"
            warnings.warn(message, UserWarning, stacklevel=3)
        denoised = self._denoise(requests, told, on_device)
        videos: list[Video] = []
        total = sum(job.shape[1] for job in jobs)
        for job, cut, path, (latents, denoise_seconds, kept) in zip(jobs, cuts, paths, denoised, strict=True):
            metadata, parts, frames = self.metadata(job, cut), list[Frames](), job.shape[1]
            timings = {"text": text_seconds, "denoise": denoise_seconds}
            began = time.perf_counter()
            if "latents" in kept:
                kept["frames"] = self._empty_frames(metadata)
            with nowhere() if path is None else saving(path, frames, metadata, fps) as take:
                for part in self._decode(latents[None], kept.get("frames")):
                    parts.append(part)
                    take(part)
                    told("decode", sum(map(len, parts)) + len(videos) * frames, total)
                decoded = time.perf_counter()
            timings["decode"] = decoded - began
            if path is not None:
                timings["encode"] = time.perf_counter() - decoded
            file = path and first_file(path, frames)
            videos.append(
                Video(np.concatenate(parts), latents[None], metadata, timings, peak_memory(), file, kept)
            )
        return videos

    def _encode(self, jobs: Sequence[Job], progress: Progress) -> Encoded:
        began, requests, cuts = time.perf_counter(), [], []
        for done, job in enumerate(jobs):
            progress("text", done, len(jobs))
            request, cut = self.encode(job)
            requests.append(request)
            cuts.append(cut)
        progress("text", len(jobs), len(jobs))
        return requests, time.perf_counter() - began, cuts

    def encode(self, job: Job) -> tuple[Request, dict[str, str]]:
        """What the loop needs of a job, and which words did not fit: `cut`, `negative_cut` or neither.

        Raises:
            BackendError: The text encoder failed.
        """
        (negative, negative_cut), (positive, cut) = map(self._text, (job.negative_prompt, job.prompt))
        cuts = {"cut": cut, "negative_cut": negative_cut}
        request = Request(job.table, np.stack([negative, positive]), job.latents)
        return request, {name: words for name, words in cuts.items() if words}

    def _empty_frames(self, metadata: Mapping[str, Any]) -> DeviceArray:
        """Room for a video's frames on the GPU."""
        assert isinstance(self._sessions, GpuSessions)
        shape = metadata["frames"], metadata["height"], metadata["width"], 3
        return self._sessions.empty(shape, np.uint8)

    def _denoise(self, requests: Sequence[Request], progress: Progress, on_device: bool) -> list[Denoised]:
        """What became of the requests, in their order."""
        loop = self._open_loop(requests[0].latents.shape)
        waiting = deque(enumerate(requests))
        running: dict[Slot, tuple[int, float]] = {}
        results: dict[int, Denoised] = {}
        done, total = 0, sum(len(request.table) for request in requests)
        try:
            with span("denoise"):
                while waiting or running:
                    while waiting and loop.free:
                        index, request = waiting.popleft()
                        running[loop.admit(request)] = index, time.perf_counter()
                    progress("denoise", done, total)
                    loop.step()
                    done += len(running)
                    for slot in [slot for slot in running if slot.finished]:
                        index, began = running.pop(slot)
                        latents = check_finite(loop.latents(slot))
                        kept = {"latents": self._kept(loop, slot)} if on_device else {}
                        results[index] = latents, time.perf_counter() - began, kept
                        loop.release(slot)
            progress("denoise", total, total)
        finally:
            loop.clear()
        return [results[index] for index in range(len(requests))]

    def _kept(self, loop: StepLoop, slot: Slot) -> DeviceArray:
        """A copy of final latents on the GPU, [1, C, F, h, w]."""
        assert isinstance(self._sessions, GpuSessions)
        copy = self._sessions.copy(loop.view(slot))
        return replace(copy, shape=(1, *copy.shape))

    def _open_loop(self, shape: tuple[int, ...]) -> StepLoop:
        """The loop for a latent shape; the last one's buffers are kept."""
        if self._loop is None or self._loop[0] != shape:
            self._loop = None  # its buffers go before the new ones come
            channels, frames, height, width = shape
            self._loop = shape, StepLoop(self._sessions.open_step((channels, frames, height, width)))
        return self._loop[1]

    def metadata(self, job: Job, cut: dict[str, str]) -> dict[str, Any]:
        """How a job's video was made; see `Video.metadata`."""
        model = self.engines.pipeline.model
        _, frames, height, width = job.shape
        scale = self.engines.pipeline.geometry.spatial_scale
        return {
            "prompt": job.prompt,
            "negative_prompt": job.negative_prompt,
            **cut,
            "seed": job.seed,
            "steps": job.steps,
            "guidance": job.guidance,
            "solver": job.solver,
            "width": width * scale,
            "height": height * scale,
            "frames": frames,
            "model": model.name,
            "model_sha256": model.sha256,
            "backend": f"{self.engines.backend} {self.engines.backend_version}",
            "precision": self.engines.engines["step"].precision,
            "reelrt": __version__,
        }


def _checked(progress: Progress, should_cancel: Callable[[], bool]) -> Progress:
    """Tells progress, then asks whether to go on."""

    def told(stage: str, done: int, total: int) -> None:
        progress(stage, done, total)
        if should_cancel():
            raise Cancelled(f"cancelled during {stage}.")

    return told


def check_finite(latents: Array) -> Float32:
    """Final latents as they are.

    Raises:
        BackendError: They hold numbers that are not finite.
    """
    if not np.isfinite(latents).all():
        raise BackendError(
            "the step engine produced numbers that are not finite.",
            "Build the engines with `--precision fp32`, or use a lower guidance scale.",
        )
    return latents
