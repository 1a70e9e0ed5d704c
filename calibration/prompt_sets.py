"""The prompts a calibration runs: the user's file, or a set that ships.

The bundled model knows one small world and gets sentences of it; any other model gets
`calibration/prompts.txt`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from reelrt.calibration.prompts import pick_prompts, pick_scenes
from reelrt.errors import InputError

GENERAL = Path(__file__).with_name("prompts.txt")
SHAPES_MODEL = "moving-shapes"
DEFAULT_COUNT = 16
ALIKE = 0.8
"""Mean share of words in common from which prompts are called alike."""
MOST_CHARACTERS = 2000


def default_prompts(model: str, count: int = DEFAULT_COUNT, seed: int = 0) -> list[str]:
    """Prompts that suit a model.

    Args:
        model: Its name, as the bundle says.
        count: How many, at most those that ship for a model other than the bundled one.
        seed: Chooses among the bundled model's.
    """
    if model == SHAPES_MODEL:
        return pick_prompts(pick_scenes(count, seed), seed)
    every = read_prompts(GENERAL)
    # Neighbours in the file are about similar things.
    return [every[index * len(every) // count] for index in range(min(count, len(every)))]


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file: one per line; empty lines and those that begin with # are left out.

    Raises:
        InputError: It cannot be read, holds no prompt, or a line that is none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # some editors begin a file with a mark
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}.", "Give a text file with one prompt per line."
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is no UTF-8 text (byte {error.start}).", "Save it as UTF-8, one prompt per line."
        ) from error
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise InputError(f"{path} holds no prompt.", "Write one per line.")
    for prompt in prompts:
        if len(prompt) > MOST_CHARACTERS:
            raise InputError(
                f"{path}: the prompt {prompt[:40]!r}... has {len(prompt):,} characters.",
                f"Write at most {MOST_CHARACTERS:,}; models read less than that.",
            )
    return prompts


def warn_if_alike(prompts: Sequence[str]) -> None:
    """Warn when ranges would be narrow: prompts that share most of their words."""
    words = [frozenset(prompt.lower().split()) for prompt in prompts]
    pairs = list(combinations(words[:64], 2))
    shared = sum(len(a & b) / max(len(a | b), 1) for a, b in pairs) / len(pairs) if pairs else 1.0
    if shared >= ALIKE:
        what = "there is one prompt only" if not pairs else f"the prompts share {shared:.0%} of their words"
        warnings.warn(
            f"{what}: the ranges found with them would be too narrow for others. Give varied prompts.",
            UserWarning,
            stacklevel=3,
        )
