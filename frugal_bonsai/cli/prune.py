"""``prune`` and ``plan``."""

from __future__ import annotations

from typing import Any

import click

from frugal_bonsai.cli import options
from frugal_bonsai.cli.running import print_result, set_threads, watched


@click.command(name="prune")
@click.argument("model")
@click.option("--out", required=True, metavar="DIR", help="Appears when it is complete.")
@options.search
@options.assume
@options.caps
@options.profile
@options.max_shard_size
@click.option("--resume", is_flag=True, help="Continue the run that DIR.run holds.")
@options.json_output
def prune_command(model: str, out: str, resume: bool, as_json: bool, **given: Any) -> None:
    """Prune MODEL (a folder, a hub id, or "example") into DIR."""
    from frugal_bonsai.report.tables import render_prune

    with watched(given.pop("threads")) as progress:
        from frugal_bonsai.run.prune import prune

        summary = prune(model, out, _prune_options(given), resume=resume, progress=progress)
    print_result(summary, render_prune, as_json=as_json)


@click.command(name="plan")
@click.argument("model")
@options.search
@options.assume
@options.caps
@options.profile
@options.json_output
def plan_command(model: str, as_json: bool, **given: Any) -> None:
    """Show what pruning MODEL would hold in memory and how long it would take; runs nothing."""
    from frugal_bonsai.report.plan_tables import render_plan

    set_threads(given.pop("threads"))
    from frugal_bonsai.run.plan import plan

    print_result(plan(model, _prune_options(given)), render_plan, as_json=as_json)


def _prune_options(given: dict[str, Any]) -> Any:
    """The flat options of the command as :class:`PruneOptions`."""
    from frugal_bonsai.run.options import PruneOptions

    settings = (
        "sparsity",
        "step",
        "level",
        "objective",
        "prompt_tokens",
        "generated_tokens",
        "allocation",
        "prior",
        "design",
        "regression",
        "masks",
        "certainty",
        "mask_windows",
        "recovery",
        "bias",
        "refit",
        "refine",
        "compensate",
        "trial",
        "rescale",
        "ridge",
        "weights",
        "arithmetic",
        "seed",
    )
    return PruneOptions(settings={name: given.pop(name) for name in settings}, **given)
