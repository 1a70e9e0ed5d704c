"""A stage other than the step on a GPU: its buffers, where it runs, and its result.

Knows one stage at one size; which sizes are kept, and who may load what when, is the business of
`reelrt.runtime.trt`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import numpy as np

from reelrt.bundle.manifest import Engine
from reelrt.runtime.cuda import Buffer, Device, Event, Stream
from reelrt.runtime.device_array import DeviceArray
from reelrt.runtime.execution import Execution, Scratch
from reelrt.runtime.session import Array
from reelrt.runtime.trt_library import OpenedEngine


@dataclass(frozen=True, slots=True)
class Lane:
    """Where stages run.

    Attributes:
        stream: The engines' stream.
        copies: The stream that copies results to the host; the same one when nothing overlaps.
        scratch: The activations' block.
    """

    stream: Stream
    copies: Stream
    scratch: Scratch

    def settle(self) -> None:
        """Wait before something is freed."""
        self.stream.settle()
        if self.copies is not self.stream:
            self.copies.settle()


class Started:
    """A stage that is started; see `reelrt.runtime.session.Result`.

    Args:
        call: Its buffers, nobody else's until the result was taken or this is dropped.
        recovering: Around the wait: frees everything when memory is used up.
        finished: Told when the result was read.
    """

    def __init__(
        self, call: Call, recovering: Callable[[], AbstractContextManager[None]], finished: Callable[[], None]
    ) -> None:
        self.call, self._recovering, self._finished = call, recovering, finished
        self._waiting = call.busy = True

    def __call__(self) -> dict[str, Array]:
        """Wait for the outputs, and let others have the buffers."""
        with self._recovering():
            outputs = self.call.outputs()
        self._let_go()
        self._finished()
        return outputs

    def _let_go(self) -> None:
        """Let others have the buffers; once, for they may have them already when this is collected."""
        if self._waiting:
            self._waiting = self.call.busy = False

    def __del__(self) -> None:
        """Nobody asks any more; whoever uses the buffers next waits until the GPU is done with them."""
        self._let_go()


class Call:
    """A stage other than the step, with buffers for one size of its inputs.

    Device memory is freed by `close`. Host memory and events go when nobody refers to them any more, for
    another thread may be waiting for a result just then.

    Attributes:
        busy: Whether somebody will ask for the outputs.
    """

    def __init__(
        self, device: Device, lane: Lane, engine: Engine, opened: OpenedEngine, sizes: Mapping[str, int]
    ) -> None:
        spec = engine.spec
        tensors = {
            name: (tensor.shape(sizes), tensor.numpy_dtype(engine.precision))
            for name, tensor in {**spec.inputs, **spec.outputs}.items()
        }
        self._inputs, self._outputs = list(spec.inputs), list(spec.outputs)
        self._device, self._lane, self.busy, self._under_way = device, lane, False, False
        self._ran, self._copied = Event(device), Event(device)
        self._host: dict[str, Array] = {}
        self._buffers: dict[str, Buffer] = {}
        with ExitStack() as owned:  # what fails half-way keeps nothing
            for name, (shape, dtype) in tensors.items():
                size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
                self._host[name] = device.pin(size).array(shape, dtype)
                self._buffers[name] = device.allocate(size)
                owned.callback(self._buffers[name].close)
            self._execution = Execution(
                opened,
                {name: tensors[name][0] for name in self._inputs},
                {name: buffer.pointer for name, buffer in self._buffers.items()},
                lane.scratch,
            )
            owned.callback(self._execution.close)
            self._owned = owned.pop_all()

    def start(self, inputs: Mapping[str, Array], into: Mapping[str, DeviceArray]) -> None:
        """Copy the inputs, run, and copy the outputs to the host; returns before any of it is done."""
        stream, copies = self._lane.stream, self._lane.copies
        with self._device.current():
            if self._under_way:  # the last time failed or was given up, and nothing says how far it came
                stream.wait()
                copies.wait()
            self._under_way = True
            for name in self._inputs:
                host = self._host[name]
                host[...] = inputs[name]
                stream.upload(self._buffers[name].pointer, host.ctypes.data, host.nbytes)
            self._execution.enqueue(stream)
            for name, target in into.items():
                stream.copy(target.pointer, self._buffers[name].pointer, target.size)
            if copies is not stream:
                stream.record(self._ran)
                copies.follow(self._ran)
            for name in self._outputs:
                host = self._host[name]
                copies.download(host.ctypes.data, self._buffers[name].pointer, host.nbytes)
            copies.record(self._copied)

    def outputs(self) -> dict[str, Array]:
        """What it gave, copied from the host's side, when it is there."""
        with self._device.current():
            self._copied.wait()
        outputs = {name: self._host[name].copy() for name in self._outputs}
        self._under_way = False
        return outputs

    def close(self) -> None:
        """Free the device memory, once nothing uses it any more."""
        self._lane.settle()
        with self._device.current():
            self._owned.close()
