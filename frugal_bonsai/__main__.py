"""``python -m frugal_bonsai``: the command line."""

from frugal_bonsai.cli import main

if __name__ == "__main__":
    main()
