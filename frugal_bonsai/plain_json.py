"""Plain values as standard JSON, which has no infinity and no NaN.

In: mappings, lists, text, numbers. Out: JSON text with null in place of a number that is not
finite. Holds a copy of the values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


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
