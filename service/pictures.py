"""Small pictures of a video: thumbnail, spritesheet, previews while it is made. JPEG, from frames."""

from __future__ import annotations

import io
import math

import numpy as np
import numpy.typing as npt

from reelrt.runtime.formats import Frames

PREVIEW_SIDE, THUMBNAIL_SIDE, SPRITE_SIDE = 192, 320, 160
"""Longest side in pixels; smaller pictures stay as they are."""
SPRITES = 16
"""Most pictures of a spritesheet."""
QUALITY = 85


def preview(frames: Frames) -> bytes:
    """A JPEG of the middle one of some frames, uint8 [n, H, W, 3]."""
    return _jpeg(_smaller(frames[len(frames) // 2], PREVIEW_SIDE))


def thumbnail(frames: Frames) -> bytes:
    """A JPEG of a video's middle frame."""
    return _jpeg(_smaller(frames[len(frames) // 2], THUMBNAIL_SIDE))


def spritesheet(frames: Frames) -> bytes:
    """A JPEG of up to 16 frames at equal distances, in rows of nearly as many as there are rows."""
    count = min(len(frames), SPRITES)
    chosen = [round(index * (len(frames) - 1) / max(count - 1, 1)) for index in range(count)]
    sprites = [_smaller(frames[index], SPRITE_SIDE) for index in chosen]
    columns = math.ceil(math.sqrt(count))
    height, width = sprites[0].shape[:2]
    sheet = np.zeros((math.ceil(count / columns) * height, columns * width, 3), np.uint8)
    for index, sprite in enumerate(sprites):
        top, left = index // columns * height, index % columns * width
        sheet[top : top + height, left : left + width] = sprite
    return _jpeg(sheet)


def _smaller(frame: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    from PIL import Image

    picture = Image.fromarray(frame)
    picture.thumbnail((side, side))
    return np.asarray(picture)


def _jpeg(frame: npt.NDArray[np.uint8]) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame).save(file, format="JPEG", quality=QUALITY)
    return file.getvalue()
