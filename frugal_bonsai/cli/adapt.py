"""``adapt``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import cloup

from frugal_bonsai.cli import options
from frugal_bonsai.cli.command import COMMON, Command
from frugal_bonsai.cli.config import config_option
from frugal_bonsai.cli.running import print_result, set_threads, watched
from frugal_bonsai.run.keywords import adapt_options

_training_group = cloup.option_group(
    "Training",
    click.option(
        "--method",
        type=click.Choice(["lora", "full"]),
        help="lora trains adapters, full the block projections.  [default: lora]",
    ),
    click.option(
        "--rank", metavar="N|auto", help="Rank of the adapters.  [default: auto, as caps allow]"
    ),
    click.option(
        "--alpha", type=float, help="Adapters are scaled by alpha/rank.  [default: 2 x rank]"
    ),
    click.option(
        "--optimizer",
        type=click.Choice(["auto", "adamw", "adamw8bit"]),
        help="auto: adamw8bit (bitsandbytes) where adamw's fp32 moments do not fit.  "
        "[default: auto]",
    ),
    click.option(
        "--learning-rate",
        type=float,
        help="Peak learning rate.  [default: 0.384 / hidden size; full: 0.096 / it]",
    ),
    click.option("--batch", type=int, help="Windows of a step.  [default: 8]"),
    click.option(
        "--evaluations", type=int, help="Held-out evaluations during training.  [default: 10]"
    ),
    click.option(
        "--weights",
        type=click.Choice(["int8", "native", "streamed"]),
        help="Form of the frozen weights; streamed: read again in each step.  [default: native if "
        "it fits, else int8, else streamed]",
    ),
    click.option("--seed", type=int, help="Seed of adapters and order.  [default: 0]"),
)
_loss_group = cloup.option_group(
    "Loss",
    click.option(
        "--loss",
        type=click.Choice(["lm", "kl", "kl+hidden"]),
        help="lm: the text; kl: and the teacher's next tokens; kl+hidden: and its hidden states.  "
        "[default: kl]",
    ),
    click.option("--lm-weight", type=float, help="Weight of the text's loss.  [default: 1]"),
    click.option(
        "--kl-weight",
        type=float,
        help="Weight of the divergence from the teacher's next tokens.  [default: 1]",
    ),
    click.option(
        "--hidden-weight",
        type=float,
        help="Weight of the hidden states' relative error.  [default: 1]",
    ),
    click.option(
        "--hidden-layers",
        metavar="N,N",
        help="Layers whose hidden states are compared.  [default: every fourth and the last]",
    ),
    click.option(
        "--top",
        type=int,
        help="Next tokens of the teacher that are kept.  [default: 64, at most the vocabulary]",
    ),
    click.option(
        "--temperature",
        type=float,
        default=1.0,
        show_default=True,
        help="Divisor of the teacher's logits; above 1 unlikely tokens count more.",
    ),
    click.option(
        "--teacher-cache",
        metavar="DIR",
        help="Keep the teacher's answers here for other runs.  [default: deleted at the end]",
    ),
)


@cloup.command(
    name="adapt",
    cls=Command,
    short_help="Train a pruned model to imitate its dense model.",
    examples=(
        "frugal-bonsai adapt out/example-50 --teacher example --data stdlib --minutes 5 \\",
        "    --out out/example-adapted",
        "frugal-bonsai adapt PRUNED --teacher DENSE --data chats.jsonl --data self --tokens 10M \\",
        "    --max-gpu-mem 24GB --out DIR",
    ),
)
@cloup.argument("pruned", help="A folder that prune wrote, or any other model.")
@cloup.option_group(
    COMMON,
    click.option(
        "--teacher",
        metavar="DENSE",
        help="Dense model that PRUNED was made from; not for --loss lm.",
    ),
    click.option(
        "--data",
        required=True,
        multiple=True,
        metavar="SOURCE",
        help="Text file, .jsonl with text or messages, wikitext2, c4, hub id, stdlib or self "
        "(sampled from DENSE); may be given several times.",
    ),
    click.option("--out", metavar="DIR", help="Output folder; appears when complete."),
    click.option(
        "--tokens", metavar="N", help="Tokens to train on, such as 10M.  [default: four passes]"
    ),
    click.option("--minutes", type=float, help="Minutes to train for, instead of --tokens."),
    options.window,
    click.option(
        "--windows", type=int, help="Windows of each source.  [default: all; self: 65,536 tokens]"
    ),
    options.eval_text,
    options.max_gpu_mem,
    options.max_cpu_mem,
    options.resume,
    options.overwrite,
    click.option(
        "--dry-run",
        "--plan-only",
        "dry_run",
        is_flag=True,
        help="Predict the memory, item by item, and write nothing; needs no --out.",
    ),
    config_option(),
    options.json_output,
)
@_training_group
@_loss_group
@cloup.option_group(
    "Model, machine and output",
    options.text_only,
    options.device,
    options.threads,
    options.max_shard_size,
    options.no_report,
    options.quiet,
    options.verbose,
)
def adapt_command(pruned: str, out: str | None, dry_run: bool, as_json: bool, **given: Any) -> None:
    """Train PRUNED to imitate DENSE under the same caps, into DIR.

    The dense model is streamed once, and its most likely next tokens are kept on disk. Then
    adapters are trained beside the pruned weights and merged into them.
    """
    if dry_run:
        _plan(pruned, out, given, as_json=as_json)
        return
    if out is None:
        raise click.UsageError("Missing option '--out' (only --dry-run does without).")
    from frugal_bonsai.report.adapt_tables import render_adapt
    from frugal_bonsai.run.early import check_adapt

    threads = given.pop("threads")
    writing = {name: given.pop(name) for name in ("resume", "overwrite")}
    chosen = adapt_options(given)
    check_adapt(pruned, Path(out), chosen, **writing)
    with watched(threads) as progress:
        from frugal_bonsai.run.adapt import adapt

        summary = adapt(pruned, out, chosen, **writing, progress=progress)
    print_result(summary, render_adapt, as_json=as_json)


def _plan(pruned: str, out: str | None, given: dict[str, Any], *, as_json: bool) -> None:
    from frugal_bonsai.report.adapt_plan_tables import render_adapt_plan
    from frugal_bonsai.run.early import check_adapt

    threads = given.pop("threads")
    writing = {name: given.pop(name) for name in ("resume", "overwrite")}
    chosen = adapt_options(given)
    check_adapt(pruned, None if out is None else Path(out), chosen, **writing)
    set_threads(threads)
    from frugal_bonsai.run.adapt_plan import plan_adapt

    run = Path(f"{out or 'adapted'}.run")
    print_result(plan_adapt(pruned, chosen, run), render_adapt_plan, as_json=as_json)
