"""CUDA's door on the simulated driver: order, owners, graphs, errors, and what other libraries share."""

from __future__ import annotations

import gc
import logging
from types import SimpleNamespace

import numpy as np
import pytest
from cuda.bindings.driver import CUresult

from reelrt.errors import BackendError, CudaError, DeviceMemoryError, InputError
from reelrt.jetson.device import detect
from reelrt.runtime.cuda import Device, Event, Stream, stream_handle
from reelrt.runtime.device_array import DeviceArray, as_device_array, is_on_device
from tests.simulated.driver import SimulatedDriver


@pytest.fixture
def driver(monkeypatch):
    simulated = SimulatedDriver(memory=1 << 20)
    monkeypatch.setattr("reelrt.runtime.cuda.load_driver", lambda: simulated)
    yield simulated
    gc.collect()
    assert set(simulated.leaks()) <= {"contexts"}  # pytest still holds the device
    assert simulated.violations == []


@pytest.fixture
def device(driver):
    return Device()


def pinned(device, values):
    values = np.asarray(values, np.float32)
    array = device.pin(values.nbytes).array(values.shape, values.dtype)
    array[...] = values
    return array


def test_a_copy_there_and_back_arrives_when_it_was_waited_for(device):
    stream, buffer = Stream(device), device.allocate(12)
    source, target = pinned(device, [1, 2, 3]), pinned(device, [7, 7, 7])
    with device.current():
        stream.upload(buffer.pointer, source.ctypes.data, 12)
        stream.download(target.ctypes.data, buffer.pointer, 12)
        assert np.isnan(target).all()  # too early
        stream.wait()
    assert target.tolist() == [1, 2, 3]


def test_a_graph_replays_with_what_lies_at_its_addresses_then(device):
    stream, a, b = Stream(device), device.allocate(8), device.allocate(8)
    host = pinned(device, [1, 2])
    with device.current():
        graph = stream.capture(lambda: stream.copy(b.pointer, a.pointer, 8))
        stream.upload(a.pointer, host.ctypes.data, 8)
        graph.launch(stream)
        stream.wait()
        host[...] = 5, 6
        result = pinned(device, [0, 0])
        stream.upload(a.pointer, host.ctypes.data, 8)
        graph.launch(stream)
        stream.download(result.ctypes.data, b.pointer, 8)
        stream.wait()
    assert result.tolist() == [5, 6]
    assert device.calls["cuGraphLaunch"] == 2


def test_what_cannot_be_captured_leaves_the_stream_usable(device):
    stream, other = Stream(device), Stream(device)
    with device.current():
        for work in (lambda: device.allocate(4), other.wait, stream.wait):
            with pytest.raises(CudaError) as caught:
                stream.capture(work)
            assert caught.value.name == "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
        with pytest.raises(ZeroDivisionError):
            stream.capture(lambda: 1 // 0)
        graph = stream.capture(lambda: None)
        graph.launch(stream)
        stream.wait()
    with pytest.raises(CudaError, match="no default stream"):
        Stream(device, 0).capture(lambda: None)


def test_a_stream_follows_an_event_of_another(device):
    first, second, event = Stream(device), Stream(device), Event(device)
    a, source, target = device.allocate(4), pinned(device, [3]), pinned(device, [0])
    with device.current():
        first.upload(a.pointer, source.ctypes.data, 4)
        first.record(event)
        second.follow(event)
        second.download(target.ctypes.data, a.pointer, 4)
        second.wait()
    assert target.item() == 3


def test_streams_do_not_wait_for_each_other_by_themselves(device, driver):
    first, second = Stream(device), Stream(device)
    a, source, target = device.allocate(4), pinned(device, [3]), pinned(device, [0])
    with device.current():
        first.upload(a.pointer, source.ctypes.data, 4)
        second.download(target.ctypes.data, a.pointer, 4)
        second.wait()
        assert np.isnan(target).all()
        first.wait()
    assert driver.violations == ["upload and download of another stream use the same memory in no order"]
    driver.violations.clear()


def test_timed_events(device):
    stream, begin, end = Stream(device), Event(device, timed=True), Event(device, timed=True)
    with device.current():
        stream.record(begin)
        stream.record(end)
        end.wait()
        assert end.elapsed(begin) >= 0


def test_memory_is_counted_and_freed_by_its_owner(device, driver):
    a, b = device.allocate(1000), device.allocate(500)
    assert (device.allocated, device.peak, driver.used) == (1500, 1500, 1500)
    a.close()
    assert (device.allocated, device.peak, driver.used) == (500, 1500, 500)
    a.close()  # once is enough
    del b
    assert (device.allocated, driver.used) == (0, 0)
    view = device.pin(8).array((2,), np.float32)
    gc.collect()
    view[...] = 1  # the array keeps its memory alive
    assert driver.leaks()["pinned blocks"] == 1


def test_out_of_memory_says_how_much_there_is(device):
    kept = device.allocate(1 << 19)
    with pytest.raises(DeviceMemoryError, match=r"0\.8 MiB of GPU memory were wanted and 0\.5 MiB of 1\.0"):
        device.allocate(800_000)
    assert kept.size == 1 << 19
    assert device.allocate(1 << 19).pointer


def test_errors_carry_cudas_name_and_a_remedy(device, driver):
    stream = Stream(device)
    driver.faults = lambda name: (
        CUresult.CUDA_ERROR_ILLEGAL_ADDRESS if name == "cuStreamSynchronize" else None
    )
    with (
        device.current(),
        pytest.raises(CudaError, match="in cuStreamSynchronize: CUDA_ERROR_ILLEGAL_ADD") as e,
    ):
        stream.wait()
    assert e.value.name == "CUDA_ERROR_ILLEGAL_ADDRESS"
    assert "start it again" in e.value.remedy


def test_no_driver_and_no_gpu_are_told_apart(driver, monkeypatch):
    driver.faults = lambda name: CUresult.CUDA_ERROR_NO_DEVICE if name == "cuInit" else None
    with pytest.raises(CudaError, match="CUDA_ERROR_NO_DEVICE.*nvidia-smi"):
        Device()

    def missing(flags):
        raise RuntimeError("libcuda.so.1 is not there")

    monkeypatch.setattr("reelrt.runtime.cuda.load_driver", lambda: SimpleNamespace(cuInit=missing))
    with pytest.raises(BackendError, match="no NVIDIA driver.*Install the driver"):
        Device()


@pytest.mark.skipif(detect().gpu is not None, reason="this machine has a GPU")
def test_the_real_binding_without_a_driver_is_one_sentence():
    with pytest.raises(BackendError, match="Install the driver|nvidia-smi"):
        Device()


def test_the_callers_context_is_used_and_left_as_it_was(driver):
    stack = driver._stack()
    stack.append(77)
    theirs = Device()
    assert theirs._context == 77
    with theirs.current():
        assert stack == [77, 77]
    assert stack == [77]
    stream = Stream(theirs)
    stack.clear()
    assert Device(stream.handle)._context == 77
    assert driver.calls["cuDevicePrimaryCtxRetain"] == 0


class Numba:
    def __cuda_stream__(self):
        return 0, 0xA0


class Core:
    __cuda_stream__ = (0, 0xB0)


@pytest.mark.parametrize(
    ("stream", "handle"),
    [
        (0x90, 0x90),
        (Numba(), 0xA0),
        (Core(), 0xB0),
        (SimpleNamespace(handle=0xC0), 0xC0),  # pycuda.driver.Stream
        (SimpleNamespace(ptr=0xD0), 0xD0),  # cupy.cuda.Stream
        (SimpleNamespace(cuda_stream=0xE0), 0xE0),  # torch.cuda.Stream
    ],
)
def test_a_stream_of_any_library(stream, handle):
    assert stream_handle(stream) == handle


@pytest.mark.parametrize("bad", [-1, True, "stream", object()])
def test_what_is_no_stream_is_named(bad):
    with pytest.raises(InputError, match="no CUDA stream"):
        stream_handle(bad)


class Cupy:
    """Stands for an array of another library."""

    def __init__(self, pointer, shape, strides=None, stream=None):
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": "<f4",
            "data": (pointer, False),
            "strides": strides,
            "stream": stream,
        }


