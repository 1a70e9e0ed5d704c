from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATUS_UNSPECIFIED: _ClassVar[Status]
    QUEUED: _ClassVar[Status]
    IN_PROGRESS: _ClassVar[Status]
    COMPLETED: _ClassVar[Status]
    FAILED: _ClassVar[Status]
    CANCELLED: _ClassVar[Status]

class Variant(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VIDEO: _ClassVar[Variant]
    THUMBNAIL: _ClassVar[Variant]
    SPRITESHEET: _ClassVar[Variant]
STATUS_UNSPECIFIED: Status
QUEUED: Status
IN_PROGRESS: Status
COMPLETED: Status
FAILED: Status
CANCELLED: Status
VIDEO: Variant
THUMBNAIL: Variant
SPRITESHEET: Variant

class SubmitRequest(_message.Message):
    __slots__ = ("prompt", "model", "negative_prompt", "width", "height", "num_frames", "fps", "num_inference_steps", "guidance_scale", "seed", "solver", "format", "priority", "deadline_s", "latents", "remix_of", "remix_from", "idempotency_key")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    FPS_FIELD_NUMBER: _ClassVar[int]
    NUM_INFERENCE_STEPS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SOLVER_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    REMIX_OF_FIELD_NUMBER: _ClassVar[int]
    REMIX_FROM_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    model: str
    negative_prompt: str
    width: int
    height: int
    num_frames: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    seed: int
    solver: str
    format: str
    priority: int
    deadline_s: float
    latents: str
    remix_of: str
    remix_from: float
    idempotency_key: str
    def __init__(self, prompt: _Optional[str] = ..., model: _Optional[str] = ..., negative_prompt: _Optional[str] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., num_frames: _Optional[int] = ..., fps: _Optional[float] = ..., num_inference_steps: _Optional[int] = ..., guidance_scale: _Optional[float] = ..., seed: _Optional[int] = ..., solver: _Optional[str] = ..., format: _Optional[str] = ..., priority: _Optional[int] = ..., deadline_s: _Optional[float] = ..., latents: _Optional[str] = ..., remix_of: _Optional[str] = ..., remix_from: _Optional[float] = ..., idempotency_key: _Optional[str] = ...) -> None: ...

class VideoRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class Video(_message.Message):
    __slots__ = ("id", "model", "status", "progress", "queue_position", "created_at", "completed_at", "expires_at", "prompt", "negative_prompt", "width", "height", "num_frames", "fps", "num_inference_steps", "guidance_scale", "seed", "solver", "format", "priority", "error_code", "error_message", "remixed_from_id", "stage_seconds", "reused")
    class StageSecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_POSITION_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_AT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    FPS_FIELD_NUMBER: _ClassVar[int]
    NUM_INFERENCE_STEPS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SOLVER_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    REMIXED_FROM_ID_FIELD_NUMBER: _ClassVar[int]
    STAGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    REUSED_FIELD_NUMBER: _ClassVar[int]
    id: str
    model: str
    status: Status
    progress: int
    queue_position: int
    created_at: float
    completed_at: float
    expires_at: float
    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_frames: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    seed: int
    solver: str
    format: str
    priority: int
    error_code: str
    error_message: str
    remixed_from_id: str
    stage_seconds: _containers.ScalarMap[str, float]
    reused: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, id: _Optional[str] = ..., model: _Optional[str] = ..., status: _Optional[_Union[Status, str]] = ..., progress: _Optional[int] = ..., queue_position: _Optional[int] = ..., created_at: _Optional[float] = ..., completed_at: _Optional[float] = ..., expires_at: _Optional[float] = ..., prompt: _Optional[str] = ..., negative_prompt: _Optional[str] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., num_frames: _Optional[int] = ..., fps: _Optional[float] = ..., num_inference_steps: _Optional[int] = ..., guidance_scale: _Optional[float] = ..., seed: _Optional[int] = ..., solver: _Optional[str] = ..., format: _Optional[str] = ..., priority: _Optional[int] = ..., error_code: _Optional[str] = ..., error_message: _Optional[str] = ..., remixed_from_id: _Optional[str] = ..., stage_seconds: _Optional[_Mapping[str, float]] = ..., reused: _Optional[_Iterable[str]] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("after", "limit", "oldest_first")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    OLDEST_FIRST_FIELD_NUMBER: _ClassVar[int]
    after: str
    limit: int
    oldest_first: bool
    def __init__(self, after: _Optional[str] = ..., limit: _Optional[int] = ..., oldest_first: bool = ...) -> None: ...

class ListReply(_message.Message):
    __slots__ = ("videos", "has_more")
    VIDEOS_FIELD_NUMBER: _ClassVar[int]
    HAS_MORE_FIELD_NUMBER: _ClassVar[int]
    videos: _containers.RepeatedCompositeFieldContainer[Video]
    has_more: bool
    def __init__(self, videos: _Optional[_Iterable[_Union[Video, _Mapping]]] = ..., has_more: bool = ...) -> None: ...

class DeleteReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("id", "previews")
    ID_FIELD_NUMBER: _ClassVar[int]
    PREVIEWS_FIELD_NUMBER: _ClassVar[int]
    id: str
    previews: bool
    def __init__(self, id: _Optional[str] = ..., previews: bool = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("video", "preview", "deleted")
    VIDEO_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    DELETED_FIELD_NUMBER: _ClassVar[int]
    video: Video
    preview: bytes
    deleted: bool
    def __init__(self, video: _Optional[_Union[Video, _Mapping]] = ..., preview: _Optional[bytes] = ..., deleted: bool = ...) -> None: ...

class DownloadRequest(_message.Message):
    __slots__ = ("id", "variant")
    ID_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    id: str
    variant: Variant
    def __init__(self, id: _Optional[str] = ..., variant: _Optional[_Union[Variant, str]] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...
