"""The errors users see: one clear sentence each, and the remedy where there is one."""

from __future__ import annotations


class ReelError(Exception):
    """Base of every error that ReelRT raises on purpose.

    Args:
        message: One sentence that names the offending value.
        remedy: What to do about it, one sentence, or nothing.
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()


class InputError(ReelError):
    """A request, option, prompt or file name is not acceptable."""

    exit_code = 2


class RangeError(InputError):
    """A value lies outside what the bundle or engine set was made for.

    Args:
        name: What the value is, as the user knows it (`steps`, `width`, ...).
        value: The value that was asked for.
        allowed: The allowed range or choices, readable.
    """

    def __init__(self, name: str, value: object, allowed: str, remedy: str = "") -> None:
        super().__init__(f"{name} {value} is not available: {allowed}.", remedy)
        self.name, self.value, self.allowed = name, value, allowed


class ModelError(ReelError):
    """A model folder cannot be exported: unknown class, missing or damaged weights."""

    exit_code = 3


class ValidationError(ModelError):
    """An exported stage disagrees with the model it came from.

    Args:
        what: Stage and tensor, and the shape at which they disagree.
        measured: The difference that was measured.
        allowed: The largest difference allowed.
    """

    def __init__(self, what: str, measured: float, allowed: float) -> None:
        super().__init__(f"{what} differs by {measured:.2e}; at most {allowed:.2e} is allowed.")
        self.measured, self.allowed = measured, allowed


class IntegrityError(ReelError):
    """A file of a bundle or an engine set is missing, unreadable or not the one in its manifest."""

    exit_code = 4


class CompatibilityError(ReelError):
    """An engine set was built for another backend version, device or machine."""

    exit_code = 5


class BackendError(ReelError):
    """A backend is not installed, or failed to build or run an engine."""

    exit_code = 6


class PlanError(ReelError):
    """A video needs more memory than its target has, whatever is kept loaded."""

    exit_code = 9


class CalibrationError(ReelError):
    """A bundle cannot be calibrated: numbers that are not finite, or an operator that cannot be quantised."""

    exit_code = 10


class QualityError(ReelError):
    """A quality report is missing, belongs to another bundle, or misses a target."""

    exit_code = 8


class CudaError(BackendError):
    """A CUDA call failed.

    Args:
        name: CUDA's own name of the error: `CUDA_ERROR_LAUNCH_FAILED`, say.
        message: One sentence.
        remedy: What to do about it.
    """

    def __init__(self, name: str, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.name = name


class DeviceMemoryError(CudaError):
    """The GPU's memory is too small for what was asked for; everything was freed again.

    Args:
        message: One sentence with what was wanted and what was free.
        remedy: What would fit.
        plan: The memory plan that did not come true, readable; empty where there is none.
    """

    def __init__(self, message: str, remedy: str = "", plan: str = "") -> None:
        super().__init__("CUDA_ERROR_OUT_OF_MEMORY", message, remedy)
        self.plan = plan


class ServiceError(ReelError):
    """The service cannot take a request now, or knows nothing of what it is about."""

    exit_code = 11


class QueueFullError(ServiceError):
    """The queue has no room.

    Args:
        message: One sentence.
        retry_after: Seconds after which there is room, from measured step times.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message, f"Try again in {retry_after:.0f} s.")
        self.retry_after = retry_after


class JobLimitError(QueueFullError):
    """One owner has as many jobs waiting and running as a key may have."""


class NotFoundError(ServiceError):
    """No such job, model or file, or it is somebody else's."""


class ConflictError(ServiceError):
    """The request contradicts an earlier one: a used idempotency key, a file of a job that is not over."""


class StorageError(ServiceError):
    """The service's folder is full, damaged, in use by another service, or its quota is used up.

    Args:
        message: One sentence.
        remedy: What to do about it.
        code: `disk_full`, `quota_exceeded` or `storage_error`.
    """

    def __init__(self, message: str, remedy: str = "", code: str = "storage_error") -> None:
        super().__init__(message, remedy)
        self.code = code


class StoppingError(ServiceError):
    """The service is stopping and takes no more requests."""


class Cancelled(ReelError):
    """The work was cancelled on request; nothing was left half-written."""

    exit_code = 130
