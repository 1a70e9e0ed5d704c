"""What figures were measured on: no host names, no paths."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from reelrt.jetson.device import detect


def machine(*libraries: str) -> dict[str, Any]:
    """This machine and the versions of some installed libraries, for a benchmark's JSON."""
    device = detect()
    return {
        "cpu": device.cpu,
        "cpu_features": list(device.cpu_features),
        "architecture": device.architecture,
        "cores": device.cpu_cores,
        "memory_bytes": device.memory_bytes,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in libraries},
    }
