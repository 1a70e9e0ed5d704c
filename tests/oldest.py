"""Constraints that hold every dependency to the oldest version that pyproject.toml allows.

    python -m tests.oldest EXTRA ... > constraints.txt

`make test-oldest` installs with them and runs the unit tests, so that a lower bound is one that was tried.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def constraints(extras: Sequence[str]) -> Iterator[str]:
    """`package==version` of the runtime's and some extras' dependencies."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    for line in (*project["dependencies"], *(each for extra in extras for each in optional[extra])):
        requirement = Requirement(line)
        oldest = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        if oldest and (requirement.marker is None or requirement.marker.evaluate()):
            yield f"{requirement.name}=={oldest[0]}"


if __name__ == "__main__":
    print("\n".join(dict.fromkeys(constraints(sys.argv[1:]))))
