"""``report``."""

from __future__ import annotations

from pathlib import Path

import click
import cloup

from frugal_bonsai.cli import options
from frugal_bonsai.cli.command import COMMON, Command


@cloup.command(
    name="report",
    cls=Command,
    short_help="Write one page on what prune or adapt did.",
    examples=(
        "frugal-bonsai report out/example-50 --out report.html",
        "frugal-bonsai report out/example-50 --format md",
    ),
)
@cloup.argument("output", help="A folder that prune or adapt wrote.")
@cloup.option_group(
    COMMON,
    click.option(
        "--out", metavar="FILE", help="File to write.  [default: report.html; md, json: printed]"
    ),
    click.option(
        "--format",
        "kind",
        type=click.Choice(["html", "md", "json"]),
        default="html",
        show_default=True,
        help="html needs matplotlib (pip install 'frugal-bonsai[plots]').",
    ),
    click.option(
        "--overwrite",
        is_flag=True,
        help="Replace a file that is no page of this command; such pages are always replaced.",
    ),
    options.verbose,
)
def report_command(output: str, out: str | None, kind: str, overwrite: bool) -> None:
    """Write one page on OUTPUT, a folder that prune or adapt wrote: what was done, at what cost."""
    from frugal_bonsai.run.report import report_page, write_page

    text = report_page(output, kind=kind)
    if out is None and kind != "html":
        click.echo(text)
        return
    path = Path(out or "report.html")
    write_page(path, text, overwrite=overwrite)
    click.echo(f"written: {path}")
