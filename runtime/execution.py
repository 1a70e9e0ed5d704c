"""Execution contexts with everything set, and the one block of memory that they share.

Contexts run one after the other on one stream, so one block holds the activations of whichever
runs. Knows TensorRT's calls and addresses; knows no stage and no schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reelrt.runtime.cuda import Buffer, Device, Stream
from reelrt.runtime.trt_library import OpenedEngine


class Scratch:
    """The block that activations live in; grows to what the largest context needs.

    Attributes:
        version: Changes when the block moves: what has its address has to be made again.

    Args:
        device: Where it is.
        stream: What uses it.
    """

    def __init__(self, device: Device, stream: Stream) -> None:
        self._device, self._stream = device, stream
        self._buffer: Buffer | None = None
        self.version = 0

    @property
    def size(self) -> int:
        """Bytes."""
        return 0 if self._buffer is None else self._buffer.size

    def reserve(self, size: int) -> Buffer:
        """The block, of at least so many bytes.

        Raises:
            DeviceMemoryError: There is not so much left; the block is gone then.
        """
        if self._buffer is None or self._buffer.size < size:
            self.release()
            self._buffer = self._device.allocate(size)
        return self._buffer

    def release(self) -> None:
        """Free the block, once nothing uses it any more."""
        if self._buffer is not None:
            self._stream.settle()
            self._buffer.close()
            self._buffer = None
        self.version += 1


class Execution:
    """An execution context; shapes and addresses are set once, when it is made.

    Args:
        opened: The engine.
        shapes: Input to shape.
        addresses: Every input and output to its address.
        scratch: The shared block.

    Raises:
        BackendError: The library refuses a shape or makes no context.
    """

    def __init__(
        self,
        opened: OpenedEngine,
        shapes: Mapping[str, tuple[int, ...]],
        addresses: Mapping[str, int],
        scratch: Scratch,
    ) -> None:
        self._opened, self._scratch, self._version = opened, scratch, -1
        self._context: Any = opened.context()
        try:
            self._set(shapes, addresses)
        except BaseException:
            self.close()
            raise

    def _set(self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        library = self._opened.library
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise library.error(f"refuses the shape {shape} of {name}")
        self.need = int(self._context.update_device_memory_size_for_shapes())
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise library.error(f"refuses the address of {name}")

    def prepare(self) -> None:
        """See that the scratch block is large enough and known to the context.

        Raises:
            DeviceMemoryError: The block cannot grow so far.
        """
        block = self._scratch.reserve(self.need)
        if self._version != self._scratch.version:
            self._context.set_device_memory(block.pointer, block.size)
            self._version = self._scratch.version

    def enqueue(self, stream: Stream) -> None:
        """Let the stream run it; returns before it has.

        Raises:
            BackendError: The library refuses.
        """
        self.prepare()
        library = self._opened.library
        library.said.clear()
        if not self._context.execute_async_v3(stream.handle):
            raise library.error(f"failed in {self._opened.path.stem}")

    def obstacle(self, stream: Stream) -> str:
        """Why the library says it cannot be captured; empty when it does not say so."""
        if "capturable" not in self._opened.library.features:
            return ""
        if self._context.is_stream_capturable(stream.handle):
            return ""
        return f"{self._opened.library.title} cannot capture {self._opened.path.stem}"

    def close(self) -> None:
        """Free what the library keeps for it; it may not be under way."""
        self._context = None
