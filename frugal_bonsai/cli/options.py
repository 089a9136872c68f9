"""Options that several commands share, as decorators. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from frugal_bonsai.bonsai.methods import METHODS
from frugal_bonsai.bonsai.settings import (
    ALLOCATIONS,
    DESIGNS,
    LEVELS,
    OBJECTIVES,
    PRIOR_NAMES,
    REFITS,
)
from frugal_bonsai.model.layout import LAYOUTS, UNIFORM
from frugal_bonsai.sizes import parse_bytes


def several(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return several click options as one decorator, the first on top."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


class Size(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """A size such as ``24GB`` or ``7.5GiB``, in bytes."""

    name = "size"

    def convert(
        self, value: str | int, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Read the size; the error names the option."""
        return parse_bytes(value, option="size" if param is None else param.opts[0])


class AutoCount(click.ParamType):  # type: ignore[type-arg]  # as above
    """A number, or ``auto``: None, which leaves the choice to the program."""

    name = "N|auto"

    def convert(
        self, value: str | int, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        """Read the number; the error names the option."""
        if value == "auto":
            return None
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor auto", param, ctx)


max_shard_size = click.option("--max-shard-size", type=Size(), default="5GB", show_default=True)
device = click.option(
    "--device", metavar="DEVICE", help="cpu, cuda, cuda:1, xpu, mps.  [default: GPU if any]"
)
caps = several(
    click.option("--max-gpu-mem", type=Size(), help="Hard cap on GPU memory, such as 24GB."),
    click.option("--max-cpu-mem", type=Size(), help="Hard cap on this process's memory."),
    device,
    click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: all cores]"),
)
profile = click.option(
    "--profile",
    metavar="FILE",
    help="Hardware profile: plan for that machine; prune predicts its time.",
)
assume = click.option(
    "--assume-family",
    metavar="FAMILY",
    help="Treat an architecture that is not supported as FAMILY, such as llama.",
)
text_only = click.option(
    "--text-only",
    is_flag=True,
    help="Of a vision-language model, write the text model alone; else its other parts are "
    "carried along unchanged.",
)
_task_data = click.option(
    "--task-data",
    multiple=True,
    metavar="DIR|TASK=FILE",
    help="Local items of tasks, JSON lines: a folder with TASK.jsonl or TASK_*.jsonl, or the file "
    "of one task; repeatable.  [default: from the hub]",
)
_FIRST_ITEMS = "Score the first items of each task only."
tasks = several(
    click.option(
        "--tasks",
        metavar="NAME,...",
        help="Score tasks of lm-evaluation-harness, such as lambada_openai,arc_easy,piqa,hellaswag "
        "(pip install 'frugal-bonsai[eval]').",
    ),
    _task_data,
    click.option("--limit", type=click.IntRange(1), help=_FIRST_ITEMS),
)
eval_tasks = several(
    click.option(
        "--eval-tasks",
        metavar="NAME,...",
        help="Score both models at the end on tasks of lm-evaluation-harness, as eval --tasks.",
    ),
    _task_data,
    click.option("--eval-limit", type=click.IntRange(1), help=_FIRST_ITEMS),
)
json_output = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
layout = several(
    click.option(
        "--layout",
        type=click.Choice(LAYOUTS),
        default=UNIFORM,
        show_default=True,
        help="uniform loads everywhere; per-layer prunes better; padded is per-layer, filled with "
        "zeros so that it loads everywhere.",
    ),
    click.option(
        "--as-mistral",
        is_flag=True,
        help="Allow a Llama any number of heads: it is written as an equal Mistral.",
    ),
)
search = several(
    click.option(
        "--sparsity",
        type=float,
        default=0.5,
        show_default=True,
        help="Share of the block weights to remove.",
    ),
    layout,
    click.option("--tile", type=int, help="FFN widths are multiples of this."),
    click.option(
        "--calibration",
        metavar="SOURCE",
        help="Text file, .jsonl with a text key, wikitext2, c4, hub id, stdlib or self.  "
        "[default: wikitext2; stdlib for example]",
    ),
    click.option("--eval-text", metavar="SOURCE", help="Report perplexity on this text too."),
    click.option(
        "--window",
        type=int,
        help="Tokens of a window.  [default: 2048, at most the model's positions]",
    ),
    click.option(
        "--windows",
        type=int,
        help="Calibration windows, from all over the text.  [default: 65,536 tokens of them, at "
        "least 32]",
    ),
    click.option(
        "--method",
        type=click.Choice(list(METHODS)),
        default="default",
        show_default=True,
        help="Values of the options below, which override it.  paper: the published algorithm; "
        "the others are for comparison.",
    ),
    click.option(
        "--level",
        type=click.Choice(LEVELS),
        help="group: masks decide how much each group loses, the prior which units; unit: masks "
        "decide on every unit; none: no masks.",
    ),
    click.option(
        "--objective",
        type=click.Choice(OBJECTIVES),
        help="Divisor of a unit's loss: its parameters, 1, or its milliseconds on the machine of "
        "--profile.",
    ),
    click.option(
        "--prompt-tokens", type=int, help="Prompt of --objective latency.  [default: 512]"
    ),
    click.option(
        "--generated-tokens", type=int, help="Answer of --objective latency.  [default: 128]"
    ),
    click.option(
        "--allocation",
        type=click.Choice(ALLOCATIONS),
        help="Without masks: the cheapest units anywhere, the same share of every layer and kind, "
        "the same share of every FFN alone, whole layers, or whole experts.",
    ),
    click.option("--prior", type=click.Choice(PRIOR_NAMES), help="Importance score of the units."),
    click.option(
        "--design",
        type=click.Choice(DESIGNS),
        help="Masks of each window, or masks that all windows share (paper).",
    ),
    click.option("--regression", hidden=True),  # removed; refused with what to take
    click.option(
        "--masks", type=int, help="Largest number of masks per round on every mask window."
    ),
    click.option(
        "--certainty",
        type=float,
        help="Stop drawing masks at this certainty of the round's cut; 1 draws all.",
    ),
    click.option("--mask-windows", type=int, help="Windows that masks are evaluated on."),
    click.option("--step", type=float, help="Share removed in one round; 0.25, then 0.1."),
    click.option(
        "--recovery/--no-recovery",
        default=None,
        help="Refit projections after every round.",
    ),
    click.option(
        "--bias/--no-bias",
        default=None,
        help="Without masks and recovery: replace removed units by their mean output, as a bias.",
    ),
    click.option(
        "--refit",
        type=click.Choice(REFITS),
        help="Projections that are refitted: o_proj and down_proj, or q, k, v, gate and up too.",
    ),
    click.option(
        "--refine",
        type=int,
        help="Updates of the FFN's remaining channels in the last recovery; 0 for none.",
    ),
    click.option(
        "--self-windows",
        type=AutoCount(),
        help="Windows that the model writes for the last recovery, beside the calibration text; 0 "
        "for none.  [default: auto, twice the calibration windows where the caps allow it]",
    ),
    click.option(
        "--compensate/--no-compensate",
        default=None,
        help="Evaluate masks with removed units predicted from the others (imputation).",
    ),
    click.option(
        "--trial/--no-trial",
        default=None,
        help="Compare cuts with and without attention units, each recovered, before a cut is made.",
    ),
    click.option(
        "--rescale/--no-rescale",
        default=None,
        help="Scale the recovered model's logits, in its final norm, for the smallest loss.",
    ),
    click.option(
        "--ridge",
        type=float,
        help="Ridge penalty of recovery, as a share of the Gram matrix's mean diagonal.",
    ),
    click.option("--weights", type=click.Choice(["int8", "native"]), help="The working copy."),
    click.option(
        "--arithmetic",
        type=click.Choice(["auto", "float", "int8"]),
        help="Arithmetic of masked evaluation: int8 multiplies the working copy as it is.  "
        "[default: auto, the faster one]",
    ),
    click.option("--seed", type=int, help="Seed of every random draw.  [default: 0]"),
)
