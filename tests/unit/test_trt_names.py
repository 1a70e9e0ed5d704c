"""Every name and signature of CUDA and TensorRT that our code and its simulation use, held against
the real libraries, which can be imported or read without a GPU.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

from reelrt.runtime import cuda, device_array, execution, trt_library
from tests.simulated.driver import SimulatedDriver
from tests.simulated.tensorrt import MISSING, simulated_library

# Class to the names of it that we use, each with its number of arguments beside self; None is an attribute.
Table = dict[str, dict[str, int | None]]

USED: Table = {
    "Runtime": {"deserialize_cuda_engine": 1},
    "ICudaEngine": {"create_execution_context": 1},
    "IExecutionContext": {
        "set_input_shape": 2,
        "set_tensor_address": 2,
        "set_device_memory": 2,
        "update_device_memory_size_for_shapes": 0,
        "execute_async_v3": 1,
    },
    "ExecutionContextAllocationStrategy": {"USER_MANAGED": None},
}
USED_IF_THERE: Table = {
    "ICudaEngine": {
        "create_runtime_config": 0,
        "streamable_weights_size": None,
        "weight_streaming_budget_v2": None,
    },
    "IRuntimeConfig": {"set_execution_context_allocation_strategy": 1},
}
USED_OF_RTX: Table = {
    "IRuntimeConfig": {
        "create_runtime_cache": 0,
        "set_runtime_cache": 1,
        "cuda_graph_strategy": None,
        "dynamic_shapes_kernel_specialization_strategy": None,
    },
    "IRuntimeCache": {"serialize": 0, "deserialize": 1},
    "IExecutionContext": {"is_stream_capturable": 1},
    "DynamicShapesKernelSpecializationStrategy": {"EAGER": None},
    "CudaGraphStrategy": {"DISABLED": None},
}


def called_driver_functions() -> dict[str, int]:
    """Every driver function that `reelrt.runtime.cuda` calls, and with how many arguments."""
    found = {}
    for node in ast.walk(ast.parse(inspect.getsource(cuda))):
        if isinstance(node, ast.Call):
            texts = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
            if texts and isinstance(texts[0], str) and re.fullmatch(r"cu[A-Z]\w+", texts[0]):
                counted = not isinstance(node.func, ast.Attribute) or node.func.attr == "call"
                found[texts[0]] = len(node.args) - 1 if counted else 1
    return found


def test_the_drivers_functions_are_there_with_our_arguments():
    from cuda.bindings import driver

    calls = called_driver_functions()
    assert len(calls) >= 20
    by_owners = ("cuMemFree", "cuMemFreeHost", "cuEventDestroy", "cuGraphExecDestroy", "cuStreamDestroy")
    calls.update(dict.fromkeys((*by_owners, "cuDevicePrimaryCtxRelease"), 1), cuMemGetInfo=0)
    for name, count in calls.items():
        signature = getattr(driver, name).__doc__.split("\n")[0]
        parameters = [part for part in signature[len(name) + 1 : -1].split(",") if part]
        assert len(parameters) == count, signature


def test_the_simulated_driver_has_the_real_ones_parameters():
    from cuda.bindings import driver

    checked = 0
    for name, function in vars(SimulatedDriver).items():
        if re.fullmatch(r"cu[A-Z]\w+", name):
            signature = getattr(driver, name).__doc__.split("\n")[0]
            real = re.sub(r":[^,)]*|=[^,)]*|unsigned |long |int |size_t |char ", "", signature)
            ours = ", ".join(list(inspect.signature(function).parameters)[1:])
            assert real == f"{name}({ours})"
            checked += 1
    assert checked >= 25


def test_what_cuda_core_gives_us():
    source = inspect.getsource(device_array)
    from cuda.core import Buffer
    from cuda.core.utils import StridedMemoryView

    assert "from cuda.core import Buffer" in source
    assert callable(Buffer.from_handle)
    for name in ("from_buffer", "from_dlpack", "__dlpack__", "__dlpack_device__"):
        assert hasattr(StridedMemoryView, name)


def used_names() -> set[str]:
    return {
        name for table in (USED, USED_IF_THERE, USED_OF_RTX) for names in table.values() for name in names
    }


def test_the_tables_here_are_complete():
    """Whatever our code calls on an object of the library stands in a table above."""
    objects = ("self.engine", "self._runtime", "self._context", "self._config", "self._cache", "config")
    called = set()
    for module in (trt_library, execution):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in objects:
                called.add(node.attr)
    assert called <= used_names() | {"library"}
    assert used_names() - called <= {"USER_MANAGED", "EAGER", "DISABLED"}


def arguments(function) -> list[set[int]]:
    """The numbers of arguments beside self that each overload takes, from pybind's docstring."""
    found = []
    for line in (function.__doc__ or "").splitlines():
        match = re.match(r"(?:\d+\. )?\w+\(self: [^,)]+(.*)\) -> ", line)
        if match:
            names = re.findall(r", (\w+): ", match[1])
            optional = len(re.findall(r", \w+: [^=]*? = ", match[1]))
            found.append(set(range(len(names) - optional, len(names) + 1)))
    return found


