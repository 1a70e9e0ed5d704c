"""Everything here needs an NVIDIA GPU; where there is none it is skipped, and says so."""

from __future__ import annotations

import pytest

from reelrt.engines.backends import RTX_CAPABILITIES
from reelrt.jetson.device import Gpu, detect


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    """The machine's GPU."""
    found = detect().gpu
    if found is None:
        pytest.skip("this machine has no NVIDIA GPU, or no driver for it")
    return found


@pytest.fixture(scope="session")
def rtx_gpu(gpu: Gpu) -> Gpu:
    """The machine's GPU, of a kind that TensorRT-RTX supports."""
    if gpu.compute_capability not in RTX_CAPABILITIES:
        pytest.skip(f"TensorRT-RTX does not support {gpu.name} (compute capability {gpu.compute_capability})")
    return gpu
