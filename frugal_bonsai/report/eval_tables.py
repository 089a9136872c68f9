"""The output of ``eval``: a perplexity, scores of tasks, and what they took.

In: the values that ``--json`` prints. Out: tables on a rich console. Computes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from frugal_bonsai.report.sheet import Sheet
from frugal_bonsai.report.words import all_printable, number, peak_words, task_metrics
from frugal_bonsai.sizes import format_bytes

if TYPE_CHECKING:
    from rich.console import Console

Values = Mapping[str, Any]


def render_eval(result: Values, console: Console) -> None:
    """Print a perplexity with its window length, and the scores of tasks.

    Args:
        result: Result of :func:`frugal_bonsai.evaluate`.
        console: Console that is printed on.
    """
    result, sheet = all_printable(result, console.encoding), Sheet(console)
    if "tasks" in result:
        sheet.heading(f"{result['model']} on tasks")
        heads = ("task", "metric", "value", "standard error", "items")
        sheet.table(heads, task_rows(result["tasks"]), left=2)
    rows: list[tuple[str, str]] = []
    if "perplexity" in result:
        low, high = (number(result.get(f"perplexity_{end}"), 4) for end in ("low", "high"))
        rows += [
            (f"perplexity, window {result['window']}", number(result["perplexity"], 4)),
            ("its standard error", number(result.get("perplexity_error"), 4)),
            ("95% interval, over windows", f"{low} to {high}"),
            ("mean NLL, nats a token", number(result["nll"], 5)),
            ("bits per byte of the text", number(result.get("bits_per_byte"), 4)),
            ("windows", f"{result['windows']:,}"),
            ("stride", f"{result.get('stride') or result['window']:,}"),
            ("tokens predicted", f"{result['tokens']:,}"),
        ]
    rows += [
        ("time", f"{result['seconds']:,.1f} s"),
        ("tokens/s", f"{result['tokens_per_second']:,.0f}"),
    ]
    if "file_bytes" in result:
        formats = ", ".join(f"{count} {kind}" for kind, count in result["tensors"].items())
        rows += [
            ("tensors", formats),
            ("bytes of the file", format_bytes(result["file_bytes"])),
            ("peak host memory, of llama.cpp's process", format_bytes(result["host_peak_bytes"])),
        ]
    else:
        rows += [("weights", result["weights"]), ("host memory", peak_words(result, "host"))]
    if result["gpu_peak_bytes"] is not None:
        rows.append(("GPU memory", peak_words(result, "gpu")))
    sheet.heading(f"{result['model']} on {result['text']}" if "text" in result else "the run")
    sheet.table(("", ""), rows)
    for note in result.get("notes", ()):
        sheet.say(f"note: {note}")


def task_rows(tasks: Values) -> list[tuple[str, str, str, str, str]]:
    """Return task, metric, value, standard error and number of items of each metric."""
    return [
        (
            name,
            metric,
            number(value, 4),
            number(scores.get(f"{metric}_stderr"), 4),
            f"{scores['items']:,}",
        )
        for name, scores in tasks.items()
        for metric, value in task_metrics(scores)
    ]
