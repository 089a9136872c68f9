"""Parse and print sizes in bytes, and parse counts.

In: text such as ``"24GB"``, ``"800 MiB"`` or ``"250k"``. Out: ints; or text with binary units for
an int. Accepts both GB (10**9) and GiB (2**30).
"""

from __future__ import annotations

import re

from frugal_bonsai.errors import OptionError

KIB, MIB, GIB = 2**10, 2**20, 2**30
# A number of bytes below this, without a unit, is a size whose unit was forgotten.
_LEAST_WITHOUT_UNIT = 10**6

_UNITS = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "kb": 10**3,
    "kib": KIB,
    "m": 10**6,
    "mb": 10**6,
    "mib": MIB,
    "g": 10**9,
    "gb": 10**9,
    "gib": GIB,
    "t": 10**12,
    "tb": 10**12,
    "tib": 2**40,
}


def parse_bytes(text: str | int, *, option: str = "size") -> int:
    """Parse a size such as ``24GB``, ``1.5 GiB``, ``800MiB`` or a number of bytes.

    Args:
        text: the text of the option, or a number of bytes.
        option: name of the option, for the error text.

    Returns:
        The size in bytes, at least 1.

    Raises:
        OptionError: the text is not a size, the size is not positive, or its unit is missing.
    """
    if isinstance(text, int):
        value = float(text)
    else:
        found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
        if found is None or found.group(2).lower() not in _UNITS:
            raise OptionError(
                f"{option}: {text!r} is not a size; write for example 24GB, 7.5GiB or 800MiB"
            )
        value = float(found.group(1)) * _UNITS[found.group(2).lower()]
    if value < 1:
        raise OptionError(f"{option}: {text!r} is not a positive size; write for example 24GB")
    if isinstance(text, str) and text.strip()[-1].isdigit() and value < _LEAST_WITHOUT_UNIT:
        unit = "GB" if value < 1000 else "MB"
        raise OptionError(f"{option}: {text!r} has no unit; did you mean {text.strip()}{unit}?")
    return int(value)


def parse_count(text: str, *, option: str, least: int = 1) -> int:
    """Parse a count such as ``64``, ``250k`` or ``10M``.

    Raises:
        OptionError: the text is not a whole number, or it is less than ``least``.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kKmMgG]?)\s*", text)
    scale = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
    value = -1.0 if found is None else float(found.group(1)) * scale[found.group(2).lower()]
    if value < least or value != int(value):
        raise OptionError(f"{option}: {text!r} is not a count from {least}; write 64, 250k or 10M")
    return int(value)


def format_bytes(size_bytes: int) -> str:
    """Return a size as text in the largest binary unit in which it is at least 1 (``7.50 GiB``)."""
    for unit, scale in (("TiB", 2**40), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(size_bytes) >= scale:
            return f"{size_bytes / scale:.2f} {unit}"
    return f"{size_bytes} B"
