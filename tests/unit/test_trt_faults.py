"""Failed allocations, failed launches and cancelling: no leak, no damage, and no wrong video."""

from __future__ import annotations

import pytest

from reelrt.bundle.manifest import EngineSet
from tests.simulated.faults import FAULTS, run
from tests.simulated.machine import Machine
from tests.unit.test_runtime_pipeline import make_engines


@pytest.mark.parametrize("library", ["tensorrt 10.3.0", "tensorrt_rtx 1.7.1"])
def test_no_leak_and_no_wrong_video_under_random_faults(tmp_path, monkeypatch, library):
    (tmp_path / "source").mkdir()
    make_engines(tmp_path / "source")
    machine = Machine(monkeypatch, library)
    tally = run(machine, EngineSet.load(tmp_path / "source"), tmp_path / "engines", rounds=120, seed=2)
    assert (tally.wrong, tally.leaks, tally.violations) == (0, [], [])
    # Which calls fail depends on how two threads happen to take turns.
    assert tally.beside["right"] > 10
    assert {"video", "out of memory", "CudaError"} <= set(tally.ends)
    assert {"Cancelled", "KeyboardInterrupt"} & set(tally.ends)
    assert {"cuMemAlloc", "TensorRT", "cuStreamSynchronize"} <= set(tally.faults) <= set(FAULTS)
    assert len(tally.faults) >= 8
    assert machine.driver.calls["cuGraphLaunch"] > 0
