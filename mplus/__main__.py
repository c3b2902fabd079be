"""``python -m mplus`` is ``mplus``."""

from mplus.cli import main

if __name__ == "__main__":
    main()
