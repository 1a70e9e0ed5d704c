"""`reelrt` and `python -m reelrt`: the command line, quiet also when it is stopped while it loads."""

from __future__ import annotations

from reelrt.stopping import at_once, end_on_signals


def main() -> None:
    """Run the command line."""
    end_on_signals()
    with at_once():
        from reelrt.cli import main as run

        run()


if __name__ == "__main__":
    main()
