"""The output of ``runs``: a table, then the lines that resume.

In: the values that ``--json`` prints. Out: text on a rich console.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from frugal_bonsai.report.sheet import Sheet
from frugal_bonsai.report.words import all_printable

if TYPE_CHECKING:
    from rich.console import Console


def render_runs(values: Mapping[str, Any], console: Console) -> None:
    """Print the runs of a folder.

    Args:
        values: ``folder`` and ``runs``, the result of :func:`frugal_bonsai.list_runs`.
        console: Console that is printed on.
    """
    values, sheet = all_printable(values, console.encoding), Sheet(console)
    runs = values["runs"]
    if not runs:
        sheet.say(f"no runs in {values['folder']}; prune and adapt write theirs beside --out")
        return
    keys = ("out", "state", "command", "model", "progress")
    sheet.table(keys, [tuple(str(run[key]) for key in keys) for run in runs], left=len(keys))
    waiting = [run["resume"] for run in runs if run["resume"]]
    if waiting:
        sheet.blank()
        sheet.say("resume with:" if len(waiting) == 1 else "resume with one of these:")
        for line in waiting:
            sheet.verbatim(line)
