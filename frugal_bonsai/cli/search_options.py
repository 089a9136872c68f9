"""Options of ``prune`` and ``plan`` beside the common ones, in groups. Imports no torch."""

from __future__ import annotations

from typing import Any

import click
import cloup

from frugal_bonsai.bonsai.methods import METHODS
from frugal_bonsai.bonsai.settings import (
    ALLOCATIONS,
    DESIGNS,
    LEVELS,
    OBJECTIVES,
    PRIOR_NAMES,
    REFITS,
    PruneSettings,
)
from frugal_bonsai.cli import options
from frugal_bonsai.cli.options import FIRST_ITEMS, AutoCount, Decorator

_DEFAULTS = "The defaults are those of --method default; other methods have their own."


def _setting(names: str, *, help: str, **attributes: Any) -> Decorator:
    """Return an option for a setting of the method: its help ends with the setting's default."""
    setting = names.partition("/")[0].removeprefix("--").replace("-", "_")
    default = getattr(PruneSettings, setting)
    if isinstance(default, bool):
        attributes["default"], default = None, "on" if default else "off"
    if default is not None:
        help = f"{help}  [default: {default}]"
    return click.option(names, help=help, **attributes)


sparsity = click.option(
    "--sparsity",
    type=float,
    default=0.5,
    show_default=True,
    help="Share of the block weights to remove.",
)
calibration = click.option(
    "--calibration",
    metavar="SOURCE",
    help="Text file, .jsonl with text or messages, wikitext2, c4, hub id, stdlib or self.  "
    "[default: wikitext2; stdlib for example]",
)
windows = click.option(
    "--windows",
    type=int,
    help="Calibration windows, from all over the text.  [default: 65,536 tokens of them, at "
    "least 32]",
)
method = click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    metavar="NAME",
    default="default",
    show_default=True,
    help=f"Values of the settings, which the other options override: {', '.join(METHODS)}.  "
    "paper: the published algorithm; the others are for comparison.",
)
self_windows = _setting(
    "--self-windows",
    type=AutoCount(),
    help="Windows that the model writes for the last recovery, beside the calibration text; 0 "
    "for none.  [default: auto, twice the calibration windows where the caps allow it]",
)
eval_tasks = (
    click.option(
        "--eval-tasks",
        metavar="NAME,...",
        help="Score both models at the end on tasks of lm-evaluation-harness, as eval --tasks.",
    ),
    options.task_data,
    click.option("--eval-limit", type=click.IntRange(1), help=FIRST_ITEMS),
)
removal_group = cloup.option_group(
    "What is removed",
    _DEFAULTS,
    _setting(
        "--objective",
        type=click.Choice(OBJECTIVES),
        help="Divisor of a unit's loss: its parameters, 1, or its milliseconds on the machine of "
        "--profile.",
    ),
    _setting("--prompt-tokens", type=int, help="Prompt of --objective latency."),
    _setting("--generated-tokens", type=int, help="Answer of --objective latency."),
    _setting(
        "--allocation",
        type=click.Choice(ALLOCATIONS),
        help="Without masks: the cheapest units anywhere, the same share of every layer and kind, "
        "the same share of every FFN alone, whole layers, or whole experts.",
    ),
    _setting(
        "--prior",
        type=click.Choice(PRIOR_NAMES),
        metavar="NAME",
        help=f"Importance score of the units: {', '.join(PRIOR_NAMES)}.",
    ),
    _setting("--step", type=float, help="Share removed in one round.  [default: 0.25, then 0.1]"),
    click.option(
        "--tile",
        type=int,
        help="FFN widths are multiples of this.  [default: uniform layout: up to 64, on a GPU 128; "
        "else 1]",
    ),
    options.as_mistral,
)
mask_group = cloup.option_group(
    "Masks",
    _setting(
        "--level",
        type=click.Choice(LEVELS),
        help="group: masks decide how much each group loses, the prior which units; unit: masks "
        "decide on every unit; none: no masks.",
    ),
    _setting(
        "--design",
        type=click.Choice(DESIGNS),
        help="Masks of each window, or masks that all windows share (paper).",
    ),
    click.option("--regression", hidden=True),  # removed; refused with what to take
    _setting("--masks", type=int, help="Largest number of masks per round on every mask window."),
    _setting(
        "--certainty",
        type=float,
        help="Stop drawing masks at this certainty of the round's cut; 1 draws all.",
    ),
    _setting("--mask-windows", type=int, help="Windows that masks are evaluated on."),
    _setting(
        "--compensate/--no-compensate",
        help="Evaluate masks with removed units predicted from the others (imputation).",
    ),
    _setting(
        "--trial/--no-trial",
        help="Compare cuts with and without attention units, each recovered, before a cut is made.",
    ),
    _setting(
        "--arithmetic",
        type=click.Choice(["auto", "float", "int8"]),
        help="Arithmetic of masked evaluation: int8 multiplies the working copy as it is; auto "
        "takes the faster one.",
    ),
)
recovery_group = cloup.option_group(
    "Recovery",
    _setting("--recovery/--no-recovery", help="Refit projections after every round."),
    _setting(
        "--bias/--no-bias",
        help="Without masks and recovery: replace removed units by their mean output, as a bias.",
    ),
    _setting(
        "--refit",
        type=click.Choice(REFITS),
        help="Projections that are refitted: o_proj and down_proj, or q, k, v, gate and up too.",
    ),
    _setting(
        "--refine",
        type=int,
        help="Updates of the FFN's remaining channels in the last recovery; 0 for none.",
    ),
    _setting(
        "--rescale/--no-rescale",
        help="Scale the recovered model's logits, in its final norm, for the smallest loss.",
    ),
    _setting(
        "--ridge",
        type=float,
        help="Ridge penalty of recovery, as a share of the Gram matrix's mean diagonal.",
    ),
)
weights = _setting(
    "--weights", type=click.Choice(["int8", "native"]), help="Precision of the working copy."
)
seed = _setting("--seed", type=int, help="Seed of every random draw.")
