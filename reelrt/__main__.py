"""`python -m reelrt` is the command line."""

from reelrt.cli import main

if __name__ == "__main__":
    main()
