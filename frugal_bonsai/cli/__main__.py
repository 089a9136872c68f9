"""``python -m frugal_bonsai.cli``."""

from frugal_bonsai.cli import main

if __name__ == "__main__":
    main()