def test_arrays_are_shared_without_a_copy(device):
    buffer = device.allocate(24)
    ours = DeviceArray(buffer.pointer, (2, 3), np.dtype(np.float32), buffer, stream=5)
    interface = ours.__cuda_array_interface__
    assert interface["data"] == (buffer.pointer, False) and interface["stream"] == 5
    again = as_device_array(ours, 0)
    assert (again.pointer, again.shape, again.dtype, again.stream) == (buffer.pointer, (2, 3), ours.dtype, 5)
    assert as_device_array(Cupy(buffer.pointer, (2, 3), (12, 4)), 0).shape == (2, 3)
    with pytest.raises(InputError, match="does not lie in one piece"):
        as_device_array(Cupy(buffer.pointer, (3, 2), (4, 12)), 0)
    assert is_on_device(ours) and not is_on_device(np.zeros(3))


def test_parts_of_an_array(device):
    buffer = device.allocate(40)
    array = DeviceArray(buffer.pointer, (5, 2), np.dtype(np.float32), buffer)
    assert (array[1].pointer, array[1].shape) == (buffer.pointer + 8, (2,))
    assert array[-1].pointer == buffer.pointer + 32
    with pytest.raises(IndexError):
        array[5]
    parts = array.split(2)
    assert [(part.pointer - buffer.pointer, part.shape) for part in parts] == [
        (0, (2, 2)),
        (16, (2, 2)),
        (32, (1, 2)),
    ]


@pytest.mark.parametrize(("kind", "there"), [(1, False), (2, True), (13, True)])
def test_dlpack_says_where_an_array_lies(kind, there):
    assert is_on_device(SimpleNamespace(__dlpack__=None, __dlpack_device__=lambda: (kind, 0))) == there


def test_a_dlpack_array_of_the_cpu_is_refused():
    class Cpu:
        def __init__(self):
            self.values = np.zeros(3, np.float32)

        def __dlpack__(self, **options):
            return self.values.__dlpack__()

        def __dlpack_device__(self):
            return self.values.__dlpack_device__()

    with pytest.raises(InputError, match="Cpu does not lie in the GPU's memory"):
        as_device_array(Cpu(), 0)


def test_the_reason_a_resource_could_not_be_freed_is_logged(device, driver, caplog):
    buffer = device.allocate(4)
    driver.faults = lambda name: CUresult.CUDA_ERROR_LAUNCH_FAILED if name == "cuMemFree" else None
    with caplog.at_level(logging.DEBUG, "reelrt"):
        buffer.close()
    assert "CUDA_ERROR_LAUNCH_FAILED" in caplog.text
    driver.release(buffer.pointer)
