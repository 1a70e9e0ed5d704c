"""The example with pycuda, on a simulated GPU; what stands for pycuda has its names and its arguments."""

from __future__ import annotations

import ctypes
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from reelrt.bundle.manifest import EngineSet
from tests.simulated.machine import Machine
from tests.unit.test_runtime_pipeline import make_engines

EXAMPLE = Path(__file__).parents[2] / "examples" / "pycuda_service.py"


def pycuda_on(driver) -> dict[str, ModuleType]:
    """Modules like pycuda's, over the simulated driver."""

    class Stream:
        def __init__(self):
            _, self.handle = driver.cuStreamCreate(0)

    class GPUArray:
        def __init__(self, shape, dtype, allocator=None, base=None, gpudata=None):
            self.shape, self.dtype, self.base = shape, np.dtype(dtype), base
            self.nbytes = int(np.prod(shape)) * self.dtype.itemsize
            self.gpudata = gpudata or driver.allocate(self.nbytes)

        def __len__(self):
            return self.shape[0]

        @property
        def __cuda_array_interface__(self):
            data = (int(self.gpudata), False)
            return {
                "shape": self.shape,
                "strides": None,
                "data": data,
                "typestr": self.dtype.str,
                "stream": None,
            }

        def bytes(self):
            assert driver.bytes_at(self.gpudata, self.nbytes, "pycuda") is not None
            return (ctypes.c_uint8 * self.nbytes).from_address(self.gpudata)

        def get(self):
            return np.frombuffer(self.bytes(), self.dtype).reshape(self.shape).copy()

    def to_gpu(values):
        array = GPUArray(values.shape, values.dtype)
        ctypes.memmove(array.bytes(), values.ctypes.data, values.nbytes)
        return array

    modules: dict[str, Any] = {
        name: ModuleType(name)
        for name in ("pycuda", "pycuda.autoprimaryctx", "pycuda.driver", "pycuda.gpuarray")
    }
    modules["pycuda.driver"].Stream = Stream
    modules["pycuda.gpuarray"].GPUArray, modules["pycuda.gpuarray"].to_gpu = GPUArray, to_gpu
    for name in ("autoprimaryctx", "driver", "gpuarray"):
        setattr(modules["pycuda"], name, modules[f"pycuda.{name}"])
    return modules


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "source").mkdir()
    make_engines(tmp_path / "source")
    machine = Machine(monkeypatch)
    engines = machine.engines(EngineSet.load(tmp_path / "source"), tmp_path / "engines")
    for name, module in pycuda_on(machine.driver).items():
        monkeypatch.setitem(sys.modules, name, module)
    _, context = machine.driver.cuDevicePrimaryCtxRetain(0)
    machine.driver.cuCtxPushCurrent(context)
    example = runpy.run_path(str(EXAMPLE), run_name="example")
    example["main"](str(engines.folder), str(tmp_path / "red.mp4"), steps="3")
    assert "4 frames, shared at 0x" in capsys.readouterr().out
    assert (tmp_path / "red.mp4").stat().st_size > 0
    assert len(machine.driver._streams) == 1  # pycuda's, and no other
    assert machine.driver.violations == []


def test_the_real_pycuda_has_these_names():
    pytest.importorskip("pycuda", reason="pycuda is not installed (pip install 'reelrt[pycuda]')")
    import importlib.util
    import re

    spec = importlib.util.find_spec("pycuda")
    assert spec and spec.submodule_search_locations
    source = (Path(spec.submodule_search_locations[0]) / "gpuarray.py").read_text(encoding="utf-8")
    signature = re.search(r"def __init__\(([^)]*)\)", source)
    assert signature and {"base", "gpudata"} <= set(re.findall(r"\w+", signature[1]))
    assert "def to_gpu(" in source and "__cuda_array_interface__" in source
