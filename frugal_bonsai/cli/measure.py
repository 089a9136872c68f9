"""``inspect``, ``eval`` and ``profile``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import cloup

from frugal_bonsai.cli import options
from frugal_bonsai.cli.command import COMMON, Command
from frugal_bonsai.cli.config import config_option
from frugal_bonsai.cli.running import print_result, watched

# Value of --report without a file, and name of this machine among profiles.
_TABLE, _HERE = "-", "here"


@cloup.command(
    name="inspect",
    cls=Command,
    short_help="Show a model's family, units and sizes.",
    examples=("frugal-bonsai inspect example", "frugal-bonsai inspect Qwen/Qwen3-0.6B --json"),
)
@cloup.argument("model", help="A folder, a file, a hub id, or example.")
@cloup.option_group(COMMON, options.assume, options.json_output, options.verbose)
def inspect_command(model: str, assume_family: str | None, as_json: bool) -> None:
    """Show MODEL's family, units and sizes from headers alone, or say what any path is."""
    from frugal_bonsai.report.tables import render_inspect
    from frugal_bonsai.run.inspect import inspect

    print_result(inspect(model, assume_family=assume_family), render_inspect, as_json=as_json)


@cloup.command(
    name="eval",
    cls=Command,
    short_help="Measure perplexity or task scores, streamed.",
    examples=(
        "frugal-bonsai eval out/example-50 --text stdlib --windows 16",
        "frugal-bonsai eval DIR --tasks arc_easy,piqa --limit 200 --max-gpu-mem 8GB",
    ),
)
@cloup.argument("model", help="A folder, a GGUF file, a hub id, or example; dense or pruned.")
@cloup.option_group(
    COMMON,
    click.option(
        "--text",
        metavar="SOURCE",
        help="Measure perplexity on this text: a file, .jsonl, hub id, stdlib.",
    ),
    click.option(
        "--tasks",
        metavar="NAME,...",
        help="Score tasks of lm-evaluation-harness, such as lambada_openai,arc_easy,piqa,hellaswag "
        "(pip install 'frugal-bonsai[eval]').",
    ),
    options.task_data,
    click.option("--limit", type=click.IntRange(1), help=options.FIRST_ITEMS),
    click.option(
        "--window",
        type=int,
        help="Tokens of a window; requests of tasks are truncated to it.  [default: 2048, for "
        "tasks the model's positions; never more than these]",
    ),
    click.option(
        "--windows",
        type=click.IntRange(1),
        help="Evaluate only the first windows.  [default: all]",
    ),
    click.option(
        "--stride",
        type=int,
        help="Tokens between the starts of two windows of the text, which overlap; each token "
        "counts once.  [default: --window]",
    ),
    options.max_gpu_mem,
    options.max_cpu_mem,
    click.option(
        "--runtime",
        type=click.Choice(["streamed", "llama.cpp"]),
        default="streamed",
        show_default=True,
        help="llama.cpp takes a GGUF file, or a folder with one in it.",
    ),
    config_option(),
    options.json_output,
)
@cloup.option_group(
    "Model and machine",
    click.option(
        "--weights",
        type=click.Choice(["native", "int8"]),
        default="native",
        show_default=True,
        help="Stream the checkpoint itself, or an int8 working copy.",
    ),
    options.assume,
    options.device,
    options.threads,
    options.quiet,
    options.verbose,
)
@click.pass_context
def eval_command(
    ctx: click.Context, /, model: str, text: str | None, as_json: bool, **given: Any
) -> None:
    """Measure MODEL's perplexity on a text or its scores on tasks, streamed under the caps."""
    from frugal_bonsai.report.eval_tables import render_eval
    from frugal_bonsai.run.early import check_eval
    from frugal_bonsai.run.options import EvalOptions

    threads = given.pop("threads")
    if given["runtime"] == "llama.cpp":
        options.drop_environment(ctx, given, "max_gpu_mem", "max_cpu_mem", "device")
    chosen = EvalOptions(text=text, **given)
    check_eval(model, chosen)
    with watched(threads) as progress:
        from frugal_bonsai.run.evaluate import evaluate

        result = evaluate(model, chosen, progress=progress)
    print_result(result, render_eval, as_json=as_json)


