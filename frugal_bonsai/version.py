"""The version of this package, for cards, profiles and reports."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """The installed version; of a source tree that nobody has installed its name."""
    try:
        return version("frugal-bonsai")
    except PackageNotFoundError:
        return "source tree"
