"""Numbers of things, as people read them."""

from __future__ import annotations

import pytest

from reelrt.wording import counted


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "prompt", "0 prompts"),
        (1, "step", "1 step"),
        (2, "layer", "2 layers"),
        (1024, "frame", "1,024 frames"),
    ],
)
def test_one_has_the_singular_and_no_other_number(number: int, noun: str, text: str) -> None:
    assert counted(number, noun) == text
