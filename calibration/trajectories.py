"""Trajectories: what the step graph really reads on its way from noise to a video, kept on disk.

Real prompts go through the real loop; of each, the inputs of the step graph are kept at solver steps
spread over the whole schedule, without and with the prompt, and what the text encoder and the VAE
decoder read. One file per prompt, so that a stopped recording goes on where it was. Knows ONNX Runtime
as what runs a bundle, and nothing of quantisation.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save

from reelrt.bundle.files import atomic_files
from reelrt.bundle.manifest import TOKENIZER, Bundle, Pipeline
from reelrt.bundle.schedule import first_passes
from reelrt.calibration.recorder import Feed, Recorder
from reelrt.errors import InputError, IntegrityError
from reelrt.progress import Progress, silent
from reelrt.runtime.noise import MAX_SEED, check_seed
from reelrt.runtime.request import Limits
from reelrt.runtime.session import Array, Float32
from reelrt.runtime.text import Tokenizer
from reelrt.runtime.unbuilt import as_engines
from reelrt.wording import counted

SAMPLES_PER_PROMPT = 4
"""Solver steps that are kept of each prompt; with split guidance each gives two samples."""

DOCUMENT = "trajectories.json"
_GOLDEN = 0.618033988749895


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """What the step graph read at one launch of one video.

    Attributes:
        prompt: What was asked for.
        index: The solver step, 0 to steps - 1.
        timestep: What the network was told of it.
        conditional: Whether the network saw the prompt; with batched guidance it saw both texts.
        inputs: The graph's feed for a batch of 1: `state` float32 [1, R, C, F, h, w], `table` float32
            [1, 1, K], `step` int64 [1] of 0, `text` [1, 2, L, D].
    """

    prompt: str
    index: int
    timestep: float
    conditional: bool
    inputs: Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Settings:
    """What trajectories depend on.

    Attributes:
        bundle: SHA-256 of the bundle.
        model: Its model's name.
        prompts: In the order of recording.
        steps: Solver steps of each video.
        samples_per_prompt: Solver steps kept of each.
        guidance: Guidance scale.
        seed: Of the first video's noise; the next one takes the next.
        size: Width and height in pixels; None for the model's own.
        frames: None for the model's own.
    """

    bundle: str
    model: str
    prompts: tuple[str, ...]
    steps: int
    samples_per_prompt: int
    guidance: float
    seed: int
    size: tuple[int, int] | None = None
    frames: int | None = None


class Trajectories:
    """Recorded trajectories on disk; only what is asked for is read into memory.

    Attributes:
        folder: Where they are.
        settings: What was recorded.

    Args:
        folder: What `record` wrote.
        settings: The same.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        self._sizes = [self._count(path) for path in self._paths]

    @classmethod
    def load(cls, folder: Path) -> Trajectories:
        """Open a finished recording.

        Raises:
            IntegrityError: There is none, or a prompt of it is missing or damaged.
        """
        settings = _read_settings(folder)
        if settings is None:
            raise IntegrityError(f"{folder} has no {DOCUMENT}.", "Record it with `reelrt calibrate`.")
        return cls(folder, settings)

    def check(self, bundle: Bundle) -> None:
        """Refuse trajectories of another bundle.

        Raises:
            InputError: They were recorded with another one.
        """
        if self.settings.bundle != bundle.sha256:
            raise InputError(
                f"{self.folder} was recorded with another bundle of {self.settings.model} "
                f"({self.settings.bundle[:12]}...; {bundle.folder} is {bundle.sha256[:12]}...).",
                "Name another folder with --work, or remove that one.",
            )

    def __len__(self) -> int:
        """Number of samples."""
        return sum(self._sizes)

    def __iter__(self) -> Iterator[Sample]:
        """Every sample, prompt by prompt, in the order of the schedule."""
        for number in range(len(self._paths)):
            yield from self.samples(number)

    def samples(self, number: int) -> Iterator[Sample]:
        """The samples of one prompt, by its place among the prompts."""
        with safe_open(self._paths[number], framework="numpy") as file:
            index, table, text = (file.get_tensor(name) for name in ("index", "table", "text"))
            states = file.get_slice("state")
            for at in range(self._sizes[number]):
                inputs = {
                    "state": states[at : at + 1],
                    "table": table[at][None],
                    "step": np.zeros(1, np.int64),
                    "text": text[None],
                }
                first = bool(table[at, 0, 2] == 0)
                prompt = self.settings.prompts[number]
                yield Sample(prompt, int(index[at]), float(table[at, 0, 0]), not first, inputs)

    def tokens(self, number: int) -> npt.NDArray[np.int64]:
        """What the text encoder read for a prompt: the empty prompt's ids and its own, int64 [2, L]."""
        tokens: npt.NDArray[np.int64] = self._get(number, "tokens")
        return tokens

    def latents(self, number: int) -> Float32:
        """The final latents of a prompt, float32 [C, F, h, w]: what the VAE decoder reads."""
        latents: Float32 = self._get(number, "latents")
        return latents

    def noise(self, number: int) -> Float32:
        """The starting latents of a prompt, float32 [C, F, h, w], at the schedule's scale."""
        noise: Float32 = self._get(number, "noise")
        return noise

    def _get(self, number: int, name: str) -> Any:
        with safe_open(self._paths[number], framework="numpy") as file:
            return file.get_tensor(name)

    @property
    def _paths(self) -> list[Path]:
        return [_path(self.folder, number) for number in range(len(self.settings.prompts))]

    def _count(self, path: Path) -> int:
        try:
            with safe_open(path, framework="numpy") as file:
                return int(file.get_slice("state").get_shape()[0])
        except Exception as error:  # the library raises its own and the system's
            raise IntegrityError(
                f"{path} is missing or damaged: {error}.", "Run `reelrt calibrate` again."
            ) from error


