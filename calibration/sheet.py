"""A contact sheet: one picture of many videos, a row of frames each, with what was asked for.

Knows nothing of how the videos were made or judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL import ImageDraw
    from PIL.Image import Image

SHOWN = 6
FRAME_SIDE = 64
GAP, TEXT_HEIGHT = 3, 15
FONT_SIZE = 11
PAPER, INK, RED = (255, 255, 255), (20, 20, 20), (200, 0, 0)

Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One video on the sheet.

    Attributes:
        frames: Those shown, RGB, uint8 [n, h, w, 3]; see `small_frames`.
        caption: Written above them.
        failed: Words written in red behind the caption; a row that has any is framed in red.
    """

    frames: Frames
    caption: str
    failed: Sequence[str] = ()


def small_frames(frames: Frames) -> Frames:
    """A few frames of a video, evenly spread, with a longer side of 64 pixels.

    Args:
        frames: RGB, uint8 [F, H, W, 3].
    """
    from PIL import Image

    height, width = frames.shape[1:3]
    longer = max(width, height)
    size = (max(1, FRAME_SIDE * width // longer), max(1, FRAME_SIDE * height // longer))
    picked = np.linspace(0, len(frames) - 1, min(SHOWN, len(frames))).round().astype(int)
    pictures = [Image.fromarray(frames[index]).resize(size, Image.Resampling.BICUBIC) for index in picked]
    return np.stack([np.asarray(picture) for picture in pictures])


def contact_sheet(rows: Sequence[Row], columns: int = 2, title: str = "") -> Image:
    """Draw the sheet.

    Args:
        rows: At least one, alike in the number and size of their frames.
        columns: Videos beside each other.
        title: A line above everything.
    """
    from PIL import Image, ImageDraw

    shown, height, width, _ = rows[0].frames.shape
    across, columns = shown * (width + GAP), min(columns, len(rows))
    cell = (across + 3 * GAP, height + TEXT_HEIGHT + 4 * GAP)
    head = TEXT_HEIGHT + 2 * GAP if title else 0
    sheet = Image.new("RGB", (columns * cell[0], head + -(-len(rows) // columns) * cell[1]), PAPER)
    pen = ImageDraw.Draw(sheet)
    if title:
        _write(pen, (2 * GAP, GAP), Row(rows[0].frames, title), sheet.width - 4 * GAP)
    for index, row in enumerate(rows):
        left, top = index % columns * cell[0] + 2 * GAP, head + index // columns * cell[1] + GAP
        _write(pen, (left, top), row, across)
        top += TEXT_HEIGHT + GAP
        if row.failed:
            pen.rectangle((left - GAP, top - GAP, left + across - 1, top + height + GAP - 1), RED)
        for number, frame in enumerate(row.frames):
            sheet.paste(Image.fromarray(frame), (left + number * (width + GAP), top))
    return sheet


def _write(pen: ImageDraw.ImageDraw, place: tuple[int, int], row: Row, room: int) -> None:
    """The caption, cut to the room that what failed leaves, and what failed."""
    from PIL import ImageFont

    font = ImageFont.load_default(FONT_SIZE)
    failed, caption = ", ".join(row.failed), row.caption
    room -= round(pen.textlength(failed, font)) + 2 * GAP
    while caption and pen.textlength(caption, font) > room:
        caption = caption.removesuffix("…")[:-1]
        caption = caption and caption + "…"
    pen.text(place, caption, INK, font)
    pen.text((place[0] + room + 2 * GAP, place[1]), failed, RED, font)
