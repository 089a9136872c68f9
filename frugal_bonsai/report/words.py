"""How figures and names are written for people.

In: numbers, and text that came from elsewhere (paths, file names, device names). Out: short text
without control characters. Holds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from frugal_bonsai.sizes import format_bytes

Row = tuple[str, str, str, str]

# The paper's name for a kind of unit is "module"; these are the kinds' names in tables.
KIND_NAMES = {"attention": "KV groups", "ffn": "FFN channels"}
# What nobody measured, or what is no number.
NOTHING = "-"


def printable(text: str, encoding: str = "utf-8") -> str:
    r"""The text on one line: control characters and what the encoding lacks become ``\x1b``."""
    kept = "".join(c if c.isprintable() else _escaped(c) for c in text)
    return kept.encode(encoding, "backslashreplace").decode(encoding)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def all_printable(values: Any, encoding: str) -> Any:
    """A copy of plain values (mappings, lists, text, numbers) with every text printable."""
    if isinstance(values, str):
        return printable(values, encoding)
    if isinstance(values, Mapping):
        return {key: all_printable(value, encoding) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [all_printable(value, encoding) for value in values]
    return values


def number(value: float | None, digits: int = 2) -> str:
    """A measured number with so many decimals; ``-`` for None and NaN, 1.2e+07 if it is large."""
    if value is None or math.isnan(value):
        return NOTHING
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.{digits}e}"


def ratio(before: float | None, after: float | None) -> str:
    """What is left, as a share: after / before."""
    if not before or after is None or math.isinf(before):
        return NOTHING
    return number(after / before, 3)


def size_rows(before: Mapping[str, Any], after: Mapping[str, Any], where: str) -> list[Row]:
    """Parameters and bytes, before, after and what is left of them.

    Args:
        before: of the dense model: ``parameters``, ``block_parameters``, ``weight_bytes``.
        after: the same of the pruned one.
        where: what the bytes are of (``weights``, ``on disk``).
    """
    rows = [
        (name, f"{before[key]:,}", f"{after[key]:,}", ratio(before[key], after[key]))
        for name, key in (("parameters", "parameters"), ("block parameters", "block_parameters"))
    ]
    dense, pruned = before["weight_bytes"], after["weight_bytes"]
    sizes = (format_bytes(dense), format_bytes(pruned))
    return [*rows, (f"bytes {where}", *sizes, ratio(dense, pruned))]


def duration(seconds: float) -> str:
    """``12 s``, ``4 min``, ``2.5 h``, ``3.1 days``."""
    if seconds < 100:
        return f"{max(seconds, 0):.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 360_000 else f"{seconds / 86_400:.1f} days"


def span(counts: Sequence[int]) -> str:
    """``512``, or ``179 to 512`` where layers differ."""
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def plural(count: int, noun: str) -> str:
    """``1 window``, ``2 windows``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def runs(rows: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """(first, last) of each run of equal neighbours."""
    first = 0
    for at in range(1, len(rows) + 1):
        if at == len(rows) or rows[at] != rows[first]:
            yield first, at - 1
            first = at


def numbers_from_to(first: int, last: int) -> str:
    """``3``, or ``3-7``."""
    return str(first) if first == last else f"{first}-{last}"


def latency_words(latency: Mapping[str, Any]) -> str:
    """The predicted speed of a pruned model, and for which machine and shape."""
    return (
        f"{latency['speed_up']:.2f} times: {latency['dense_milliseconds']:.3g} to "
        f"{latency['pruned_milliseconds']:.3g} ms for a prompt of {latency['prompt_tokens']} "
        f"tokens and {latency['generated_tokens']} generated on {latency['profile']}"
    )
