"""What a job is: a request for one video, what became of it, and what watchers are told.

Plain data. Knows nothing of queues, files, engines or HTTP.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from reelrt.errors import InputError

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
LIVE: tuple[Status, ...] = ("queued", "in_progress")
"""What a job is before it is over."""

Variant = Literal["video", "thumbnail", "spritesheet"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)

VIDEO_TYPES = {"mp4": "video/mp4", "webm": "video/webm"}
"""Format of a request to the media type of its file."""
PICTURE_TYPE = "image/jpeg"
"""Media type of thumbnails, spritesheets and previews."""

EventKind = Literal["queued", "progress", "preview", "completed", "failed", "cancelled", "deleted"]


@dataclass(frozen=True, slots=True)
class VideoRequest:
    """What a client asks for. None stands for the model's own, or for the parent's in a remix.

    A job's own request has every None filled in but `deadline`, `latents` and `remix_of`, so that it
    gives the same video whenever and how often it is run.

    Attributes:
        prompt: What to show.
        model: Name of a model; None takes the only one, or the first.
        negative_prompt: What to steer away from.
        width: In pixels.
        height: In pixels.
        frames: Number of frames.
        fps: Frames per second of the file.
        steps: Denoising steps; 25 when None.
        guidance: Classifier-free guidance scale; 1 is none.
        solver: A solver's name.
        seed: Of the starting noise, 0 to 2**63 - 1; drawn when None.
        format: `mp4` (H.264) or `webm` (VP9).
        priority: -10 to 10; a point is worth so many seconds of waiting (`ServiceOptions.ageing`).
        deadline: Seconds from its submission in which it has to be completed; it fails after that.
        latents: A name for starting noise. The first job of an owner that gives a name keeps its seed
            there; later ones with that name start from the same noise.
        remix_of: A completed job of the same owner and model to vary: it goes on from what that one
            was at `remix_from`. Size, frames, steps, solver and seed are that one's.
        remix_from: Fraction of the schedule that is taken over, one of `ServiceOptions.remix_points`.
    """

    prompt: str
    model: str | None = None
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    fps: float = 8
    steps: int | None = None
    guidance: float | None = None
    solver: str | None = None
    seed: int | None = None
    format: str = "mp4"
    priority: int = 0
    deadline: float | None = None
    latents: str | None = None
    remix_of: str | None = None
    remix_from: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values that `VideoRequest(**data)` reads back."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Remix:
    """What a client asks for as a variation of a completed job.

    Attributes:
        of: The job's id.
        changes: Fields of `VideoRequest` that were asked for, the prompt among them; what else a client
            may choose is as in that job.
    """

    of: str
    changes: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"of": self.of, "changes": dict(self.changes)}

    def request(self, parent: VideoRequest) -> VideoRequest:
        """The whole of it, once it is known what that job was.

        Raises:
            InputError: A change is no field of a request, or not one that a remix may choose; no prompt.
        """
        kept = {name: getattr(parent, name) for name in ("negative_prompt", "guidance", "fps", "format")}
        try:
            return VideoRequest(**{**kept, **self.changes}, model=parent.model, remix_of=self.of)
        except TypeError as error:
            raise InputError(f"a remix cannot be made so: {error}.") from error


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed.

    Attributes:
        code: `backend_error`, `out_of_memory`, `disk_full`, `quota_exceeded`, `storage_error`,
            `deadline_exceeded`, `interrupted` (the service ended too often while it ran),
            `model_gone`, `invalid_request`, `file_lost` or `internal_error`.
        message: One sentence or two, for people.
    """

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Job:
    """One accepted request, as it was at one moment.

    Times are seconds since 1970.

    Attributes:
        id: `video_` and 32 hexadecimal digits from the operating system; nobody guesses one.
        owner: Whose it is; "" when the service has no keys.
        request: What was asked for, complete.
        status: One of `Status`.
        progress: 0 to 100, of launches done; 100 only when completed.
        queue_position: 0 for the next one to start; None once it has started.
        created_at: When it was accepted.
        started_at: When it joined the batch, the last time.
        completed_at: When it was over, whatever the end.
        expires_at: When job and files are removed.
        error: Why it failed.
        timings: Seconds of `queue`, `text`, `denoise`, `decode` and `encode`, as far as it came.
        peak_memory: Largest resident size of the process so far, in bytes, when it was over.
        reused: What caches saved: of `prompt`, `latents`, `trajectory` (a remix) and `result`.
        files: Variant to size in bytes; empty until it is completed.
        attempts: How often it was started; more than one after an interruption.
    """

    id: str
    owner: str
    request: VideoRequest
    status: Status = "queued"
    progress: int = 0
    queue_position: int | None = None
    created_at: float = 0.0
    started_at: float | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    error: JobError | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    peak_memory: int = 0
    reused: tuple[str, ...] = ()
    files: Mapping[str, int] = field(default_factory=dict)
    attempts: int = 0

    @property
    def live(self) -> bool:
        """Whether it is still waiting or running."""
        return self.status in LIVE

    def but(self, **changes: Any) -> Job:
        """The same with some attributes changed."""
        return replace(self, **changes)


@dataclass(frozen=True, slots=True)
class Event:
    """What happened to a job.

    Attributes:
        kind: `queued` (its position), `progress`, `preview` (an image), or how it ended: `completed`,
            `failed`, `cancelled`, `deleted`. The last four end a subscription.
        job: The job at that moment.
        image: A small JPEG of a frame in the making, for `preview`; else empty.
    """

    kind: EventKind
    job: Job
    image: bytes = b""

    @property
    def last(self) -> bool:
        """Whether nothing follows."""
        return self.kind not in ("queued", "progress", "preview")


def new_id() -> str:
    """An id that cannot be guessed: 128 bits from the operating system."""
    return f"video_{secrets.token_hex(16)}"
