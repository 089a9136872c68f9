"""Sizes in bytes: parsing what people type, printing what people read.

In: strings such as ``"24GB"`` or ``"800 MiB"``. Out: ints. Accepts GB (10**9) and GiB (2**30),
prints GiB.
"""

from __future__ import annotations

import re

from frugal_bonsai.errors import OptionError

KIB, MIB, GIB = 2**10, 2**20, 2**30

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
    """Read a size such as ``24GB``, ``1.5 GiB``, ``800MiB`` or a plain count of bytes.

    Args:
        text: what the user typed.
        option: name of the option, for the error text.

    Returns:
        The size in bytes, at least 1.

    Raises:
        OptionError: if the text is no size or the size is not positive.
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
    return int(value)


def parse_count(text: str, *, option: str, least: int = 1) -> int:
    """Read a count such as ``64``, ``250k`` or ``10M``.

    Raises:
        OptionError: if the text is no count, or less than ``least``.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kKmMgG]?)\s*", text)
    scale = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
    value = -1.0 if found is None else float(found.group(1)) * scale[found.group(2).lower()]
    if value < least or value != int(value):
        raise OptionError(f"{option}: {text!r} is not a count from {least}; write 64, 250k or 10M")
    return int(value)


def format_bytes(size_bytes: int) -> str:
    """Print a size in the largest binary unit that keeps it at least 1 (``7.50 GiB``)."""
    for unit, scale in (("TiB", 2**40), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(size_bytes) >= scale:
            return f"{size_bytes / scale:.2f} {unit}"
    return f"{size_bytes} B"
