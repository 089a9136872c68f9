"""Options that several commands share, as decorators. click only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from frugal_bonsai.sizes import parse_bytes


def several(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several click options as one decorator, first on top."""

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
    help="Take an architecture without a table of its own for one like FAMILY (llama, say).",
)
json_output = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
layout = several(
    click.option(
        "--layout",
        type=click.Choice(["uniform", "per-layer", "padded"]),
        default="uniform",
        show_default=True,
        help="uniform loads everywhere; per-layer prunes better; padded is per-layer, zero-filled "
        "so that it loads everywhere.",
    ),
    click.option(
        "--as-mistral",
        is_flag=True,
        help="Allow a Llama any number of heads: written as the Mistral that computes the same.",
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
        help="Calibration windows.  [default: 65,536 tokens of them, at least 32]",
    ),
    click.option(
        "--method",
        type=click.Choice(
            [
                "default",
                "group",
                "unit",
                "local-only",
                "paper",
                "fluctuation",
                "depth",
                "experts",
                "wanda",
                "magnitude",
                "random",
            ]
        ),
        default="default",
        show_default=True,
        help="A bundle of the options below, which override it.  paper: the published algorithm; "
        "others are there to compare with.",
    ),
    click.option(
        "--level",
        type=click.Choice(["group", "unit", "none"]),
        help="group: masks decide how much goes where, the prior which units; unit: masks "
        "decide on every unit; none: no masks.",
    ),
    click.option(
        "--objective",
        type=click.Choice(["parameters", "units", "latency"]),
        help="What loss is weighed against: parameters removed, units, or milliseconds saved on "
        "the machine of --profile.",
    ),
    click.option("--prompt-tokens", type=int, help="Of the prompt that latency is counted for."),
    click.option("--generated-tokens", type=int, help="Of its answer.  [default: 512 and 128]"),
    click.option(
        "--allocation",
        type=click.Choice(["global", "equal", "ffn", "layers", "experts"]),
        help="Without masks: what costs least anywhere, the same share of every layer and kind, of "
        "every FFN alone, whole layers, or whole experts.",
    ),
    click.option(
        "--prior",
        type=click.Choice(
            [
                "activation",
                "wanda",
                "output",
                "fluctuation",
                "flap",
                "exact",
                "magnitude",
                "random",
                "similarity",
                "reap",
            ]
        ),
    ),
    click.option("--design", type=click.Choice(["per-window", "shared"])),
    click.option("--regression", type=click.Choice(["ridge", "paper"])),
    click.option("--masks", type=int, help="Masks a round on every mask window, at most."),
    click.option(
        "--certainty",
        type=float,
        help="Stop drawing masks when the round's cut is as certain as this; 1 draws all.",
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
        help="Without masks and recovery: what goes leaves its mean behind as a bias.",
    ),
    click.option(
        "--refit",
        type=click.Choice(["outputs", "all"]),
        help="Which ones: o_proj and down_proj, or q, k, v, gate and up too.",
    ),
    click.option(
        "--refine",
        type=int,
        help="How often the last recovery also moves the FFN's remaining channels; 0 never.",
    ),
    click.option(
        "--compensate/--no-compensate",
        default=None,
        help="Judge units by what removal costs after the others make up for it.",
    ),
    click.option(
        "--trial/--no-trial",
        default=None,
        help="Recover a cut with and without attention units before it is made.",
    ),
    click.option(
        "--rescale/--no-rescale",
        default=None,
        help="Scale the recovered model's logits, in its final norm, to how sure it can be.",
    ),
    click.option("--ridge", type=float, help="Recovery's penalty, a share of the mean diagonal."),
    click.option("--weights", type=click.Choice(["int8", "native"]), help="The working copy."),
    click.option(
        "--arithmetic",
        type=click.Choice(["auto", "float", "int8"]),
        help="Of masked evaluation: int8 multiplies the working copy as it is.  [default: auto, "
        "the faster one]",
    ),
    click.option("--seed", type=int),
)
