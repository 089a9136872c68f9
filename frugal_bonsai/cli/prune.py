"""``prune`` and ``plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import cloup

from frugal_bonsai.cli import options, search_options
from frugal_bonsai.cli.command import COMMON, Command
from frugal_bonsai.cli.config import config_option
from frugal_bonsai.cli.running import is_worker, print_result, set_threads, watched
from frugal_bonsai.ranks.launch import launched
from frugal_bonsai.run.keywords import prune_options

_MODEL = 'A folder, a GGUF file, a hub id, or "example", a small model that is part of the package.'
# Options of prune that plan lacks: plan takes the same file, and ignores them.
_PRUNE_ONLY = (
    "out",
    "resume",
    "overwrite",
    "dry-run",
    "eval-tasks",
    "task-data",
    "eval-limit",
    "max-shard-size",
    "no-report",
)


@cloup.command(
    name="prune",
    cls=Command,
    ranks=True,
    short_help="Prune a model into a smaller checkpoint.",
    examples=(
        "frugal-bonsai prune example --sparsity 0.5 --out out/example-50",
        "frugal-bonsai prune meta-llama/Llama-3.2-1B --sparsity 0.3 --layout per-layer \\",
        "    --calibration my-text.txt --max-gpu-mem 8GB --out out/llama-70",
    ),
)
@cloup.argument("model", help=_MODEL)
@cloup.option_group(
    COMMON,
    click.option(
        "--out", required=True, metavar="DIR", help="Output folder; appears when complete."
    ),
    search_options.sparsity,
    options.layout,
    search_options.calibration,
    search_options.windows,
    options.eval_text,
    search_options.method,
    options.max_gpu_mem,
    options.max_cpu_mem,
    options.resume,
    options.overwrite,
    options.dry_run,
    config_option(),
    options.json_output,
)
@cloup.option_group(
    "Text and tasks", options.window, search_options.self_windows, *search_options.eval_tasks
)
@search_options.removal_group
@search_options.mask_group
@search_options.recovery_group
@cloup.option_group(
    "Model, machine and output",
    options.text_only,
    options.assume,
    options.device,
    options.threads,
    options.profile,
    search_options.weights,
    search_options.seed,
    options.max_shard_size,
    options.no_report,
    options.quiet,
    options.verbose,
)
def prune_command(model: str, out: str, dry_run: bool, as_json: bool, **given: Any) -> None:
    """Prune MODEL into DIR: evaluate masked sub-models, remove units, refit what is left.

    The dense model streams from disk, layer by layer, under the memory caps.
    """
    from frugal_bonsai.report.tables import render_prune
    from frugal_bonsai.run.early import check_prune

    threads = given.pop("threads")
    writing = {name: given.pop(name) for name in ("resume", "overwrite")}
    chosen, worker = prune_options(given), is_worker()
    if worker and dry_run:
        return
    if launched() is None:  # else it is checked once the ranks have met, so that all hear of it
        check_prune(model, Path(out), chosen, **writing)
    if dry_run:
        set_threads(threads)
        from frugal_bonsai.report.dry_run_tables import render_dry_prune
        from frugal_bonsai.run.dry_run import dry_prune

        print_result(dry_prune(model, out, chosen, **writing), render_dry_prune, as_json=as_json)
        return
    with watched(threads, quiet=worker) as progress:
        from frugal_bonsai.run.prune import prune

        summary = prune(model, out, chosen, **writing, progress=progress)
    if not worker:
        print_result(summary, render_prune, as_json=as_json)


@cloup.command(
    name="plan",
    cls=Command,
    ranks=True,
    short_help="Predict memory and time of a prune.",
    examples=(
        "frugal-bonsai plan example --sparsity 0.5 --max-cpu-mem 2GB",
        "frugal-bonsai plan meta-llama/Llama-3.2-1B --max-gpu-mem 8GB --profile mine.toml",
    ),
)
@cloup.argument("model", help=_MODEL)
@cloup.option_group(
    COMMON,
    search_options.sparsity,
    options.layout,
    search_options.calibration,
    search_options.windows,
    options.window,
    search_options.method,
    options.max_gpu_mem,
    options.max_cpu_mem,
    options.profile,
    config_option(ignored=_PRUNE_ONLY),
    options.json_output,
)
@cloup.option_group("Text", options.eval_text, search_options.self_windows)
@search_options.removal_group
@search_options.mask_group
@search_options.recovery_group
@cloup.option_group(
    "Model and machine",
    options.text_only,
    options.assume,
    options.device,
    options.threads,
    search_options.weights,
    search_options.seed,
    options.quiet,
    options.verbose,
)
def plan_command(model: str, as_json: bool, **given: Any) -> None:
    """Predict the memory and the time of pruning MODEL; run nothing.

    Reads config and tensor headers only, so a hub model is not downloaded. A config.json alone is
    enough: MODEL is that file, or a folder without weights.
    """
    from frugal_bonsai.report.plan_tables import render_plan
    from frugal_bonsai.run.early import check_prune

    if is_worker():
        return
    threads, chosen = given.pop("threads"), prune_options(given)
    check_prune(model, None, chosen)
    set_threads(threads)
    from frugal_bonsai.run.plan import plan

    print_result(plan(model, chosen), render_plan, as_json=as_json)
