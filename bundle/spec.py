"""What goes into and comes out of each stage, said once.

Export, validation, optimization profiles, calibration and the runtime all read these specs.
Knows names, axes, dtypes and tolerances; knows no framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from reelrt.errors import RangeError

Axis = str | int
"""A named axis is dynamic, a number is fixed. `8*height` is a named axis times a constant."""

MAX_TABLE_ROWS = 200
"""100 steps of split guidance, which take two rows each."""
DECODER_FRAMES = 4
"""Latent frames per call of the decoder: enough to keep a device busy, little enough to fit one."""

TABLE_COLUMNS = 3
"""Columns of a schedule table before the state matrix: timestep, input scale, text."""


def is_whole(value: object) -> bool:
    """Whether a value is a whole number; True and False are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a stage.

    Attributes:
        dtype: numpy's name of the dtype; `model` stands for the stage's own precision.
        axes: One entry per dimension.
    """

    dtype: str
    axes: tuple[Axis, ...]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape for given sizes of the named axes.

        Raises:
            KeyError: A named axis has no size.
        """
        return tuple(_resolve(axis, sizes) for axis in self.axes)

    def numpy_dtype(self, precision: str) -> np.dtype[Any]:
        """The dtype at the boundary of a stage that runs in `precision`."""
        name = {"fp16": "float16"}.get(precision, "float32") if self.dtype == "model" else self.dtype
        return np.dtype(name)

    @property
    def dynamic(self) -> dict[int, str]:
        """Dimension index to axis name, for the dynamic dimensions."""
        return {index: axis for index, axis in enumerate(self.axes) if isinstance(axis, str)}


def _resolve(axis: Axis, sizes: Mapping[str, int]) -> int:
    if isinstance(axis, int):
        return axis
    factor, _, name = axis.rpartition("*")
    return int(factor or 1) * sizes[name]


@dataclass(frozen=True, slots=True)
class StageSpec:
    """A stage's boundary and how far an export may stray from the model.

    Attributes:
        name: `text_encoder`, `step` or `vae_decoder`.
        inputs: Input name to spec, in call order.
        outputs: Output name to spec, in order.
        tolerance: Largest difference from the model in FP32, relative to the output's largest
            magnitude; for integer outputs, in units of the last place.
    """

    name: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    tolerance: float

    @property
    def axes(self) -> tuple[str, ...]:
        """The named axes of the inputs, in order of appearance."""
        names = [a.rpartition("*")[2] for s in self.inputs.values() for a in s.axes if isinstance(a, str)]
        return tuple(dict.fromkeys(names))

    def to_json(self) -> dict[str, Any]:
        """A plain structure that `from_json` reads back."""
        sides = {"inputs": self.inputs, "outputs": self.outputs}
        tensors = {
            side: {name: {"dtype": t.dtype, "axes": list(t.axes)} for name, t in specs.items()}
            for side, specs in sides.items()
        }
        return {"name": self.name, **tensors, "tolerance": self.tolerance}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StageSpec:
        """The inverse of `to_json`."""
        inputs, outputs = (
            {name: TensorSpec(t["dtype"], tuple(t["axes"])) for name, t in data[side].items()}
            for side in ("inputs", "outputs")
        )
        return cls(data["name"], inputs, outputs, data["tolerance"])


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes of a model that no request can change.

    Attributes:
        latent_channels: C of the latents [B, C, F, H, W].
        spatial_scale: Pixels per latent cell, along height and width.
        size_multiple: Width and height of a picture, in pixels, are multiples of this.
        tokens: Length of a tokenised prompt.
        text_width: Width of a prompt embedding.
        state_rows: R of the step's state [B, R, C, F, H, W].
        frames: Default number of frames.
        height: Default height in pixels.
        width: Default width in pixels.
    """

    latent_channels: int
    spatial_scale: int
    size_multiple: int
    tokens: int
    text_width: int
    state_rows: int
    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        """Refuse what a damaged manifest may hold; raises ValueError."""
        sizes = {name: getattr(self, name) for name in self.__slots__}
        if not all(is_whole(size) and size > 0 for size in sizes.values()):
            raise ValueError(f"the geometry {sizes} has a size that is none")

    @property
    def table_columns(self) -> int:
        """K of the step's table [B, S, K]."""
        return TABLE_COLUMNS + self.state_rows * (self.state_rows + 1)


def text_encoder_spec(geometry: Geometry) -> StageSpec:
    """Token ids to prompt embeddings."""
    return StageSpec(
        "text_encoder",
        inputs={"tokens": TensorSpec("int64", ("batch", geometry.tokens))},
        outputs={"text": TensorSpec("model", ("batch", geometry.tokens, geometry.text_width))},
        tolerance=1e-4,
    )


def step_spec(geometry: Geometry) -> StageSpec:
    """One self-advancing denoising step; see docs/architecture.md."""
    latents: tuple[Axis, ...] = (geometry.latent_channels, "frames", "height", "width")
    state = TensorSpec("float32", ("batch", geometry.state_rows, *latents))
    return StageSpec(
        "step",
        inputs={
            "state": state,
            "table": TensorSpec("float32", ("batch", "rows", geometry.table_columns)),
            "step": TensorSpec("int64", ("batch",)),
            "text": TensorSpec("model", ("batch", 2, geometry.tokens, geometry.text_width)),
        },
        outputs={"state_next": state, "step_next": TensorSpec("int64", ("batch",))},
        tolerance=1e-4,
    )


def vae_decoder_spec(geometry: Geometry) -> StageSpec:
    """A few latent frames to uint8 RGB frames."""
    scale = f"{geometry.spatial_scale}*"
    latents = ("batch", geometry.latent_channels, "frames", "height", "width")
    pixels = ("batch", "frames", f"{scale}height", f"{scale}width", 3)
    return StageSpec(
        "vae_decoder",
        inputs={"latents": TensorSpec("float32", latents)},
        outputs={"frames": TensorSpec("uint8", pixels)},
        tolerance=1,
    )


@dataclass(frozen=True, slots=True)
class Range:
    """The sizes that an engine accepts along one axis, and the one it is tuned for."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        """Refuse what a damaged manifest may hold; raises ValueError."""
        sizes = (self.min, self.opt, self.max)
        if not (all(map(is_whole, sizes)) and 0 < self.min <= self.opt <= self.max):
            raise ValueError(f"{sizes} is not a range of sizes")

    def check(self, name: str, value: int, unit: int = 1, built: bool = True) -> None:
        """Refuse a size outside the range.

        Args:
            name: What the user calls this size.
            value: The size, in cells of the axis.
            unit: What one cell is to the user (8 pixels, say), for the message.
            built: Whether it is of an engine, which can be built for another range; else of a bundle.

        Raises:
            RangeError: The value is outside; the message names the allowed range.
        """
        if self.min <= value <= self.max:
            return
        low, high = self.min * unit, self.max * unit
        whose, remedy = "these engines take", "Build engines with a profile that covers it."
        if not built:
            whose, remedy = "a bundle that is run as it is takes", "Choose one in this range."
        allowed = f"{whose} {low}" if low == high else f"{whose} {low} to {high}"
        raise RangeError(name, value * unit, allowed, remedy)


Profile = Mapping[str, Range]
"""Axis name to range: the optimization profile of one stage."""
