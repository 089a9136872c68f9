"""The output of ``--dry-run``: the plan, then what would be written.

In: the values that ``--json`` prints. Out: text and tables on a rich console.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from frugal_bonsai.report.plan_tables import render_plan
from frugal_bonsai.report.sheet import Sheet
from frugal_bonsai.report.words import KIND_NAMES, all_printable, span
from frugal_bonsai.sizes import format_bytes

if TYPE_CHECKING:
    from rich.console import Console

Values = Mapping[str, Any]


def render_dry_prune(values: Values, console: Console) -> None:
    """Print the plan of a prune, and the folders that it would write.

    Args:
        values: Result of :func:`frugal_bonsai.run.dry_run.dry_prune`.
        console: Console that is printed on.
    """
    render_plan(values, console)
    _writes(values, Sheet(console))


def render_dry_shrink(values: Values, console: Console) -> None:
    """Print the units that a shrink would keep, and the folder that it would write.

    Args:
        values: Result of :func:`frugal_bonsai.run.dry_run.dry_shrink`.
        console: Console that is printed on.
    """
    values, sheet = all_printable(values, console.encoding), Sheet(console)
    sheet.heading(
        f"{values['model']} ({values['family']}): {values['sparsity']:.1%} of the block weights "
        f"removed, {values['layout']} layout"
    )
    sheet.table(
        ("kind", "dense", "kept"),
        [
            (KIND_NAMES.get(kind, kind), span(values["dense"][kind]), span(counts))
            for kind, counts in values["kept"].items()
        ],
    )
    _notes(values, sheet)
    _writes(values, sheet)


def render_dry_export(values: Values, console: Console) -> None:
    """Print architecture and tokenizer of the file that an export would write.

    Args:
        values: Result of :func:`frugal_bonsai.run.dry_run.dry_export`.
        console: Console that is printed on.
    """
    values, sheet = all_printable(values, console.encoding), Sheet(console)
    sheet.heading(f"{values['model']} ({values['family']}): gguf")
    sheet.say(f"architecture: {values['architecture']}, tokenizer: {values['tokenizer']}")
    _notes(values, sheet)
    _writes(values, sheet)


def _notes(values: Values, sheet: Sheet) -> None:
    for note in values["notes"]:
        sheet.say(f"note: {note}")


def _writes(values: Values, sheet: Sheet) -> None:
    """Print what would be written."""
    sheet.blank()
    for found in values["writes"]:
        size = format_bytes(found["size_bytes"])
        sheet.say(f"would write: {found['path']}, at most about {size} ({found['contents']})")
    sheet.say("dry run: nothing was written")
