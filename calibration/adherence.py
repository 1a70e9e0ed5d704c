"""How often generated videos show what their prompts asked for: generate, judge, count.

Knows the public runtime, the judge and the moving-shapes world; writes no files.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from reelrt.calibration.judge import ATTRIBUTES, Verdict, judge
from reelrt.calibration.prompts import pick_prompts, pick_scenes
from reelrt.calibration.shapes import Scene
from reelrt.errors import InputError
from reelrt.progress import Progress, silent
from reelrt.runtime.noise import check_seed
from reelrt.runtime.pipeline import TextToVideo
from reelrt.runtime.video import Video

EVERYTHING = "everything"
"""What counts the videos that have every attribute right."""

SCORED = (*ATTRIBUTES, EVERYTHING)
MOST_PROMPTS = 10_000
# Two-sided 95 % quantile of the normal distribution.
QUANTILE = 1.959964


@dataclass(frozen=True, slots=True)
class Score:
    """How many of some videos are right.

    Attributes:
        right: Number of videos.
        of: Number of all.
    """

    right: int
    of: int

    @property
    def percent(self) -> float:
        """The share that is right."""
        return 100 * self.right / self.of

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share, in percent (Wilson 1927, JASA 22, 209-212)."""
        share, weight = self.right / self.of, QUANTILE**2 / self.of
        middle = share + weight / 2
        half = math.sqrt(weight * share * (1 - share) + weight**2 / 4)
        low, high = (100 * (middle + sign * half) / (1 + weight) for sign in (-1, 1))
        return max(low, 0.0), min(high, 100.0)

    def document(self) -> dict[str, Any]:
        """The score as plain JSON values."""
        low, high = self.interval
        return {"right": self.right, "of": self.of, "percent": self.percent, "interval_percent": [low, high]}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One judged video.

    Attributes:
        scene: What was asked for.
        prompt: In which words.
        seed: Of its starting noise.
        verdict: What it shows.
    """

    scene: Scene
    prompt: str
    seed: int
    verdict: Verdict

    @property
    def right(self) -> dict[str, bool]:
        """Which attributes are as asked."""
        return self.verdict.right(self.scene)

    @property
    def failed(self) -> list[str]:
        """The attributes that are not."""
        return [name for name, right in self.right.items() if not right]

    def document(self) -> dict[str, Any]:
        """The outcome as plain JSON values."""
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "asked": asdict(self.scene),
            "seen": asdict(self.verdict),
            "failed": self.failed,
        }


@dataclass(frozen=True, slots=True)
class Adherence:
    """The outcomes of a set of prompts under the same settings.

    Attributes:
        settings: How the videos were made: `steps`, `guidance`, `solver`, `model_sha256` and so
            on, as in `Video.metadata`.
        outcomes: One per video, at least one.
    """

    settings: Mapping[str, Any]
    outcomes: Sequence[Outcome]

    @property
    def scores(self) -> dict[str, Score]:
        """Attribute to score; `everything` comes last."""
        rights = [{**outcome.right, EVERYTHING: not outcome.failed} for outcome in self.outcomes]
        return {name: Score(sum(right[name] for right in rights), len(rights)) for name in SCORED}

    def breakdown(self, attribute: str) -> dict[str, Score]:
        """Score of an attribute by its value that was asked for; `smooth` by motion."""
        asked = "motion" if attribute == "smooth" else attribute
        groups: dict[str, list[bool]] = {}
        for outcome in self.outcomes:
            groups.setdefault(getattr(outcome.scene, asked), []).append(outcome.right[attribute])
        return {value: Score(sum(right), len(right)) for value, right in sorted(groups.items())}

    def confusion(self, attribute: str) -> dict[str, dict[str, int]]:
        """Value that was asked for, to value that was seen (`none` for none), to number of videos."""
        counts: dict[str, Counter[str]] = {}
        for outcome in self.outcomes:
            seen = getattr(outcome.verdict, attribute) or "none"
            counts.setdefault(getattr(outcome.scene, attribute), Counter())[seen] += 1
        return {asked: dict(sorted(seen.items())) for asked, seen in sorted(counts.items())}

    def below(self, minimum: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        """Attributes whose percentage is below a minimum, with both."""
        percent = {name: score.percent for name, score in self.scores.items()}
        return {name: (percent[name], least) for name, least in minimum.items() if percent[name] < least}

    def document(self, *, videos: bool = True) -> dict[str, Any]:
        """The result as plain JSON values.

        Args:
            videos: Whether to hold every video's outcome, too.
        """
        worded = [name for name in ATTRIBUTES if name != "smooth"]
        found = {
            "settings": dict(self.settings),
            "scores": {name: score.document() for name, score in self.scores.items()},
            "by_value": {
                name: {value: score.document() for value, score in self.breakdown(name).items()}
                for name in ATTRIBUTES
            },
            "asked_and_seen": {name: self.confusion(name) for name in worded},
        }
        return {**found, "videos": [outcome.document() for outcome in self.outcomes]} if videos else found


def check_prompts(count: int) -> None:
    """Refuse an impossible number of prompts.

    Raises:
        InputError: It is below 1 or above 10,000.
    """
    if not 1 <= count <= MOST_PROMPTS:
        raise InputError(f"prompts {count} is not possible: give a number from 1 to {MOST_PROMPTS:,}.")


def measure(
    pipe: TextToVideo,
    *,
    prompts: int = 200,
    paraphrases: bool = False,
    steps: int = 25,
    guidance: float | None = None,
    solver: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    look: Callable[[Outcome, npt.NDArray[np.uint8]], None] | None = None,
) -> Adherence:
    """Generate a video for each of a set of prompts, and judge it from its pixels alone.

    Args:
        pipe: A loaded pipeline of a model that was trained on moving shapes.
        prompts: Number of prompts, balanced over what they ask for.
        paraphrases: Whether to ask in other words than the canonical sentence.
        steps: Denoising steps.
        guidance: Guidance scale. Default: the model's own.
        solver: Sampler. Default: the model's own.
        seed: Of the prompts' choice; the noise takes seed, seed + 1 and so on.
        progress: Told of the videos that are done.
        look: Called with each outcome and its frames, uint8 [F, H, W, 3], which are not kept.

    Raises:
        InputError: An impossible number of prompts or seed, and as `TextToVideo.generate`.
        RangeError: As `TextToVideo.generate`.
    """
    check_prompts(prompts)
    check_seed(seed)
    scenes = pick_scenes(prompts, seed)
    words = pick_prompts(scenes, seed, paraphrases=paraphrases)
    settings: dict[str, Any] = {}
    outcomes: list[Outcome] = []
    for video in _videos(pipe, words, steps, guidance, solver, seed, progress or silent):
        settings = settings or _settings(video)
        index = len(outcomes)
        outcomes.append(Outcome(scenes[index], words[index], seed + index, judge(video.frames)))
        if look:
            look(outcomes[-1], video.frames)
    return Adherence({**settings, "seed": seed, "paraphrases": paraphrases}, outcomes)


def _videos(
    pipe: TextToVideo,
    prompts: Sequence[str],
    steps: int,
    guidance: float | None,
    solver: str | None,
    seed: int,
    progress: Progress,
) -> Iterator[Video]:
    """A video per prompt, a full batch at a time."""
    batch = pipe.engines.engines["step"].profile["batch"].max
    scale = pipe.engines.pipeline.guidance if guidance is None else guidance
    what = f"videos at guidance {scale:g}"
    progress(what, 0, len(prompts))
    for begin in range(0, len(prompts), batch):
        part = list(prompts[begin : begin + batch])

        def running(stage: str, done: int, total: int, begin: int = begin, count: int = len(part)) -> None:
            if stage == "denoise":  # nearly all of the time; the last video is done when it is judged
                progress(what, begin + min(count * done // total, count - 1), len(prompts))

        yield from pipe.generate(
            part,
            steps=steps,
            guidance=guidance,
            solver=solver,
            seed=[seed + begin + index for index in range(len(part))],
            progress=running,
        )
        progress(what, begin + len(part), len(prompts))


def _settings(video: Video) -> dict[str, Any]:
    """What all videos of a set have in common."""
    own = ("prompt", "seed", "cut", "negative_cut")
    return {name: value for name, value in video.metadata.items() if name not in own}
