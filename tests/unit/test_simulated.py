"""The simulated GPU catches what a real one would answer with damage."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from reelrt.runtime.cuda import Device, Event, Stream
from tests.simulated.driver import SimulatedDriver


@pytest.fixture
def driver(monkeypatch):
    simulated = SimulatedDriver()
    monkeypatch.setattr("reelrt.runtime.cuda.load_driver", lambda: simulated)
    return simulated


@pytest.fixture
def device(driver):
    return Device()


def caught(driver, what):
    assert len(driver.violations) == 1
    assert what in driver.violations[0]


def test_use_after_free(driver, device):
    stream, a, b = Stream(device), device.allocate(8), device.allocate(8)
    with device.current():
        graph = stream.capture(lambda: stream.copy(b.pointer, a.pointer, 8))
        a.close()
        graph.launch(stream)
        stream.wait()
    caught(driver, "not device memory that is in use")


@pytest.mark.parametrize("offset", [-1, 1, 1 << 30])
def test_an_address_outside(driver, device, offset):
    stream, a = Stream(device), device.allocate(8)
    with device.current():
        stream.clear(a.pointer + offset, 8)
        stream.wait()
    caught(driver, "memset: 8 bytes")


def test_host_memory_that_changes_under_a_copy(driver, device):
    stream, a, host = Stream(device), device.allocate(4), device.pin(4).array((1,), np.float32)
    with device.current():
        stream.upload(a.pointer, host.ctypes.data, 4)
        host[...] = 1
        stream.wait()
    caught(driver, "changed while a copy")


def test_host_memory_that_is_not_pinned(driver, device):
    stream, a, host = Stream(device), device.allocate(4), np.zeros(1, np.float32)
    with device.current():
        stream.upload(a.pointer, host.ctypes.data, 4)
    caught(driver, "not pinned memory")


def test_a_copy_onto_itself(driver, device):
    stream, a = Stream(device), device.allocate(12)
    with device.current():
        stream.copy(a.pointer + 4, a.pointer, 8)
        stream.wait()
    caught(driver, "overlaps itself")


def test_two_streams_that_nothing_orders(driver, device):
    """The second copy may read before, while or after the first one writes."""
    one, two, event = Stream(device), Stream(device), Event(device)
    a, b = device.allocate(8), device.allocate(8)
    with device.current():
        one.clear(a.pointer, 8)
        one.record(event)
        two.follow(event)
        two.copy(b.pointer, a.pointer, 8)
        two.wait()
        one.wait()
        assert driver.violations == []
        one.clear(a.pointer, 8)
        two.copy(b.pointer, a.pointer, 8)
        one.wait()  # too late: the copy was put on its stream before
        two.wait()
    caught(driver, "copy and memset of another stream use the same memory in no order")


def test_a_downloads_target_that_is_used_again_too_early(driver, device):
    stream, a, host = Stream(device), device.allocate(4), device.pin(4).array((1,), np.float32)
    with device.current():
        stream.clear(a.pointer, 4)
        for _ in range(2):
            stream.download(host.ctypes.data, a.pointer, 4)
            stream.wait()
        assert driver.violations == []
        stream.download(host.ctypes.data, a.pointer, 4)
        stream.download(host.ctypes.data, a.pointer, 4)
        stream.wait()
    caught(driver, "before anybody waited")


def test_another_threads_work_in_a_capture(driver, device):
    stream, a = Stream(device), device.allocate(8)

    def clear():
        with device.current():
            stream.clear(a.pointer, 8)

    def work():
        thread = threading.Thread(target=clear)
        thread.start()
        thread.join()

    with device.current():
        stream.capture(work)
    caught(driver, "memset is put on a stream that another thread captures")


def test_memory_nobody_wrote_is_nan(device):
    stream, a, host = Stream(device), device.allocate(4), device.pin(4).array((1,), np.float32)
    with device.current():
        stream.download(host.ctypes.data, a.pointer, 4)
        stream.wait()
    assert np.isnan(host).all()


def test_a_call_without_a_context(device):
    from reelrt.errors import CudaError

    stream = Stream(device)
    with pytest.raises(CudaError, match="CUDA_ERROR_INVALID_CONTEXT"):
        stream.clear(0, 1)


def test_freeing_what_is_not_ours(driver, device):
    device.free("cuMemFree", 0x123)
    caught(driver, "is freed and is no device memory")


def test_leaks_are_counted(driver, device):
    kept = device.allocate(10), Stream(device), device.pin(3)
    assert driver.leaks() == {"device bytes": 10, "pinned blocks": 1, "streams": 1, "contexts": 1}
    del kept
    assert driver.leaks() == {"contexts": 1}