def test_tensorrt_rtx_has_them_all():
    trt = pytest.importorskip("tensorrt_rtx")
    for table in (USED, USED_IF_THERE, USED_OF_RTX):
        for owner, names in table.items():
            for name, count in names.items():
                member = getattr(getattr(trt, owner), name)
                if count is not None:
                    assert any(count in each for each in arguments(member)), (
                        f"{owner}.{name}: {member.__doc__}"
                    )
    assert trt_library.features(trt) == set(trt_library.FEATURES)
    assert issubclass(trt.Logger, trt.ILogger)


def test_a_real_runtime_takes_our_logger():
    """It opens nothing that is no engine, and our logger hears why."""
    trt = pytest.importorskip("tensorrt_rtx")
    library = trt_library.Library(trt, "TensorRT-RTX")
    assert library._runtime.deserialize_cuda_engine(b"no engine at all") is None
    assert library.said


def stubs() -> dict[str, ast.ClassDef]:
    spec = importlib.util.find_spec("tensorrt_bindings")
    places = list(spec.submodule_search_locations) if spec and spec.submodule_search_locations else []
    files = [Path(place) / "tensorrt.pyi" for place in places]
    if not any(file.is_file() for file in files):
        pytest.skip("tensorrt-stubs is not installed (pip install --no-deps tensorrt-stubs)")
    text = next(file for file in files if file.is_file()).read_text(encoding="utf-8")
    found = {}
    for block in re.findall(r"^class .*\n(?:(?: .*)?\n)*", text, re.MULTILINE):
        try:
            (node,) = ast.parse(block).body
        except SyntaxError:  # a class that the stubs' generator got wrong, and none of ours
            continue
        assert isinstance(node, ast.ClassDef)
        found[node.name] = node
    return found


def test_the_stubs_of_tensorrt_have_them():
    classes = stubs()
    for table in (USED, USED_IF_THERE):
        for owner, names in table.items():
            body = classes[owner].body
            for name, count in names.items():
                methods = [n for n in body if isinstance(n, ast.FunctionDef) and n.name == name]
                if count is None:
                    assert name in ast.unparse(classes[owner])
                    continue
                takes = [
                    range(len(m.args.args) - 1 - len(m.args.defaults), len(m.args.args)) for m in methods
                ]
                assert any(count in each for each in takes), f"{owner}.{name}"
    log = next(n for n in classes["ILogger"].body if isinstance(n, ast.FunctionDef) and n.name == "log")
    assert len(log.args.args) == 3


@pytest.mark.parametrize("name", MISSING)
def test_the_simulated_library_has_what_its_version_has(name):
    module = simulated_library(SimulatedDriver(), name)
    tables = [USED]
    if "runtime_config" not in MISSING[name]:
        tables.append(USED_IF_THERE)
    for table in tables:
        for owner, names in table.items():
            for attribute, count in names.items():
                member = getattr(getattr(module, owner), attribute)
                if count is not None:
                    inspect.signature(member).bind(None, *range(count))


def test_which_version_has_what():
    found = {name: trt_library.features(simulated_library(SimulatedDriver(), name)) for name in MISSING}
    assert found == {
        "tensorrt 10.3.0": {"weight_streaming"},
        "tensorrt 11.4.1": {"runtime_config", "weight_streaming"},
        "tensorrt_rtx 1.4.0": set(trt_library.FEATURES) - {"capturable"},
        "tensorrt_rtx 1.7.1": set(trt_library.FEATURES),
    }


def test_nothing_of_cuda_is_imported_at_module_level():
    for module in (cuda, device_array, execution, trt_library, importlib.import_module("reelrt.runtime.trt")):
        for node in ast.parse(inspect.getsource(module)).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("cuda", "tensorrt", "tensorrt_rtx") for name in names)
