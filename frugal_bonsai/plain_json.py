"""Plain values as standard JSON, which has no infinity and no NaN; and files that may be hostile.

In: mappings, lists, text, numbers; or the path of a small file. Out: JSON text with null in place
of a number that is not finite; or parsed values. Holds a copy of the values.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# More than any config, index, tokenizer or report has. Read whole, a file takes some times this.
MAX_FILE_BYTES = 256 * 2**20
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # half of a surrogate pair, or one that is whole


def json_text(values: Any, *, indent: int | None = None) -> str:
    """Return plain values as JSON; a number that is not finite is null."""
    return json.dumps(_finite(values), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def parse_json(text: str | bytes) -> Any:
    """Parse JSON that may come from a stranger.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or a text in it is no Unicode.
    """
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    try:
        value = json.loads(text)
        if _HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("a text holds half of a surrogate pair, which is no character") from error
    return value


def read_json(path: Path) -> Any:
    """Parse a JSON file that may come from a stranger.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON or no UTF-8, is nested too deeply, or is larger than 256 MiB.
    """
    return parse_json(read_text(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file that may come from a stranger.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no TOML or no UTF-8, is nested too deeply, or is larger than 256 MiB.
    """
    try:
        return tomllib.loads(read_text(path))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_text(path: Path) -> str:
    """Read a UTF-8 file of at most 256 MiB.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no UTF-8, or larger.
    """
    size_bytes = path.stat().st_size
    if size_bytes > MAX_FILE_BYTES:
        raise ValueError(f"{size_bytes} bytes, more than the {MAX_FILE_BYTES} that are read")
    return path.read_text(encoding="utf-8")
