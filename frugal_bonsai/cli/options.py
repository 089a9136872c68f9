"""Options that several commands share, as decorators. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

from frugal_bonsai.cli.command import set_verbosity
from frugal_bonsai.model.layout import LAYOUTS, UNIFORM
from frugal_bonsai.sizes import parse_bytes

Decorator = Callable[[Any], Any]


class Size(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """A size such as ``24GB`` or ``7.5GiB``, in bytes."""

    name = "size"

    def convert(
        self, value: str | int, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Read the size; the error names the option, and the variable that it came from."""
        option = "size" if param is None else param.opts[0]
        if param is not None and is_from_environment(ctx, param.name):
            option = f"{option} (from {param.envvar})"
        return parse_bytes(value, option=option)


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


def is_from_environment(ctx: click.Context | None, name: str | None) -> bool:
    """Return whether the value of a parameter was read from an environment variable."""
    if ctx is None or name is None:
        return False
    return ctx.get_parameter_source(name) == ParameterSource.ENVIRONMENT


def drop_environment(ctx: click.Context, given: dict[str, Any], *names: str) -> None:
    """Set options to None that do not apply, if they came from environment variables."""
    for name in names:
        if is_from_environment(ctx, name):
            given[name] = None


def machine_option(*names: str, **attributes: Any) -> Decorator:
    """Return an option of the machine, which has an environment variable."""
    variable = "FRUGAL_BONSAI_" + names[0].removeprefix("--").replace("-", "_").upper()
    return click.option(*names, envvar=variable, show_envvar=True, **attributes)


max_gpu_mem = machine_option(
    "--max-gpu-mem",
    type=Size(),
    help="Hard cap on GPU memory, such as 24GB.  [default: what is free]",
)
max_cpu_mem = machine_option(
    "--max-cpu-mem",
    type=Size(),
    help="Hard cap on this process's memory, such as 16GB.  [default: what is available]",
)
device = machine_option(
    "--device", metavar="DEVICE", help="cpu, cuda, cuda:1, xpu, mps.  [default: GPU if any]"
)
threads = machine_option(
    "--threads", type=click.IntRange(1), help="CPU threads.  [default: all cores]"
)
no_report = click.option(
    "--no-report",
    "report",
    flag_value=False,
    default=True,
    help="Write no report.html into the output.",
)
max_shard_size = click.option(
    "--max-shard-size",
    type=Size(),
    default="5GB",
    show_default=True,
    help="Largest file of weights in the output.",
)
profile = click.option(
    "--profile",
    metavar="FILE",
    help="Hardware profile, a file or a name such as rtx-12gb: plan for that machine; prune "
    "predicts its time.",
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
window = click.option(
    "--window", type=int, help="Tokens of a window.  [default: 2048, at most the model's positions]"
)
eval_text = click.option(
    "--eval-text", metavar="SOURCE", help="Report perplexity on this text too."
)
layout = click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    default=UNIFORM,
    show_default=True,
    help="uniform loads everywhere; per-layer prunes better; padded is per-layer, filled with "
    "zeros so that it loads everywhere.",
)
as_mistral = click.option(
    "--as-mistral",
    is_flag=True,
    help="Allow a Llama any number of heads: it is written as an equal Mistral.",
)
task_data = click.option(
    "--task-data",
    multiple=True,
    metavar="DIR|TASK=FILE",
    help="Local items of tasks, JSON lines: a folder with TASK.jsonl or TASK_*.jsonl, or the file "
    "of one task; repeatable.  [default: from the hub]",
)
FIRST_ITEMS = "Score the first items of each task only."
overwrite = click.option(
    "--overwrite",
    is_flag=True,
    help="Replace an output that this program wrote, when the new one is complete.",
)
dry_run = click.option(
    "--dry-run", is_flag=True, help="Print the plan and what would be written; write nothing."
)
resume = click.option("--resume", is_flag=True, help="Continue the run that DIR.run holds.")
json_output = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
quiet = click.option(
    "-q",
    "--quiet",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=set_verbosity,
    help="Print the result and errors only, no progress and no notes.",
)
verbose = click.option(
    "-v",
    "--verbose",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=set_verbosity,
    help="Print a line for every layer, log messages of libraries, and where an error was found.",
)
