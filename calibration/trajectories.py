"""Trajectories: what the step graph really read on its way from noise to a video, kept on disk.

One file per prompt: the inputs of the step graph at some solver steps, and what the text encoder and the
VAE decoder read. Knows how they lie on the disk, and not how they come about (`recording.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save

from reelrt.bundle.files import atomic_files
from reelrt.bundle.manifest import Bundle
from reelrt.calibration.recorder import Feed
from reelrt.errors import InputError, IntegrityError
from reelrt.runtime.session import Array, Float32

DOCUMENT = "trajectories.json"


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
        folder: What `reelrt.calibration.recording.record` wrote.
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
        settings = read_settings(folder)
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
        return [prompt_file(self.folder, number) for number in range(len(self.settings.prompts))]

    def _count(self, path: Path) -> int:
        try:
            with safe_open(path, framework="numpy") as file:
                return int(file.get_slice("state").get_shape()[0])
        except Exception as error:  # the library raises its own and the system's
            raise IntegrityError(
                f"{path} is missing or damaged: {error}.", "Run `reelrt calibrate` again."
            ) from error


def read_settings(folder: Path) -> Settings | None:
    """What a folder's trajectories depend on; None when there are none.

    Raises:
        InputError: The folder is a file.
        IntegrityError: Its list is damaged.
    """
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


def prompt_file(folder: Path, number: int) -> Path:
    """Where a prompt's recording lies, by its place among the prompts."""
    return folder / f"prompt-{number:04d}.safetensors"


def write_prompt(
    path: Path,
    feeds: Sequence[tuple[int, Feed]],
    ids: npt.NDArray[np.int64],
    noise: Float32,
    latents: Float32,
) -> None:
    """Write what was recorded of one prompt.

    Args:
        path: The prompt's file; it appears when it is whole.
        feeds: Solver step and what the step graph read there, in the order of the schedule.
        ids: What the text encoder read, int64 [2, L].
        noise: Starting latents [C, F, h, w].
        latents: Final latents [C, F, h, w].

    Raises:
        OSError: It cannot be written; names the file.
    """
    data = {
        "state": np.stack([feed.state for _, feed in feeds]),
        "table": np.stack([feed.table[feed.row][None] for _, feed in feeds]),
        "index": np.array([index for index, _ in feeds], np.int64),
        "text": np.ascontiguousarray(feeds[0][1].text),
        "tokens": ids,
        "noise": noise,
        "latents": np.ascontiguousarray(latents),
    }
    try:
        with atomic_files([path]) as (partial,):
            partial.write_bytes(save(data))
    except OSError as error:  # a full disk does not say where
        raise OSError(error.errno, error.strerror, str(path)) from error


def fingerprint(prompts: Sequence[str]) -> str:
    """Hex SHA-256 of a set of prompts."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()
