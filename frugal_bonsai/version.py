"""The version of this package, for model cards, profiles and reports."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """Return the installed version, or ``source tree`` if the package is not installed."""
    try:
        return version("frugal-bonsai")
    except PackageNotFoundError:
        return "source tree"
