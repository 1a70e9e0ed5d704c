"""CUDA's door on a real GPU; needs no TensorRT."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from reelrt.errors import CudaError, DeviceMemoryError
from reelrt.runtime.cuda import Device, Event, Stream
from reelrt.runtime.device_array import DeviceArray, as_device_array

pytestmark = pytest.mark.gpu


@pytest.fixture
def device(gpu) -> Device:
    return Device()


def pinned(device, values):
    values = np.asarray(values, np.float32)
    array = device.pin(values.nbytes).array(values.shape, values.dtype)
    array[...] = values
    return array


def test_a_copy_there_and_back(device):
    stream, buffer = Stream(device), device.allocate(12)
    source, target = pinned(device, [1, 2, 3]), pinned(device, [0, 0, 0])
    assert buffer.pointer % 256 == 0
    with device.current():
        stream.upload(buffer.pointer, source.ctypes.data, 12)
        stream.download(target.ctypes.data, buffer.pointer, 12)
        stream.wait()
    assert target.tolist() == [1, 2, 3]


def test_a_graph_replays_with_what_lies_at_its_addresses_then(device):
    stream, a, b = Stream(device), device.allocate(8), device.allocate(8)
    host, result = pinned(device, [5, 6]), pinned(device, [0, 0])
    begin, end = Event(device, timed=True), Event(device, timed=True)
    with device.current():
        graph = stream.capture(lambda: stream.copy(b.pointer, a.pointer, 8))
        stream.upload(a.pointer, host.ctypes.data, 8)
        stream.record(begin)
        graph.launch(stream)
        stream.record(end)
        stream.download(result.ctypes.data, b.pointer, 8)
        stream.wait()
    assert result.tolist() == [5, 6]
    assert end.elapsed(begin) > 0


def test_what_cannot_be_captured_leaves_the_stream_usable(device):
    stream = Stream(device)
    with device.current():
        with pytest.raises(CudaError, match="CAPTURE"):
            stream.capture(stream.wait)
        with pytest.raises(ZeroDivisionError):
            stream.capture(lambda: 1 // 0)
        stream.wait()


def test_out_of_memory_leaves_the_device_usable(device):
    free, total = device.memory()
    with pytest.raises(DeviceMemoryError, match="were wanted"):
        device.allocate(2 * total)
    assert device.allocate(1024).pointer
    assert 0 < free <= total


def test_owners_give_everything_back(device):
    before, _ = device.memory()
    kept = [device.allocate(1 << 24) for _ in range(8)]
    assert device.memory()[0] <= before - (7 << 24)
    del kept
    gc.collect()
    assert device.memory()[0] >= before - (1 << 24)
    assert device.allocated == 0


def test_a_context_of_somebody_else_is_left_as_it_was(device):
    stream = Stream(device)
    theirs = Device(stream.handle)
    assert theirs._context == device._context
    assert int(device.call("cuCtxGetCurrent")) == 0 or device._context


def test_torch_shares_an_array_both_ways(device):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    tensor = torch.arange(6, dtype=torch.float32, device="cuda").reshape(2, 3)
    ours = as_device_array(tensor, torch.cuda.current_stream().cuda_stream)
    assert (ours.pointer, ours.shape) == (tensor.data_ptr(), (2, 3))
    buffer = device.allocate(24)
    array = DeviceArray(buffer.pointer, (2, 3), np.dtype(np.float32), buffer)
    assert torch.from_dlpack(array).data_ptr() == buffer.pointer
    assert torch.as_tensor(array, device="cuda").data_ptr() == buffer.pointer


def test_pycuda_shares_a_context_a_stream_and_an_array(gpu):
    pytest.importorskip("pycuda")
    import pycuda.autoprimaryctx
    import pycuda.driver
    import pycuda.gpuarray

    stream = pycuda.driver.Stream()
    device = Device(stream.handle)
    array = pycuda.gpuarray.to_gpu(np.arange(6, dtype=np.float32))
    assert as_device_array(array, stream.handle).pointer == int(array.gpudata)
    with device.current():
        Stream(device, stream).wait()
    assert pycuda.autoprimaryctx.context
