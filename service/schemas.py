"""What goes over the wire as JSON: requests and answers, OpenAI's fields and vLLM-Omni's.

Holds form alone: that a number is a number, that two ways of saying one thing agree. What the engines
can do is checked by the job service.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from reelrt.runtime.noise import MAX_SEED

VIDEO_ID = r"^video_[A-Za-z0-9_-]{1,64}$"
LONGEST_PROMPT = 8192
MOST_LISTED = 100
SIZE = re.compile(r"^([0-9]{1,5})x([0-9]{1,5})$")
SECONDS = r"^[0-9]{1,4}(\.[0-9]{1,6})?$"


def _text(value: str) -> str:
    if "\0" in value:
        raise ValueError("a null character is no text")
    return value


Text = Annotated[str, Field(max_length=LONGEST_PROMPT), AfterValidator(_text)]
Whole = Annotated[int, Field(ge=1, le=65536)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Request(BaseModel):
    """What every way to ask for a video has in common."""

    model_config = ConfigDict(extra="forbid")

    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="Denoising steps."
    )
    guidance_scale: Annotated[Finite, Field(ge=0, le=1000)] | None = Field(
        None, description="Classifier-free guidance; 1 is none. Default: the model's."
    )
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = Field(
        None, description="Of the starting noise. Default: drawn, and told in the answer."
    )
    negative_prompt: Text | None = Field(None, description="What to steer away from.")
    solver: Annotated[str, Field(max_length=40)] | None = Field(
        None, description="One of the model's solvers; see `/v1/models`."
    )
    fps: Annotated[Finite, Field(ge=0.1, le=1000)] | None = Field(None, description="Frames per second.")
    priority: Annotated[int, Field(ge=-10, le=10)] | None = Field(
        None, description="Higher goes first among what waits. Default: 0."
    )
    deadline_s: Annotated[Finite, Field(gt=0, le=604800)] | None = Field(
        None, description="Seconds after which the video is no longer wanted: the job then fails."
    )


class CreateVideo(Request):
    """A video to make."""

    prompt: Annotated[Text, Field(min_length=1)] = Field(description="What to show.")
    model: Annotated[str, Field(max_length=200)] | None = Field(
        None, description="One of `/v1/models`. Default: the first."
    )
    seconds: Annotated[str, Field(pattern=SECONDS)] | Annotated[Finite, Field(gt=0, le=9999)] | None = Field(
        None, description="Length; `num_frames` says the same in frames."
    )
    size: Annotated[str, Field(pattern=SIZE.pattern)] | None = Field(None, description="`WIDTHxHEIGHT`.")
    width: Whole | None = Field(None, description="Pixels; `size` says the same.")
    height: Whole | None = Field(None, description="Pixels; `size` says the same.")
    num_frames: Whole | None = Field(None, description="Number of frames. Default: the model's.")
    input_reference: Any = Field(
        None, description="Refused unless null: these models start from a text alone."
    )
    flow_shift: Any = Field(None, description="Refused unless null: schedules are compiled beforehand.")
    lora: Any = Field(None, description="Refused unless null: weights are part of the engines.")
    extra_params: dict[str, Any] | None = Field(None, description="Refused unless empty or null.")

    @model_validator(mode="after")
    def _agree(self) -> CreateVideo:
        """Refuse what contradicts itself, and what no engine here does."""
        if not self.prompt.strip():
            raise ValueError("the prompt is empty; say what the video shall show")
        for name in ("input_reference", "flow_shift", "lora", "extra_params"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported here; leave it out")
        if (self.width is None) != (self.height is None):
            raise ValueError("give width and height, or neither")
        if self.size and self.width is not None and self.size != f"{self.width}x{self.height}":
            raise ValueError(f"size {self.size} is not {self.width}x{self.height}")
        return self

    @property
    def pixels(self) -> tuple[int, int] | None:
        """Width and height, where they were given."""
        if self.size and (match := SIZE.match(self.size)):
            return int(match[1]), int(match[2])
        return (self.width, self.height) if self.width and self.height else None


class RemixVideo(Request):
    """A variation of a finished video: the same start, another prompt, from some step on."""

    prompt: Annotated[Text, Field(min_length=1)] = Field(description="What to show instead.")
    strength: Annotated[Finite, Field(gt=0, le=1)] | None = Field(
        None,
        description="The share of the schedule that is computed anew. Default: 0.5, which costs about half.",
    )

    @model_validator(mode="after")
    def _says_something(self) -> RemixVideo:
        if not self.prompt.strip():
            raise ValueError("the prompt is empty; say what the video shall show")
        return self


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
    seed: int
    negative_prompt: str
    solver: str
    priority: int = 0
    inference_time_s: float | None = Field(None, description="Seconds from joining the batch to the file.")
    stage_durations: dict[str, float] | None = Field(None, description="Seconds of each stage.")
    peak_memory_mb: float | None = Field(None, description="The process's largest size so far.")


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
    """A least and a largest value."""

    minimum: int
    maximum: int
    default: int


class ModelLimits(BaseModel):
    """What a model takes, and what it takes when a request does not say."""

    width: Range
    height: Range
    size_multiple: int
    num_frames: Range
    num_inference_steps: Range
    guidance_scale: float
    fps: float
    solvers: list[str]
    solver: str


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

    status: Literal["ready", "starting", "stopping"]
