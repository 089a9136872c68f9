"""``inspect``, ``eval`` and ``profile``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from frugal_bonsai.cli import options
from frugal_bonsai.cli.running import print_result, watched


@click.command(name="inspect")
@click.argument("model")
@options.assume
@options.json_output
def inspect_command(model: str, assume_family: str | None, as_json: bool) -> None:
    """Show MODEL's family, units and sizes from headers alone, or say what any PATH is."""
    from frugal_bonsai.report.tables import render_inspect
    from frugal_bonsai.run.inspect import inspect

    print_result(inspect(model, assume_family=assume_family), render_inspect, as_json=as_json)


@click.command(name="eval")
@click.argument("model")
@click.option(
    "--text",
    metavar="SOURCE",
    help="Measure perplexity on this text: a file, .jsonl, hub id, stdlib.",
)
@options.tasks
@click.option(
    "--window",
    type=int,
    help="Tokens of a window; requests of tasks are truncated to it.  [default: 2048, for tasks "
    "the model's positions; never more than these]",
)
@click.option(
    "--stride",
    type=int,
    help="Tokens between the starts of two windows of the text, which overlap; each token counts "
    "once.  [default: --window]",
)
@click.option("--windows", type=click.IntRange(1), help="Evaluate only the first windows.")
@click.option(
    "--weights", type=click.Choice(["native", "int8"]), default="native", show_default=True
)
@click.option(
    "--runtime",
    type=click.Choice(["streamed", "llama.cpp"]),
    default="streamed",
    show_default=True,
    help="llama.cpp takes a GGUF file, or a folder with one in it.",
)
@options.assume
@options.caps
@options.json_output
def eval_command(model: str, text: str | None, as_json: bool, **given: Any) -> None:
    """Measure MODEL's perplexity on a text or its scores on tasks, streamed under the caps."""
    from frugal_bonsai.report.eval_tables import render_eval
    from frugal_bonsai.run.early import check_eval
    from frugal_bonsai.run.options import EvalOptions

    threads = given.pop("threads")
    options = EvalOptions(text=text, **given)
    check_eval(model, options)
    with watched(threads) as progress:
        from frugal_bonsai.run.evaluate import evaluate

        result = evaluate(model, options, progress=progress)
    print_result(result, render_eval, as_json=as_json)


@click.command(name="profile")
@click.option("--out", metavar="FILE", help="TOML file to write; replaced if it is a profile.")
@click.option("--report", is_flag=True, help="Print the table with --out too.")
@click.option(
    "--dir",
    "folder",
    default=".",
    metavar="DIR",
    help="On the disk to measure.  [default: here]",
)
@options.device
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: all cores]")
@click.option("--quick", is_flag=True, help="Rougher, in a few seconds; for a first look.")
@options.json_output
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
