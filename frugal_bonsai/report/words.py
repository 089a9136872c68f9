"""Figures and names as text for people.

In: numbers, and text from elsewhere (paths, file names, device names). Out: short text without
control characters. Holds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from frugal_bonsai.sizes import format_bytes

Row = tuple[str, str, str, str]

# The paper's name for a kind of unit is "module"; these are the kinds' names in tables.
KIND_NAMES = {"attention": "KV groups", "ffn": "FFN channels"}
# Text of a value that is not measured or not a number.
NOTHING = "-"


def printable(text: str, encoding: str = "utf-8") -> str:
    r"""Return the text on one line, control and unencodable characters as ``\x1b``."""
    kept = "".join(c if c.isprintable() else _escaped(c) for c in text)
    return kept.encode(encoding, "backslashreplace").decode(encoding)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def all_printable(values: Any, encoding: str) -> Any:
    """Return a copy of plain values (mappings, lists, text, numbers) with every text printable."""
    if isinstance(values, str):
        return printable(values, encoding)
    if isinstance(values, Mapping):
        return {key: all_printable(value, encoding) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [all_printable(value, encoding) for value in values]
    return values


def number(value: float | None, digits: int = 2) -> str:
    """Return a number with this many decimals; ``-`` for None and NaN, 1.2e+07 if it is large."""
    if value is None or math.isnan(value):
        return NOTHING
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.{digits}e}"


def ratio(before: float | None, after: float | None) -> str:
    """Return after / before as text."""
    if not before or after is None or math.isinf(before):
        return NOTHING
    return number(after / before, 3)


def size_rows(before: Mapping[str, Any], after: Mapping[str, Any], where: str) -> list[Row]:
    """Return rows of parameters and bytes: before, after, and the ratio.

    Args:
        before: ``parameters``, ``block_parameters`` and ``weight_bytes`` of the dense model, and
            ``carried_bytes`` of parts beside its text model.
        after: The same of the pruned model.
        where: Noun of the bytes (``of weights``, ``on disk``).
    """
    carried = after.get("carried_bytes")
    of_text, of_all = (" of the text model", ", all parts") if carried else ("", "")
    rows = [
        (name, f"{before[key]:,}", f"{after[key]:,}", ratio(before[key], after[key]))
        for name, key in (
            (f"parameters{of_text}", "parameters"),
            (f"block parameters{of_text}", "block_parameters"),
        )
    ]
    dense, pruned = before["weight_bytes"], after["weight_bytes"]
    sizes = (format_bytes(dense), format_bytes(pruned))
    return [*rows, (f"bytes {where}{of_all}", *sizes, ratio(dense, pruned))]


def task_figure_rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Row]:
    """Return rows of the scores on tasks, if there are any: before, after, and the ratio."""
    rows = []
    for task, scores in before.get("tasks", {}).items():
        for metric, dense in task_metrics(scores):
            pruned = after["tasks"][task][metric]
            name = f"{task}, {metric}, {plural(scores['items'], 'item')}"
            rows.append((name, number(dense, 4), number(pruned, 4), ratio(dense, pruned)))
    return rows


def task_metrics(scores: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    """Return the metrics of a task and their values, without standard errors."""
    left_out = ("items", "_stderr")
    return [(name, value) for name, value in scores.items() if not name.endswith(left_out)]


def duration(seconds: float) -> str:
    """Return ``12 s``, ``4 min``, ``2.5 h`` or ``3.1 days``."""
    if seconds < 100:
        return f"{max(seconds, 0):.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 360_000 else f"{seconds / 86_400:.1f} days"


def span(counts: Sequence[int]) -> str:
    """Return ``512``, or ``179 to 512`` if layers differ."""
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def plural(count: int, noun: str) -> str:
    """Return ``1 window`` or ``2 windows``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def runs(rows: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """Yield (first, last) of each run of equal neighbours."""
    first = 0
    for at in range(1, len(rows) + 1):
        if at == len(rows) or rows[at] != rows[first]:
            yield first, at - 1
            first = at


def numbers_from_to(first: int, last: int) -> str:
    """Return ``3`` or ``3-7``."""
    return str(first) if first == last else f"{first}-{last}"


def latency_words(latency: Mapping[str, Any]) -> str:
    """Return the predicted speed of a pruned model, with the machine and the token counts."""
    return (
        f"{latency['speed_up']:.2f} times: {latency['dense_milliseconds']:.3g} to "
        f"{latency['pruned_milliseconds']:.3g} ms for a prompt of {latency['prompt_tokens']} "
        f"tokens and {latency['generated_tokens']} generated on {latency['profile']}"
    )


def peak_words(memory: Mapping[str, Any], where: str) -> str:
    """Return ``peak 0.50 GiB (predicted 0.48 GiB) of 2.00 GiB``."""
    cap, predicted = memory[f"{where}_cap_bytes"], memory[f"{where}_predicted_bytes"]
    peak = (
        f"peak {format_bytes(memory[f'{where}_peak_bytes'])} (predicted {format_bytes(predicted)})"
    )
    return peak if cap is None else f"{peak} of {format_bytes(cap)}"


def rate(value: float, unit: str) -> str:
    """Return three digits with a prefix: ``47.3 Gflop/s``; small rates are not zero."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:#.3g}".rstrip(".") + f" {prefix}{unit}"
    return f"{value:.3g} {unit}"


def rate_rows(profile: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the memory and the rates of a hardware profile: names and values with units."""
    yield "host memory", format_bytes(profile["host_bytes"])
    if profile["gpu_bytes"] is not None:
        yield "GPU memory", format_bytes(profile["gpu_bytes"])
    for key, name in (
        ("disk_cold_bytes_per_second", "disk, cold read"),
        ("disk_warm_bytes_per_second", "disk, read from the page cache"),
        ("disk_write_bytes_per_second", "disk, write with fsync"),
        ("copy_bytes_per_second", "host to GPU, pinned"),
        ("memory_bytes_per_second", "memory, elementwise operations"),
        ("fresh_bytes_per_second", "memory, first write to new blocks"),
    ):
        if profile[key] is not None:
            yield name, rate(profile[key], "B/s")
    for name, found in profile["products"].items():
        yield f"matrix products, {name}", rate(found, "flop/s")
    yield "attention", rate(profile["attention_flops_per_second"], "flop/s")
    solves = rate(profile["solve_flops_per_second"], "flop/s")
    yield "Cholesky factors and solves, fp32", solves
    yield "a layer call beside its arithmetic", f"{profile['call_seconds'] * 1e3:.3g} ms"
    yield "a command's start", f"{profile['start_seconds']:.3g} s"
