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
        "frugal-bonsai profile --quick",
        "frugal-bonsai profile --out mine.toml --report --dir /data",
    ),
)
@cloup.option_group(
    COMMON,
    click.option("--out", metavar="FILE", help="TOML file to write; replaced if it is a profile."),
    click.option("--report", is_flag=True, help="Print the table with --out too."),
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
def profile_command(report: bool, threads: int | None, as_json: bool, **given: Any) -> None:
    """Measure this machine: disk, memory, matrix products, copies; under a minute."""
    from frugal_bonsai.report.plan_tables import render_profile
    from frugal_bonsai.run.early import check_profile

    out = given["out"]
    check_profile(None if out is None else Path(out), Path(given["folder"]), given["device"])
    with watched(threads) as progress:
        from frugal_bonsai.run.profile import profile

        measured = profile(progress=progress, **given)
    if as_json or report or measured["out"] is None:
        print_result(measured, render_profile, as_json=as_json)
    if measured["out"] is not None:
        click.echo(f"saved: {measured['out']}", err=as_json)
