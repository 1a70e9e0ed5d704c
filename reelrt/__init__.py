"""ReelRT: text-to-video diffusion models as engines for NVIDIA Jetson and RTX devices.

import reelrt
pipe = reelrt.load("build/engines")
video = pipe.generate("a red circle moving right on a black background", steps=25, seed=7)
video.save("red.mp4", fps=8)
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from reelrt.errors import (
        BackendError,
        Cancelled,
        CompatibilityError,
        CudaError,
        DeviceMemoryError,
        InputError,
        IntegrityError,
        ModelError,
        RangeError,
        ReelError,
        ValidationError,
    )
    from reelrt.runtime.pipeline import TextToVideo, load
    from reelrt.runtime.video import Video, check_writable, read_metadata

__all__ = [
    "BackendError",
    "Cancelled",
    "CompatibilityError",
    "CudaError",
    "DeviceMemoryError",
    "InputError",
    "IntegrityError",
    "ModelError",
    "RangeError",
    "ReelError",
    "TextToVideo",
    "ValidationError",
    "Video",
    "__version__",
    "check_writable",
    "load",
    "read_metadata",
]

_HOMES = {
    "TextToVideo": "reelrt.runtime.pipeline",
    "load": "reelrt.runtime.pipeline",
    "Video": "reelrt.runtime.video",
    "check_writable": "reelrt.runtime.video",
    "read_metadata": "reelrt.runtime.video",
}

if not TYPE_CHECKING:  # a typed __getattr__ would make every misspelt name valid

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used, so that `import reelrt` stays light."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_HOMES.get(name, "reelrt.errors")), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
