"""What goes over the wire as JSON: requests and answers, OpenAI's fields and vLLM-Omni's.

Holds form alone: that a number is a number, that two ways of saying one thing agree. What the engines
can do is checked by the job service.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from reelrt.bundle.schedule import MAX_GUIDANCE
from reelrt.runtime.noise import MAX_SEED
from reelrt.runtime.video import FASTEST, SLOWEST
from reelrt.service.jobs import Remix, VideoRequest

VIDEO_ID = r"^video_[0-9a-f]{32}$"
LONGEST_PROMPT = 8192
UNSUPPORTED = ("input_reference", "flow_shift", "lora", "extra_params")
"""Fields of others' APIs that no engine here can follow: refused, lest somebody waits for their effect."""
SIZE = r"^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$"
SECONDS = r"^[0-9]{1,4}(\.[0-9]{1,6})?$"


def _text(value: str) -> str:
    if "\0" in value:
        raise ValueError("a null character is no text")
    return value


Text = Annotated[str, Field(max_length=LONGEST_PROMPT), AfterValidator(_text)]


def _whole(value: Any) -> Any:
    """JSON knows one kind of number: 8.0 is whole."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_whole)]
Whole = Annotated[Integer, Field(ge=1, le=65536)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Asked(BaseModel):
    """What every way to ask for a video has in common."""

    # Prompts are not cached: pydantic keeps 16,384 short strings by default, and gives them back to nobody.
    model_config = ConfigDict(extra="forbid", cache_strings="keys")

    prompt: Annotated[str, Field(min_length=1, max_length=LONGEST_PROMPT), AfterValidator(_text)] = Field(
        description="What to show."
    )
    negative_prompt: Text | None = Field(None, description="What to steer away from.")
    guidance_scale: Annotated[Finite, Field(ge=0, le=MAX_GUIDANCE)] | None = Field(
        None, description="Classifier-free guidance; 1 is none. Default: the model's."
    )
    fps: Annotated[Finite, Field(ge=SLOWEST, le=FASTEST)] | None = Field(
        None, description="Frames per second of the file. Default: 8."
    )
    format: Literal["mp4", "webm"] | None = Field(None, description="H.264 or VP9. Default: mp4.")
    priority: Annotated[Integer, Field(ge=-10, le=10)] | None = Field(
        None, description="Higher goes first among what waits. Default: 0."
    )
    deadline_s: Annotated[Finite, Field(gt=0, le=604800)] | None = Field(
        None, description="Seconds after which the video is no longer wanted: the job fails then."
    )

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.prompt.strip():
            raise ValueError("the prompt is empty; say what the video shall show")
        return self

    def common(self) -> dict[str, Any]:
        """The fields of `VideoRequest` that were given."""
        values = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "guidance": self.guidance_scale,
            "fps": self.fps,
            "format": self.format,
            "priority": self.priority,
            "deadline": self.deadline_s,
        }
        return {name: value for name, value in values.items() if value is not None}


class CreateVideo(_Asked):
    """A video to make: OpenAI's fields, vLLM-Omni's, and some of ReelRT's own."""

    model: Annotated[str, Field(max_length=200)] | None = Field(
        None, description="One of `/v1/models`. Default: the first."
    )
    seconds: Annotated[str, Field(pattern=SECONDS)] | Annotated[Finite, Field(gt=0, le=9999)] | None = Field(
        None, description="Length; `num_frames` says the same in frames."
    )
    size: Annotated[str, Field(pattern=SIZE)] | None = Field(None, description="`WIDTHxHEIGHT`.")
    width: Whole | None = Field(None, description="Pixels; `size` says the same.")
    height: Whole | None = Field(None, description="Pixels; `size` says the same.")
    num_frames: Whole | None = Field(None, description="Number of frames. Default: the model's.")
    num_inference_steps: Whole | None = Field(None, description="Denoising steps. Default: 25.")
    seed: Annotated[Integer, Field(ge=0, le=MAX_SEED)] | None = Field(
        None, description="Of the starting noise. Default: drawn, and told in the answer."
    )
    solver: Annotated[str, Field(max_length=40)] | None = Field(
        None, description="One of the model's solvers; see `/v1/models`."
    )
    latents: Annotated[str, Field(min_length=1, max_length=100)] | None = Field(
        None, description="A name for starting noise: videos with the same name start from the same noise."
    )
    input_reference: None = Field(None, description="Not supported: these models start from a text alone.")
    flow_shift: None = Field(None, description="Not supported: schedules are compiled beforehand.")
    lora: None = Field(None, description="Not supported: weights are part of the engines.")
    extra_params: None = Field(None, description="Not supported.")

    @field_validator(*UNSUPPORTED, mode="before")
    @classmethod
    def _unsupported(cls, value: Any) -> None:
        if value is not None:
            raise ValueError("it is not supported here; leave it out")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Refuse what contradicts itself."""
        if (self.width is None) != (self.height is None):
            raise ValueError("give width and height, or neither")
        if self.size and self.width is not None and self.size != f"{self.width}x{self.height}":
            raise ValueError(f"size {self.size} is not {self.width}x{self.height}")
        frames = self._frames_of_seconds()
        if frames is not None and self.num_frames not in (None, frames):
            raise ValueError(
                f"{self.seconds} seconds are {frames} frames, and num_frames is {self.num_frames}"
            )
        return self

    def _frames_of_seconds(self) -> int | None:
        rate = 8.0 if self.fps is None else self.fps
        return None if self.seconds is None else max(1, round(float(self.seconds) * rate))

    def request(self) -> VideoRequest:
        """The same as the job service takes it."""
        width, height = map(int, self.size.split("x")) if self.size else (self.width, self.height)
        return VideoRequest(
            model=self.model,
            width=width,
            height=height,
            frames=self._frames_of_seconds() if self.num_frames is None else self.num_frames,
            steps=self.num_inference_steps,
            seed=self.seed,
            solver=self.solver,
            latents=self.latents,
            **self.common(),
        )


class RemixVideo(_Asked):
    """A variation of a finished video: another prompt, from some way on.

    Size, frames, steps, solver and seed are the first one's.
    """

    remix_from: Annotated[Finite, Field(gt=0, lt=1)] | None = Field(
        None,
        description="The share of the schedule that is taken over, one of the model's `remix_points`. "
        "Default: 0.5, which costs about half.",
    )

    def request(self, video_id: str) -> Remix:
        """The same as the job service takes it, for a finished video."""
        given = {} if self.remix_from is None else {"remix_from": self.remix_from}
        return Remix(video_id, {**self.common(), **given})


class VideoError(BaseModel):
    """Why a job failed."""

    code: str
    message: str


class Video(BaseModel):
    """A video job, OpenAI's fields first."""

    id: str = Field(pattern=VIDEO_ID)
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(ge=0, le=100, description="Share of the denoising steps done, in percent.")
    created_at: int = Field(description="Unix seconds.")
    completed_at: int | None = None
    expires_at: int | None = Field(None, description="When the files are removed, Unix seconds.")
    prompt: str
    size: str
    seconds: str
    error: VideoError | None = None
    remixed_from_video_id: str | None = None
    queue_position: int | None = Field(None, description="0 is next; null once it runs.")
    width: int
    height: int
    num_frames: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    seed: int | None
    negative_prompt: str
    solver: str
    format: Literal["mp4", "webm"]
    priority: int
    inference_time_s: float | None = Field(None, description="Seconds from joining the batch to the file.")
    stage_durations: dict[str, float] | None = Field(None, description="Seconds of each stage.")
    peak_memory_mb: float | None = Field(None, description="The process's largest size so far, in MiB.")
    reused: list[str] = Field(
        default=[], description="What caches saved: prompt, latents, trajectory, result."
    )


class VideoList(BaseModel):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(BaseModel):
    """A video that is gone."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class Range(BaseModel):
    """A least and a largest value, and what is taken when a request does not say."""

    minimum: int
    maximum: int
    default: int


class ModelLimits(BaseModel):
    """What a model takes."""

    width: Range
    height: Range
    size_multiple: int = Field(description="Width and height are multiples of this, in pixels.")
    num_frames: Range
    num_inference_steps: Range
    guidance_scale: float = Field(description="The model's own.")
    solvers: list[str]
    solver: str = Field(description="The model's own.")
    remix_points: list[float] = Field(
        description="From where a video can be remixed, as shares of its schedule."
    )
    slots: int = Field(description="Most videos at once.")


class ModelObject(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    limits: ModelLimits


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class Health(BaseModel):
    """That the service lives."""

    status: Literal["ok"] = "ok"
    version: str


class Ready(BaseModel):
    """Whether the service takes jobs."""

    status: Literal["ready"] = "ready"
