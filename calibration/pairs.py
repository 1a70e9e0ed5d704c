"""Pairs of videos of the same request, one by each side, and what was measured of each pair.

A measured pair is kept on disk under the hash of all it depends on, so that an interrupted or a larger
comparison measures only the rest. Knows no target and no report.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reelrt import __version__
from reelrt.bundle.files import atomic_files
from reelrt.calibration import fidelity
from reelrt.calibration.judge import Verdict, judge
from reelrt.calibration.prompts import pick_scenes
from reelrt.calibration.shapes import Scene, all_captions, all_scenes
from reelrt.calibration.sheet import Frames, small_frames
from reelrt.calibration.sides import Side
from reelrt.errors import InputError

KEPT = ".quality"
"""The folder, in the output folder, that holds measured pairs."""
FORMAT = 1
"""Of a kept pair; another means that it is measured anew."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of a comparison.

    Attributes:
        prompt: What to show.
        seed: Of the noise.
        scene: What the prompt means in the moving-shapes world; None when it means nothing there.
    """

    prompt: str
    seed: int
    scene: Scene | None


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """What was measured of two videos of the same request.

    Attributes:
        asked: The request.
        figures: `ssim`, `ssim_worst_frame`, `psnr_db`, `latent_errors` after each step, and, by
            side, `roughness` (None below 3 frames), `denoise_seconds` and `seen` (the judge's verdict;
            None when videos are not judged). Plain JSON values.
        frames: Some of the reference's, small; see `sheet.small_frames`.
        other: The same of the candidate's.
    """

    asked: Asked
    figures: dict[str, Any]
    frames: Frames
    other: Frames

    def right(self, side: str) -> dict[str, bool]:
        """Attribute to whether a side's video shows what was asked for."""
        scene, seen = self.asked.scene, self.figures["seen"]
        assert scene is not None
        return Verdict(**seen[side]).right(scene)

    @property
    def lost(self) -> list[str]:
        """The attributes that the reference has right and the candidate has not."""
        if self.figures["seen"] is None:
            return []
        candidate = self.right("candidate")
        return [name for name, right in self.right("reference").items() if right and not candidate[name]]

    def document(self) -> dict[str, Any]:
        """The pair as plain JSON values, without its frames."""
        return {"prompt": self.asked.prompt, "seed": self.asked.seed, **self.figures, "lost": self.lost}


def numbered(count: int, seed: int) -> list[Asked]:
    """So many requests for moving shapes, balanced over what they ask for; see `pick_scenes`."""
    scenes = pick_scenes(count, seed)
    return [Asked(scene.prompt, seed + index, scene) for index, scene in enumerate(scenes)]


def from_file(path: Path, seed: int, most: int) -> list[Asked]:
    """A request per line of a file; empty lines and those that begin with # are left out.

    Raises:
        InputError: It cannot be read, holds no prompt, or too many.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        fault = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise InputError(
            f"the prompts {str(path)!r} cannot be read: {fault}.",
            "Give a number of prompts, or a text file with a prompt in each line.",
        ) from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not 1 <= len(prompts) <= most:
        raise InputError(f"{path} holds {len(prompts)} prompts; 1 to {most:,} are possible.")
    scenes = {caption: scene for scene in all_scenes() for caption in all_captions(scene)}
    return [Asked(prompt, seed + index, scenes.get(prompt)) for index, prompt in enumerate(prompts)]


class Kept:
    """Measured pairs on disk, each under the hash of all it depends on.

    Attributes:
        folder: Where they are.

    Args:
        folder: Where they are; made when the first one is kept.
        reference: One side.
        candidate: The other.
        settings: What else every pair depends on: guidance, solver and so on.
    """

    def __init__(self, folder: Path, reference: Side, candidate: Side, settings: dict[str, Any]) -> None:
        self.folder = folder
        self._common = {
            "format": FORMAT,
            "reelrt": __version__,
            "reference": reference.sha256,
            "candidate": candidate.sha256,
            **({"emulated": True} if candidate.emulated else {}),
            **settings,
        }

    def path(self, asked: Asked, steps: int) -> Path:
        """Where a pair is kept."""
        key = {**self._common, "prompt": asked.prompt, "seed": asked.seed, "steps": steps}
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{name}.npz"

    def find(self, asked: Asked, steps: int) -> Pair | None:
        """A pair that was kept; None when it was not, or cannot be read any more."""
        unreadable = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
        with suppress(*unreadable), np.load(self.path(asked, steps), allow_pickle=False) as arrays:
            return Pair(asked, json.loads(str(arrays["figures"])), arrays["frames"], arrays["other"])
        return None

    def keep(self, pair: Pair, steps: int) -> None:
        """Keep a pair.

        Raises:
            OSError: The disk is full, say.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_files([self.path(pair.asked, steps)]) as (file,):
            np.savez(file, figures=json.dumps(pair.figures), frames=pair.frames, other=pair.other)

    @property
    def bytes(self) -> int:
        """What all pairs in the folder take, those of other comparisons too."""
        return sum(path.stat().st_size for path in self.folder.glob("*.npz"))

    def forget(self) -> None:
        """Remove every pair, those of other comparisons too, and the folder if nothing else is in it."""
        for path in self.folder.glob("*.npz"):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()


def measure_pair(
    reference: Side,
    candidate: Side,
    asked: Asked,
    *,
    steps: int,
    guidance: float,
    solver: str,
    judged: bool,
    candidate_first: bool,
) -> Pair:
    """Let both sides make a video of the same request, and compare the two.

    Args:
        reference: One side.
        candidate: The other; see `sides.check_alike`.
        asked: The request.
        steps: Denoising steps.
        guidance: Guidance scale.
        solver: Sampler.
        judged: Whether to judge both videos as moving shapes.
        candidate_first: Which one goes first, so that neither is always the one on a warm machine.

    Raises:
        BackendError: An engine failed or produced numbers that are none.
    """
    order = {"reference": reference, "candidate": candidate}
    if candidate_first:
        order = dict(reversed(order.items()))
    made = {
        name: side.generate(asked.prompt, seed=asked.seed, steps=steps, guidance=guidance, solver=solver)
        for name, side in order.items()
    }
    (one, latents), (other, others) = made["reference"], made["candidate"]
    videos = {"reference": one, "candidate": other}
    likeness = fidelity.ssim(one.frames, other.frames)
    figures = {
        "ssim": float(likeness.mean()),
        "ssim_worst_frame": float(likeness.min()),
        "psnr_db": fidelity.psnr(one.frames, other.frames),
        "latent_errors": fidelity.relative_errors(latents, others),
        "roughness": {name: fidelity.roughness(video.frames) for name, video in videos.items()},
        "denoise_seconds": {name: video.timings["denoise"] for name, video in videos.items()},
        "seen": {name: asdict(judge(video.frames)) for name, video in videos.items()} if judged else None,
    }
    return Pair(asked, figures, small_frames(one.frames), small_frames(other.frames))
