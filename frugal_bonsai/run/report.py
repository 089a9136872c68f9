"""``report``: one page on what ``prune`` wrote.

In: the output's folder. Out: the page as text. Reads ``pruning_report.json``, no weights.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frugal_bonsai.checkpoint.commit import output_errors, write_bytes
from frugal_bonsai.errors import CheckpointError
from frugal_bonsai.plain_json import json_text
from frugal_bonsai.report.figures import draw_figures
from frugal_bonsai.report.page import page_context, render_html, render_markdown
from frugal_bonsai.run.provenance import REPORT_FILE, read_report

_NEEDED = {"model", "before", "after", "kept", "dense", "rounds", "memory", "settings"}


def report_page(folder: str | Path, *, kind: str = "html") -> str:
    """Return the page of a pruned model.

    Args:
        folder: The folder that ``prune`` wrote.
        kind: ``html``, ``md`` or ``json``. ``html`` needs matplotlib.

    Raises:
        CheckpointError: the folder is missing, or has no complete report.
        OptionError: matplotlib is not installed.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the folder that prune wrote")
    summary = read_report(folder / REPORT_FILE)
    if missing := _NEEDED - summary.keys():
        raise CheckpointError(
            f"{folder / REPORT_FILE}: missing, damaged or without {', '.join(sorted(missing))}; "
            f"give the --out folder of a finished prune (finish a run with prune --resume)"
        )
    context = page_context(summary, _commands(folder.resolve().name, summary))
    if kind == "html":
        return render_html(context, draw_figures(context["charts"]))
    return json_text(context, indent=2) if kind == "json" else render_markdown(context)


def write_page(path: Path, text: str) -> None:
    """Write a page as a file. Raise OutputError if it cannot be written."""
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.encode())


def _commands(name: str, summary: Mapping[str, Any]) -> list[str]:
    """Return the lines that use the output, quoted for a shell."""
    quoted = shlex.quote(name)
    load = str(summary.get("load", "")).partition("(")[0]
    return [
        *([f"# Python: {load}({name!r})"] if load else []),
        f"frugal-bonsai eval {quoted} --text FILE",
        f"frugal-bonsai adapt {quoted} --teacher MODEL --data SOURCE --out DIR",
        f"frugal-bonsai export {quoted} --format gguf --out FILE",
    ]