@cloup.command(
    name="profile",
    cls=Command,
    short_help="Measure this machine's rates.",
    examples=(
        "frugal-bonsai profile --out mine.toml --report machine.html --dir /data",
        "frugal-bonsai profile --profile rtx-12gb --profile rtx-24gb --report cards.html",
    ),
)
@cloup.option_group(
    COMMON,
    click.option("--out", metavar="FILE", help="TOML file to write; replaced if it is a profile."),
    click.option(
        "--report",
        metavar="[FILE]",
        is_flag=False,
        flag_value=_TABLE,
        help="Write a page (.html, .md, .json): rates, and which models fit at which cap in what "
        "time; without FILE, print the table with --out too.",
    ),
    click.option(
        "--profile",
        "names",
        metavar="NAME",
        multiple=True,
        help="With --report FILE: machines side by side, a file or a name such as rtx-12gb each; "
        "here measures this one too; repeatable.",
    ),
    click.option(
        "--overwrite", is_flag=True, help="Let --report replace a file that is no such page."
    ),
    click.option(
        "--dir",
        "folder",
        default=".",
        metavar="DIR",
        help="On the disk to measure.  [default: here]",
    ),
    options.device,
    options.threads,
    click.option("--quick", is_flag=True, help="Rougher, in a few seconds; for a first look."),
    options.json_output,
    options.quiet,
    options.verbose,
)
def profile_command(
    report: str | None,
    names: tuple[str, ...],
    overwrite: bool,
    threads: int | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Measure this machine: disk, memory, matrix products, copies; under a minute.

    The page of --report FILE plans models from 1B to 70B on it, and on machines of --profile.
    """
    page = None if report in (None, _TABLE) else Path(str(report))
    if names and page is None:
        raise click.UsageError("--profile is for --report FILE; plan --profile plans one model.")
    others = [name for name in names if name != _HERE]
    measures = not names or _HERE in names
    from frugal_bonsai.run.early import check_page, check_profile

    if page is not None:
        check_page(page, others, overwrite=overwrite)
    out, measured = given["out"], None
    if measures:
        check_profile(None if out is None else Path(out), Path(given["folder"]), given["device"])
    with watched(threads) as progress:
        if measures:
            from frugal_bonsai.run.profile import profile

            measured = profile(progress=progress, **given)
        if page is not None:
            _write_machines(page, others, measured, overwrite, progress)
    _print_profile(measured, page, as_json=as_json, table=report == _TABLE)


def _write_machines(
    page: Path, names: list[str], measured: dict[str, Any] | None, overwrite: bool, progress: Any
) -> None:
    """Write the page on what machines can prune."""
    from frugal_bonsai.hardware.profile import HardwareProfile
    from frugal_bonsai.run.profile_report import profile_report
    from frugal_bonsai.run.report import page_kind, write_page

    here = None
    if measured is not None:
        here = HardwareProfile(**{name: v for name, v in measured.items() if name != "out"})
    text = profile_report(names, measured=here, kind=page_kind(page), progress=progress)
    write_page(page, text, overwrite=overwrite)


def _print_profile(
    measured: dict[str, Any] | None, page: Path | None, *, as_json: bool, table: bool
) -> None:
    """Print the rates that were measured, and the files that were written."""
    from frugal_bonsai.report.plan_tables import render_profile

    out = None if measured is None else measured["out"]
    if measured is not None and (as_json or table or out is None):
        print_result(measured, render_profile, as_json=as_json)
    if out is not None:
        click.echo(f"saved: {out}", err=as_json)
    if page is not None:
        click.echo(f"written: {page}", err=as_json)