def record(
    bundle_folder: Path,
    prompts: Sequence[str],
    folder: Path,
    *,
    steps: int = 25,
    samples_per_prompt: int = SAMPLES_PER_PROMPT,
    guidance: float | None = None,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    progress: Progress = silent,
) -> Trajectories:
    """Record the trajectories of prompts; goes on where an equal recording was stopped.

    Args:
        bundle_folder: The bundle, FP32.
        prompts: What to generate, with the model's own solver.
        folder: Where to keep them; made if missing.
        steps: Solver steps of each video.
        samples_per_prompt: Solver steps to keep of each, at most `steps`.
        guidance: Guidance scale. Default: the model's own.
        seed: Of the first video's noise; the next one takes the next.
        size: Width and height in pixels. Default: the model's own. Ranges can be found at a small one.
        frames: Of each video. Default: the model's own.
        progress: Told of the prompts that are done, as `trajectories`.

    Raises:
        InputError: No prompts, an impossible number, not enough disk, or a folder that holds another
            recording.
        IntegrityError: Not a bundle, or a damaged one.
        CalibrationError: The network produced numbers that are not finite; says at which step and layer.
    """
    bundle = Bundle.load(bundle_folder)
    settings = Settings(
        bundle=bundle.sha256,
        model=bundle.pipeline.model.name,
        prompts=tuple(prompts),
        steps=steps,
        samples_per_prompt=samples_per_prompt,
        guidance=bundle.pipeline.guidance if guidance is None else guidance,
        seed=seed,
        size=size,
        frames=frames,
    )
    _check(settings, bundle)
    _prepare(folder, settings, bundle)
    missing = [number for number in range(len(prompts)) if not _path(folder, number).exists()]
    progress("trajectories", len(prompts) - len(missing), len(prompts))
    if missing:
        recorder = Recorder(bundle)
        tokenizer = Tokenizer(bundle_folder / TOKENIZER, bundle.pipeline)
        for done, number in enumerate(missing, len(prompts) - len(missing) + 1):
            feeds: list[tuple[int, Feed]] = []
            wanted = set(stratified(steps, samples_per_prompt, number))

            def keep(feed: Feed, feeds: list[tuple[int, Feed]] = feeds, wanted: set[int] = wanted) -> None:
                index = solver_step(feed.table, feed.row)
                if index in wanted:
                    feeds.append((index, feed.copy()))

            with recorder.listen(keep):
                latents = recorder.denoise(
                    prompts[number],
                    steps=steps,
                    guidance=settings.guidance,
                    seed=seed + number,
                    size=size,
                    frames=frames,
                )
            ids = np.stack([tokenizer(text).ids for text in ("", prompts[number])])
            _write(_path(folder, number), _packed(feeds, ids, recorder.started, latents))
            progress("trajectories", done, len(prompts))
    return Trajectories(folder, settings)


def stratified(steps: int, count: int, number: int) -> list[int]:
    """Solver steps spread over the whole schedule: one of each of `count` equal parts of it.

    Where in its part differs from prompt to prompt by the golden ratio, so that a few prompts already
    cover every step.

    Args:
        steps: Solver steps of the schedule.
        count: How many to choose, at most `steps`.
        number: Of the prompt.
    """
    shift = (number * _GOLDEN) % 1
    return [int((part + shift) * steps / count) for part in range(count)]


def solver_step(table: Float32, row: int) -> int:
    """The solver step that a row of a table [S, K] belongs to; split guidance has two rows for one."""
    return int((~first_passes(table[:row])).sum()) if row else 0


