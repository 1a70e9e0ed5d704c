"""A machine with a simulated GPU, for tests of what runs on one."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from reelrt.bundle.manifest import EngineSet
from reelrt.jetson.device import Gpu, detect
from tests.simulated.driver import SimulatedDriver
from tests.simulated.tensorrt import simulate, simulated_library

MEMORY = 1 << 28


class Machine:
    """A simulated GPU that is installed while a test runs.

    Args:
        patch: Undone when the test is over.
        library: One of `tests.simulated.tensorrt.MISSING`.
        memory: Bytes of device memory.
    """

    def __init__(
        self, patch: pytest.MonkeyPatch, library: str = "tensorrt_rtx 1.7.1", memory: int = MEMORY
    ) -> None:
        self.backend, self.version = library.split()
        self.driver = SimulatedDriver(memory)
        self.module = simulated_library(self.driver, library)
        gpu = Gpu("simulated GPU", "8.6", memory, "13.0")
        patch.setattr("reelrt.runtime.cuda.load_driver", lambda: self.driver)
        patch.setitem(sys.modules, self.backend, self.module)
        patch.setattr("reelrt.runtime.session.detect", lambda: replace(detect(), gpu=gpu))

    def engines(self, source: EngineSet, folder: Path, streamable: int = 0) -> EngineSet:
        """An ONNX Runtime engine set as one of this machine's library."""
        return simulate(source, folder, self.backend, self.version, streamable=streamable)
