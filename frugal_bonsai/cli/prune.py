"""``prune`` and ``plan``."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from frugal_bonsai.cli import options
from frugal_bonsai.cli.running import print_result, set_threads, watched
from frugal_bonsai.run.options import PruneOptions


@click.command(name="prune")
@click.argument("model")
@click.option("--out", required=True, metavar="DIR", help="Output folder; appears when complete.")
@options.search
@options.eval_tasks
@options.text_only
@options.assume
@options.caps
@options.profile
@options.max_shard_size
@click.option("--resume", is_flag=True, help="Continue the run that DIR.run holds.")
@options.json_output
def prune_command(model: str, out: str, resume: bool, as_json: bool, **given: Any) -> None:
    """Prune MODEL (a folder, a GGUF file, a hub id, or "example") into DIR."""
    from frugal_bonsai.report.tables import render_prune
    from frugal_bonsai.run.early import check_prune

    threads, chosen = given.pop("threads"), _prune_options(given)
    check_prune(model, Path(out), chosen, resume=resume)
    with watched(threads) as progress:
        from frugal_bonsai.run.prune import prune

        summary = prune(model, out, chosen, resume=resume, progress=progress)
    print_result(summary, render_prune, as_json=as_json)


@click.command(name="plan")
@click.argument("model")
@options.search
@options.text_only
@options.assume
@options.caps
@options.profile
@options.json_output
def plan_command(model: str, as_json: bool, **given: Any) -> None:
    """Predict the memory and the time of pruning MODEL; run nothing."""
    from frugal_bonsai.report.plan_tables import render_plan
    from frugal_bonsai.run.early import check_prune

    threads, chosen = given.pop("threads"), _prune_options(given)
    check_prune(model, None, chosen, resume=False)
    set_threads(threads)
    from frugal_bonsai.run.plan import plan

    print_result(plan(model, chosen), render_plan, as_json=as_json)


def _prune_options(given: dict[str, Any]) -> PruneOptions:
    """Return the options of the command; those that are settings of the method go together."""
    own = {field.name for field in fields(PruneOptions)}
    settings = {name: value for name, value in given.items() if name not in own}
    return PruneOptions(settings=settings, **{name: given[name] for name in given.keys() & own})