def estimate_bytes(
    pipeline: Pipeline,
    prompts: int,
    samples_per_prompt: int = SAMPLES_PER_PROMPT,
    guidance: float | None = None,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
) -> int:
    """Bytes that `record` will write.

    Args:
        pipeline: Of the bundle.
        prompts: Number of prompts.
        samples_per_prompt: Solver steps kept of each.
        guidance: Guidance scale. Default: the model's own.
        size: Width and height in pixels. Default: the model's own.
        frames: Of each video. Default: the model's own.
    """
    geometry = pipeline.geometry
    width, height = size or (geometry.width, geometry.height)
    cells = (height // geometry.spatial_scale) * (width // geometry.spatial_scale)
    latents = 4 * geometry.latent_channels * (frames or geometry.frames) * cells
    sample = latents * geometry.state_rows + 4 * geometry.table_columns + 8
    text = 2 * geometry.tokens * (4 * geometry.text_width + 8)
    samples = count_samples(pipeline, prompts, samples_per_prompt, guidance)
    return samples * sample + prompts * (2 * latents + text)


def count_samples(
    pipeline: Pipeline, prompts: int, samples_per_prompt: int, guidance: float | None = None
) -> int:
    """Samples that `record` will keep; arguments as `estimate_bytes`."""
    guided = (pipeline.guidance if guidance is None else guidance) != 1
    return prompts * samples_per_prompt * (2 if pipeline.cfg == "split" and guided else 1)


def _check(settings: Settings, bundle: Bundle) -> None:
    check_seed(settings.seed)
    if settings.seed + len(settings.prompts) - 1 > MAX_SEED:
        raise InputError(
            f"seed {settings.seed} is too large for {counted(len(settings.prompts), 'prompt')}: each takes "
            "the next one."
        )
    limits = Limits(as_engines(bundle))
    limits.latent_shape(settings.frames, settings.size)
    if not settings.prompts:
        raise InputError("there are no prompts to record.", "Give a file with one prompt per line.")
    if settings.steps < 1:
        raise InputError(f"steps {settings.steps} is not possible: give 1 or more.")
    if not 1 <= settings.samples_per_prompt <= settings.steps:
        raise InputError(
            f"{settings.samples_per_prompt} samples per prompt are not possible with "
            f"{counted(settings.steps, 'step')}: give 1 to {settings.steps}."
        )
    limits.table(bundle.pipeline.solver, settings.steps, settings.guidance)


def _prepare(folder: Path, settings: Settings, bundle: Bundle) -> None:
    """Make the folder, or see that it holds the beginning of this very recording."""
    found = _read_settings(folder)
    if found is not None and found != settings:
        other = [name for name, value in asdict(settings).items() if getattr(found, name) != value]
        raise InputError(
            f"{folder} holds trajectories with other {', '.join(other)}.",
            "Name another folder with --work, or remove that one.",
        )
    needed = estimate_bytes(
        bundle.pipeline,
        len(settings.prompts),
        settings.samples_per_prompt,
        settings.guidance,
        settings.size,
        settings.frames,
    )
    there = next(each for each in (folder, *folder.resolve().parents) if each.exists())
    try:
        free = shutil.disk_usage(there).free
        if found is None and free < needed:
            raise InputError(
                f"the trajectories need {needed / 2**20:,.0f} MiB; "
                f"{folder} has {free / 2**20:,.0f} MiB free.",
                "Give fewer prompts or samples, or another folder with --work.",
            )
        folder.mkdir(parents=True, exist_ok=True)
        if found is None:
            with atomic_files([folder / DOCUMENT]) as (path,):
                path.write_text(json.dumps(asdict(settings), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}.") from error


def _read_settings(folder: Path) -> Settings | None:
    path = folder / DOCUMENT
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        size = data.get("size")
        lists = {"prompts": tuple(data["prompts"]), "size": None if size is None else tuple(size)}
        return Settings(**{**data, **lists})
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise InputError(
            f"{folder} is a file, where a folder for trajectories shall be.", "Name another one with --work."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(
            f"{path} cannot be read: {error}.", f"Remove {folder} and run `reelrt calibrate` again."
        ) from error


def _path(folder: Path, number: int) -> Path:
    return folder / f"prompt-{number:04d}.safetensors"


def _write(path: Path, data: bytes) -> None:
    try:
        with atomic_files([path]) as (partial,):
            partial.write_bytes(data)
    except OSError as error:  # a full disk does not say where
        raise OSError(error.errno, error.strerror, str(path)) from error


def _packed(
    feeds: Sequence[tuple[int, Feed]], ids: npt.NDArray[np.int64], noise: Float32, latents: Float32
) -> bytes:
    """A prompt's file."""
    return save(
        {
            "state": np.stack([feed.state for _, feed in feeds]),
            "table": np.stack([feed.table[feed.row][None] for _, feed in feeds]),
            "index": np.array([index for index, _ in feeds], np.int64),
            "text": np.ascontiguousarray(feeds[0][1].text),
            "tokens": ids,
            "noise": noise,
            "latents": np.ascontiguousarray(latents),
        }
    )


def fingerprint(prompts: Sequence[str]) -> str:
    """Hex SHA-256 of a set of prompts."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()
