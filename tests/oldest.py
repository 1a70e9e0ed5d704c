"""Constraints that hold every dependency to the oldest version that pyproject.toml allows.

    python -m tests.oldest [EXTRA ...] > constraints.txt

Without an extra these are the runtime's own. `make test-oldest` installs with them and runs tests, so that
a lower bound is one that was tried. The runtime's and the tools' are tried apart from each other: the
oldest diffusers wants a newer safetensors than a device needs.
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
    """`package==version` of some extras' dependencies; of the runtime's where there is no extra."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    for line in [each for extra in extras for each in optional[extra]] or project["dependencies"]:
        requirement = Requirement(line)
        oldest = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        if oldest and (requirement.marker is None or requirement.marker.evaluate()):
            yield f"{requirement.name}=={oldest[0]}"


if __name__ == "__main__":
    print("\n".join(dict.fromkeys(constraints(sys.argv[1:]))))
