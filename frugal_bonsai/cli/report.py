"""``report`` and ``runs``."""

from __future__ import annotations

from pathlib import Path

import click
import cloup

from frugal_bonsai.cli import options
from frugal_bonsai.cli.command import COMMON, Command
from frugal_bonsai.cli.running import print_result


@cloup.command(
    name="report",
    cls=Command,
    short_help="Write one page on what prune or adapt did.",
    examples=(
        "frugal-bonsai report out/example-50 --out report.html",
        "frugal-bonsai report out/example-30 out/example-50 --out compare.html",
    ),
)
@cloup.argument(
    "outputs",
    metavar="OUTPUT...",
    nargs=-1,
    required=True,
    help="Folders that prune or adapt wrote, several to compare them; or a run directory, OUT.run.",
)
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
def report_command(outputs: tuple[str, ...], out: str | None, kind: str, overwrite: bool) -> None:
    """Write one page on OUTPUT, a folder that prune or adapt wrote: what was done, at what cost.

    With several OUTPUTs the page compares them: perplexity, sparsity, tokens, parameters.
    """
    from frugal_bonsai.run.report import report_page, write_page

    text = report_page(*outputs, kind=kind)
    if out is None and kind != "html":
        click.echo(text)
        return
    path = Path(out or "report.html")
    write_page(path, text, option="--out", overwrite=overwrite)
    click.echo(f"written: {path}")


@cloup.command(
    name="runs",
    cls=Command,
    short_help="List runs and how to resume them.",
    examples=("frugal-bonsai runs", "frugal-bonsai runs out --json"),
)
@cloup.argument("folder", required=False, default=".", help="Where to look.  [default: here]")
@cloup.option_group(COMMON, options.json_output, options.verbose)
def runs_command(folder: str, as_json: bool) -> None:
    """List the runs below FOLDER: finished, interrupted, running; and the line that resumes each.

    Looks four levels deep, for outputs and for run directories (OUT.run).
    """
    from frugal_bonsai.report.run_tables import render_runs
    from frugal_bonsai.run.runs import list_runs

    found = {"folder": folder, "runs": list_runs(folder)}
    print_result(found, render_runs, as_json=as_json)
