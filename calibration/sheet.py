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

FRAMES = 6
FRAME_SIDE = 64
GAP, TEXT_HEIGHT = 3, 15
FONT_SIZE = 11
PAPER, INK, RED = (255, 255, 255), (20, 20, 20), (200, 0, 0)


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One video on the sheet.

    Attributes:
        frames: RGB, uint8 [F, H, W, 3]; a few, evenly spread, are shown.
        caption: Written above them.
        failed: Words written in red behind the caption; a row that has any is framed in red.
    """

    frames: npt.NDArray[np.uint8]
    caption: str
    failed: Sequence[str] = ()


def contact_sheet(rows: Sequence[Row], columns: int = 2) -> Image:
    """Draw the sheet.

    Args:
        rows: At least one, all of one picture size.
        columns: Videos beside each other.
    """
    from PIL import Image, ImageDraw

    height, width = rows[0].frames.shape[1:3]
    tile = (FRAME_SIDE * width // max(width, height), FRAME_SIDE * height // max(width, height))
    shown = min(FRAMES, max(len(row.frames) for row in rows))
    cell = (shown * (tile[0] + GAP) + 3 * GAP, tile[1] + TEXT_HEIGHT + 4 * GAP)
    columns = min(columns, len(rows))
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * cell[0], lines * cell[1]), PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, row in enumerate(rows):
        left, top = index % columns * cell[0] + 2 * GAP, index // columns * cell[1] + GAP
        _write(pen, (left, top), row, shown * (tile[0] + GAP))
        top += TEXT_HEIGHT + GAP
        if row.failed:
            right = left + shown * (tile[0] + GAP)
            pen.rectangle((left - GAP, top - GAP, right - 1, top + tile[1] + GAP - 1), RED)
        picked = np.linspace(0, len(row.frames) - 1, min(shown, len(row.frames))).round().astype(int)
        for number, frame in enumerate(row.frames[picked]):
            picture = Image.fromarray(frame).resize(tile, Image.Resampling.BICUBIC)
            sheet.paste(picture, (left + number * (tile[0] + GAP), top))
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
