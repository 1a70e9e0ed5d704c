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


def is_on_device(array: object) -> bool:
    """Whether an array says that it lies in device memory; NumPy's do not."""
    if isinstance(array, np.ndarray):
        return False
    return hasattr(array, "__cuda_array_interface__") or hasattr(array, "__dlpack__")


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
