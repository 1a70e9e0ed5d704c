"""How messages and reports word a number of things. Knows none of them."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """A number and its noun: `1 prompt`, `2 prompts`.

    Args:
        number: How many.
        noun: For one of them; several take an s.
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
