"""What the commands that only rewrite print: plain values in, a rich console out.

In: the summary that ``--json`` prints. Out: tables and a few lines of text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from frugal_bonsai.report.sheet import Sheet
from frugal_bonsai.report.words import KIND_NAMES, all_printable, duration, size_rows, span

if TYPE_CHECKING:
    from rich.console import Console

Values = Mapping[str, Any]


def render_shrink(summary: Values, console: Console) -> None:
    """Before and after, kept units, where it was saved and how to load it.

    Args:
        summary: what :func:`frugal_bonsai.shrink` returns.
        console: where to.
    """
    summary, sheet = all_printable(summary, console.encoding), Sheet(console)
    sheet.heading(f"{summary['model']}: {summary['sparsity']:.1%} of the block weights removed")
    rows = size_rows(summary["before"], summary["after"], "on disk")
    sheet.table(("", "before", "after", "ratio"), rows)
    sheet.heading("units a layer")
    sheet.table(
        ("kind", "dense", "kept"),
        [
            (KIND_NAMES.get(kind, kind), span(summary["dense"][kind]), span(counts))
            for kind, counts in summary["kept"].items()
        ],
    )
    for note in summary["notes"]:
        sheet.say(f"note: {note}")
    sheet.say(f"time: {duration(summary['seconds'])}")
    sheet.blank()
    sheet.verbatim(f"saved: {summary['out']} ({summary['layout']} layout)")
    sheet.verbatim(f"load:  {summary['load']}")
