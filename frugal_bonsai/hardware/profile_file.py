"""Hardware profiles as TOML files.

In: a path, or a profile. Out: a checked :class:`HardwareProfile`, or the text of a file. A key that
is unknown, missing or has a wrong value raises an error that names the file and the key. Holds the
text.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from frugal_bonsai.checkpoint.commit import write_bytes
from frugal_bonsai.errors import OptionError
from frugal_bonsai.hardware.profile import HardwareProfile

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PRODUCTS = "products"


def read_profile(path: Path) -> HardwareProfile:
    """Read a profile.

    Raises:
        OptionError: The file cannot be read, is not TOML, or is not a profile.
    """
    values = _read(path)
    fields = {field.name: field for field in dataclasses.fields(HardwareProfile)}
    for key in values:
        if key not in fields:
            known = ", ".join(fields)
            raise OptionError(f"--profile {path}: key {key!r} is unknown; known are {known}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise OptionError(f"--profile {path}: key {name!r} is missing")
    try:
        return HardwareProfile(**values)
    except OptionError as error:
        raise OptionError(f"--profile {path}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(
            f"--profile {path}: cannot be read ({error.strerror or error}); `frugal-bonsai profile "
            f"--out FILE` measures this machine, profiles/ of the repository holds others"
        ) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise OptionError(f"--profile {path}: is no TOML file: {error}") from error


def write_profile(profile: HardwareProfile, path: Path) -> None:
    """Write a profile. It replaces another profile, but no other file.

    Raises:
        OptionError: Another file is there.
        OutputError: The system refuses to write.
    """
    require_replaceable(path)
    write_bytes(path, format_profile(profile).encode())


def require_replaceable(path: Path) -> None:
    """Raise unless a path is free or holds a profile.

    Raises:
        OptionError: Another file is there.
    """
    if not path.exists():
        return
    try:
        read_profile(path)
    except OptionError as error:
        raise OptionError(
            f"--out {path}: exists and is no hardware profile, so it is not replaced; name another "
            f"file ({error})"
        ) from error


def format_profile(profile: HardwareProfile) -> str:
    """Return a profile as TOML: a comment, the fields in order, the products as a table."""
    lines = ["# A hardware profile of frugal-bonsai; docs/hardware.md explains the numbers."]
    for field in dataclasses.fields(profile):
        value = getattr(profile, field.name)
        if field.name != _PRODUCTS and value is not None:
            lines.append(f"{field.name} = {_literal(value)}")
    lines += ["", f"[{_PRODUCTS}]  # operations a second"]
    lines += [f"{name} = {_literal(rate)}" for name, rate in profile.products.items()]
    return "\n".join(lines) + "\n"


def _literal(value: str | float) -> str:
    if isinstance(value, str):
        # TOML has JSON's escapes except for a slash, which JSON leaves here. It forbids DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    # A measurement is worth four digits.
    return f"{value:_}" if isinstance(value, int) else f"{value:.3e}"
