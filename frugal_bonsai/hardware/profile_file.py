"""Hardware profiles as TOML files.

In: a path, or a profile. Out: a checked :class:`HardwareProfile`, or the file's text. A key that is
unknown, missing or has a wrong value is an error that names the file and the key. Holds the text.
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
        OptionError: the file cannot be read, is no TOML, or is no profile.
    """
    return _profile(_read(path), path)


def write_profile(profile: HardwareProfile, path: Path) -> None:
    """Write a profile; only a file that is a profile itself is replaced.

    Raises:
        OptionError: something else stands there.
        OutputError: the system refuses.
    """
    require_replaceable(path)
    write_bytes(path, format_profile(profile).encode())


def require_replaceable(path: Path) -> None:
    """Refuse to write a profile over anything that is no profile.

    Raises:
        OptionError: something else stands there.
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
    """The profile as TOML: a comment, the fields in their order, the products as a table."""
    lines = ["# A hardware profile of frugal-bonsai; docs/hardware.md says what each number means."]
    for field in dataclasses.fields(profile):
        value = getattr(profile, field.name)
        if field.name != _PRODUCTS and value is not None:
            lines.append(f"{field.name} = {_literal(value)}")
    lines += ["", f"[{_PRODUCTS}]  # operations a second"]
    lines += [f"{name} = {_literal(rate)}" for name, rate in profile.products.items()]
    return "\n".join(lines) + "\n"


def _literal(value: str | float) -> str:
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for a slash, which it leaves, and DEL, which TOML forbids.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int):
        return f"{value:_}"
    # Four digits are what a measurement is worth.
    return f"{value:.3e}"


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


def _profile(values: dict[str, Any], path: Path) -> HardwareProfile:
    fields = {field.name: field for field in dataclasses.fields(HardwareProfile)}
    for key in values:
        if key not in fields:
            raise OptionError(
                f"--profile {path}: key {key!r} is unknown; known are {', '.join(fields)}"
            )
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise OptionError(f"--profile {path}: key {name!r} is missing")
    try:
        return HardwareProfile(**values)
    except OptionError as error:
        raise OptionError(f"--profile {path}: {error}") from error
