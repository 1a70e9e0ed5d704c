"""`reelrt` and `python -m reelrt`: the command line, quiet even if it is interrupted while it starts."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from reelrt.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
