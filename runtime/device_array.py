"""Arrays in device memory that we and other libraries share without a copy.

pycuda, CuPy, numba and torch understand `__cuda_array_interface__`; what knows only DLPack goes
through cuda-core. Knows no engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from reelrt.errors import InputError


@dataclass(frozen=True, slots=True, eq=False)
class DeviceArray:
    """A contiguous array in device memory.

    Attributes:
        pointer: Its address.
        shape: Its shape.
        dtype: Its dtype.
        owner: What keeps the memory alive, and is kept alive by this.
        stream: Handle of the stream whose work it is the result of; 0 when it is ready.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: object
    stream: int = 0

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "strides": None,
            "stream": self.stream or None,
        }

    def _view(self) -> Any:
        from cuda.core import Buffer
        from cuda.core.utils import StridedMemoryView

        buffer = Buffer.from_handle(self.pointer, self.size, owner=self)
        return StridedMemoryView.from_buffer(buffer, self.shape, dtype=self.dtype)

    def __dlpack__(self, **options: Any) -> Any:
        return self._view().__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._view().__dlpack_device__()

    def __getitem__(self, index: int) -> DeviceArray:
        """One part along the first axis."""
        shape = self.shape[1:]
        offset = range(self.shape[0])[index] * prod(shape) * self.dtype.itemsize
        return DeviceArray(self.pointer + offset, shape, self.dtype, self.owner, self.stream)

    def split(self, size: int) -> list[DeviceArray]:
        """Parts of so many along the first axis; the last one may be shorter."""
        step = prod(self.shape[1:]) * self.dtype.itemsize
        return [
            DeviceArray(
                self.pointer + begin * step,
                (min(size, self.shape[0] - begin), *self.shape[1:]),
                self.dtype,
                self.owner,
                self.stream,
            )
            for begin in range(0, self.shape[0], size)
        ]


DLPACK_CUDA = (2, 13)
"""DLPack's numbers for memory of a GPU, and for memory that CUDA moves by itself."""


def is_on_device(array: object) -> bool:
    """Whether an array says that it lies in device memory."""
    if isinstance(array, np.ndarray):
        return False
    if hasattr(array, "__cuda_array_interface__"):
        return True
    place = getattr(array, "__dlpack_device__", None)
    return place is not None and place()[0] in DLPACK_CUDA


def as_device_array(array: Any, stream: int) -> DeviceArray:
    """View another library's array.

    Args:
        array: Anything with `__cuda_array_interface__` or `__dlpack__`, contiguous.
        stream: Handle of the stream that will read it.

    Raises:
        InputError: It does not lie in device memory, or not in one piece.
    """
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is not None:
        shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
        strides = interface.get("strides")
        found = DeviceArray(int(interface["data"][0]), shape, dtype, array, int(interface.get("stream") or 0))
    else:
        from cuda.core.utils import StridedMemoryView

        view = StridedMemoryView.from_dlpack(array, stream_ptr=stream)
        if not view.is_device_accessible:
            raise InputError(
                f"{type(array).__name__} does not lie in the GPU's memory.", "Give a NumPy array."
            )
        shape, dtype = tuple(view.shape), np.dtype(view.dtype)
        strides = view.strides and tuple(step * dtype.itemsize for step in view.strides)
        found = DeviceArray(int(view.ptr), shape, dtype, view)
    if strides is not None and tuple(strides) != _contiguous(shape, dtype.itemsize):
        raise InputError(f"an array of shape {shape} with strides {strides} does not lie in one piece.")
    return found


def _contiguous(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(itemsize * prod(shape[index + 1 :]) for index in range(len(shape)))
