"""Values as TOML literals, and sizes as the text that options take.

In: plain values. Out: text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

TomlValue = str | int | float | bool | Sequence[str]
_UNITS = (("GB", 10**9), ("GiB", 2**30), ("MB", 10**6), ("MiB", 2**20))


def toml_literal(value: TomlValue) -> str:
    """Return a value as TOML writes it."""
    if isinstance(value, str):
        # TOML has JSON's escapes except for a slash, which JSON leaves here. It forbids DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    return f"[{', '.join(toml_literal(part) for part in value)}]"


def exact_size(size_bytes: str | int) -> str:
    """Return a number of bytes in the largest unit that divides it; text stays as it is."""
    if isinstance(size_bytes, str):
        return size_bytes
    for unit, scale in _UNITS:
        if size_bytes % scale == 0:
            return f"{size_bytes // scale}{unit}"
    return f"{size_bytes}B"
