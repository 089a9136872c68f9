"""The command line: options in, tables or JSON out. No logic, and no torch until a command runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from frugal_bonsai.errors import FrugalBonsaiError, OutputError

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several click options as one decorator, first on top."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_caps = _options(
    click.option("--max-gpu-mem", metavar="SIZE", help="Hard cap on GPU memory, such as 24GB."),
    click.option("--max-cpu-mem", metavar="SIZE", help="Hard cap on this process's memory."),
    click.option("--device", metavar="DEVICE", help="cpu, cuda or cuda:1.  [default: GPU if any]"),
    click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: all cores]"),
)
_profile = click.option(
    "--profile",
    metavar="FILE",
    help="Hardware profile: plan for that machine; prune predicts its time.",
)
_assume = click.option(
    "--assume-family",
    metavar="FAMILY",
    help="Take an architecture without a table of its own for one like FAMILY (llama, say).",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
_layout = _options(
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
_search = _options(
    click.option(
        "--sparsity",
        type=float,
        default=0.5,
        show_default=True,
        help="Share of the block weights to remove.",
    ),
    _layout,
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
        type=click.Choice(["global", "equal", "ffn", "layers"]),
        help="Without masks: what costs least anywhere, the same share of every layer and kind, of "
        "every FFN alone, or whole layers.",
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
    click.option("--step", type=float, help="Share removed in one round."),
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


@click.group(context_settings=_CONTEXT)
@click.version_option(package_name="frugal-bonsai")
def cli() -> None:
    """Prune language models with forward passes only, inside the memory that you name."""


@cli.command(name="prune")
@click.argument("model")
@click.option("--out", required=True, metavar="DIR", help="Appears when it is complete.")
@_search
@_assume
@_caps
@_profile
@click.option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE")
@click.option("--resume", is_flag=True, help="Continue the run that DIR.run holds.")
@_json
def prune_command(model: str, out: str, resume: bool, as_json: bool, **given: Any) -> None:
    """Prune MODEL (a folder, a hub id, or "example") into DIR."""
    from frugal_bonsai.report.tables import render_prune

    with _watched(given) as progress:
        from frugal_bonsai.run.prune import prune

        summary = prune(model, out, _prune_options(given), resume=resume, progress=progress)
    _print(summary, render_prune, as_json=as_json)


@cli.command(name="adapt")
@click.argument("model", metavar="PRUNED")
@click.option("--teacher", metavar="DENSE", help="What PRUNED was made from; not for --loss lm.")
@click.option(
    "--data",
    required=True,
    multiple=True,
    metavar="SOURCE",
    help="Text file, .jsonl with a text key, wikitext2, c4, hub id, stdlib or self (sampled from "
    "DENSE); may be given several times.",
)
@click.option("--out", required=True, metavar="DIR", help="Appears when it is complete.")
@click.option(
    "--method",
    type=click.Choice(["lora", "full"]),
    help="full trains the block projections themselves.  [default: lora]",
)
@click.option("--rank", metavar="N|auto", help="Of the adapters.  [default: auto, as caps allow]")
@click.option("--alpha", type=float, help="Adapters count alpha/rank.  [default: 2 x rank]")
@click.option(
    "--loss",
    type=click.Choice(["lm", "kl", "kl+hidden"]),
    help="lm: the text alone; kl: the teacher's next tokens too; kl+hidden: and its hidden states. "
    " [default: kl]",
)
@click.option("--lm-weight", type=float, help="[default: 1]")
@click.option("--kl-weight", type=float, help="[default: 1]")
@click.option("--hidden-weight", type=float, help="[default: 1]")
@click.option("--hidden-layers", metavar="N,N", help="[default: every fourth and the last]")
@click.option("--top", type=int, default=64, show_default=True, help="Next tokens that are kept.")
@click.option("--temperature", type=float, default=1.0, show_default=True)
@click.option("--teacher-cache", metavar="DIR", help="Keeps what the teacher said, for more runs.")
@click.option("--tokens", metavar="N", help="To train on, such as 10M.  [default: four passes]")
@click.option("--minutes", type=float, help="To train for, instead of --tokens.")
@click.option("--batch", type=int, help="Windows of a step.  [default: 8]")
@click.option(
    "--learning-rate", type=float, help="[default: 0.384 / hidden size; full: 0.096 / it]"
)
@click.option("--evaluations", type=int, help="Held-out measurements on the way.  [default: 10]")
@click.option(
    "--weights",
    type=click.Choice(["int8", "native", "streamed"]),
    help="How frozen weights are held; streamed: read anew for each step.  [default: native if it "
    "fits, else int8, else streamed]",
)
@click.option(
    "--window", type=int, help="Tokens of a window.  [default: 2048, at most the model's positions]"
)
@click.option("--windows", type=int, help="Of each source.  [default: all; self: 65,536 tokens]")
@click.option("--eval-text", metavar="SOURCE", help="Report perplexity on this text too.")
@click.option("--seed", type=int)
@_caps
@click.option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE")
@click.option("--resume", is_flag=True, help="Continue the run that DIR.run holds.")
@_json
def adapt_command(model: str, out: str, resume: bool, as_json: bool, **given: Any) -> None:
    """Train PRUNED to do what DENSE does, inside the same caps, into DIR.

    The dense model is asked once, streamed, and kept on disk as its likeliest next tokens; then
    adapters (extra: adapt) are trained beside the pruned weights and merged into them.
    """
    from frugal_bonsai.report.adapt_tables import render_adapt

    with _watched(given) as progress:
        from frugal_bonsai.run.adapt import adapt_pruned

        summary = adapt_pruned(model, out, _adapt_options(given), resume=resume, progress=progress)
    _print(summary, render_adapt, as_json=as_json)


@cli.command(name="shrink")
@click.argument("model")
@click.option("--mask", required=True, metavar="FILE", help="Such as prune's pruning_mask.json.")
@click.option("--out", required=True, metavar="DIR", help="Appears when it is complete.")
@_layout
@click.option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE")
@_assume
@_json
def shrink_command(as_json: bool, **given: Any) -> None:
    """Cut MODEL with a mask that someone else made: no text, memory of one tensor.

    A mask holds no weights: what prune's recovery refitted is not in it.
    """
    from frugal_bonsai.report.rewrite_tables import render_shrink
    from frugal_bonsai.run.shrink import shrink

    _print(shrink(**given), render_shrink, as_json=as_json)


@cli.command(name="export")
@click.argument("model", metavar="PRUNED")
@click.option("--format", "kind", type=click.Choice(["gguf"]), default="gguf", show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["f16", "f32", "q8_0"]),
    default="f16",
    show_default=True,
    help="Of the matrices; vectors stay f32.",
)
@click.option("--out", required=True, metavar="FILE", help="Appears when it is complete.")
@_json
def export_command(kind: str, as_json: bool, **given: Any) -> None:
    """Write PRUNED (or a dense model) for llama.cpp, one file with the tokenizer in it."""
    from frugal_bonsai.report.rewrite_tables import render_export
    from frugal_bonsai.run.export import export_gguf

    _print(export_gguf(**given), render_export, as_json=as_json)


@cli.command(name="bench")
@click.argument("dense")
@click.argument("pruned")
@click.option(
    "--runtime",
    type=click.Choice(["transformers", "llama.cpp"]),
    default="transformers",
    show_default=True,
    help="llama.cpp takes GGUF files, or folders with one in them.",
)
@click.option("--prompt-tokens", type=int, default=256, show_default=True)
@click.option("--new-tokens", type=int, default=64, show_default=True)
@click.option("--repeat", type=int, default=5, show_default=True, help="Counted runs of each.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: the runtime's]")
@click.option("--device", metavar="DEVICE", help="cpu, cuda or cuda:1.  [default: GPU if any]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="[default: float32 on a CPU, bfloat16 on a GPU]",
)
@_json
def bench_command(dense: str, pruned: str, as_json: bool, **given: Any) -> None:
    """Time DENSE and PRUNED in turn: prefill, decode, peak memory, and their ratios."""
    from frugal_bonsai.report.rewrite_tables import render_bench
    from frugal_bonsai.run.bench import BenchOptions, bench

    options = BenchOptions(**given)
    import psutil

    from frugal_bonsai.report.live import make_progress

    with make_progress(int(psutil.virtual_memory().total)) as progress:
        result = bench(dense, pruned, options, progress=progress)
    _print(result, render_bench, as_json=as_json)


@cli.command(name="plan")
@click.argument("model")
@_search
@_assume
@_caps
@_profile
@_json
def plan_command(model: str, as_json: bool, **given: Any) -> None:
    """Show what pruning MODEL would hold in memory and how long it would take; runs nothing."""
    from frugal_bonsai.report.plan_tables import render_plan

    _set_threads(given.pop("threads"))
    from frugal_bonsai.run.plan import plan

    _print(plan(model, _prune_options(given)), render_plan, as_json=as_json)


@cli.command(name="profile")
@click.option("--out", metavar="FILE", help="TOML file to write; replaced if it is a profile.")
@click.option("--report", is_flag=True, help="Print the table with --out too.")
@click.option(
    "--dir",
    "folder",
    default=".",
    metavar="DIR",
    help="On the disk to measure.  [default: here]",
)
@click.option("--device", metavar="DEVICE", help="cpu, cuda or cuda:1.  [default: GPU if any]")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: all cores]")
@click.option("--quick", is_flag=True, help="Rougher, in a few seconds; for a first look.")
@_json
def profile_command(report: bool, threads: int | None, as_json: bool, **given: Any) -> None:
    """Measure this machine: disk, memory, matrix products, copies; under a minute."""
    from frugal_bonsai.report.plan_tables import render_profile

    _set_threads(threads)
    import psutil

    from frugal_bonsai.report.live import make_progress

    with make_progress(int(psutil.virtual_memory().total)) as progress:
        from frugal_bonsai.run.profile import profile

        measured = profile(progress=progress, **given)
    if as_json or report or measured["out"] is None:
        _print(measured, render_profile, as_json=as_json)
    if measured["out"] is not None:
        click.echo(f"saved: {measured['out']}", err=as_json)


@cli.command(name="inspect")
@click.argument("model")
@_assume
@_json
def inspect_command(model: str, assume_family: str | None, as_json: bool) -> None:
    """Show MODEL's family, units, parameters and size, from headers alone."""
    from frugal_bonsai.report.tables import render_inspect
    from frugal_bonsai.run.inspect import inspect

    _print(inspect(model, assume_family=assume_family), render_inspect, as_json=as_json)


@cli.command(name="eval")
@click.argument("model")
@click.option("--text", required=True, metavar="SOURCE", help="Text file, .jsonl, hub id, stdlib.")
@click.option(
    "--window", type=int, help="Tokens of a window.  [default: 2048, at most the model's positions]"
)
@click.option("--windows", type=click.IntRange(1), help="Evaluate only the first windows.")
@click.option(
    "--weights", type=click.Choice(["native", "int8"]), default="native", show_default=True
)
@_assume
@_caps
@_json
def eval_command(model: str, text: str, as_json: bool, **given: Any) -> None:
    """Measure MODEL's perplexity on a text, dense or pruned, streamed under the caps."""
    from frugal_bonsai.report.tables import render_eval

    with _watched(given) as progress:
        from frugal_bonsai.run.evaluate import evaluate

        result = evaluate(model, text, progress=progress, **given)
    _print(result, render_eval, as_json=as_json)


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
        "ridge",
        "weights",
        "arithmetic",
        "seed",
    )
    return PruneOptions(settings={name: given.pop(name) for name in settings}, **given)


def _adapt_options(given: dict[str, Any]) -> Any:
    """The flat options of the command as :class:`AdaptOptions`."""
    from frugal_bonsai.run.options import AdaptOptions
    from frugal_bonsai.sizes import parse_count

    settings: dict[str, Any] = {
        name: given.pop(name)
        for name in (
            "method",
            "loss",
            "lm_weight",
            "kl_weight",
            "hidden_weight",
            "alpha",
            "learning_rate",
            "batch",
            "evaluations",
            "seed",
        )
    }
    rank, tokens, minutes = given.pop("rank"), given.pop("tokens"), given.pop("minutes")
    settings["rank"] = None if rank in (None, "auto") else parse_count(rank, option="--rank")
    settings["tokens"] = None if tokens is None else parse_count(tokens, option="--tokens")
    settings["seconds"] = None if minutes is None else 60.0 * minutes
    layers = given.pop("hidden_layers")
    if layers is not None:
        given["hidden_layers"] = tuple(
            parse_count(part, option="--hidden-layers", least=0) for part in layers.split(",")
        )
    return AdaptOptions(settings=settings, **given)


@contextmanager
def _watched(given: dict[str, Any]) -> Iterator[Any]:
    """Threads set, progress on standard error, for as long as the command works."""
    _set_threads(given.pop("threads"))
    from frugal_bonsai.memory.budget import find_device, make_budget
    from frugal_bonsai.report.live import make_progress

    device = find_device(given["device"])
    budget = make_budget(device, given["max_gpu_mem"], given["max_cpu_mem"])
    with make_progress(budget.host_bytes, gpu_cap_bytes=budget.gpu_bytes) as progress:
        yield progress


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        import torch

        torch.set_num_threads(threads)


def _print(
    values: dict[str, Any], render: Callable[[dict[str, Any], Any], None], *, as_json: bool
) -> None:
    if as_json:
        click.echo(json.dumps(values, allow_nan=False))
        return
    from rich.console import Console

    render(values, Console())


def main() -> None:
    """Entry point: a user's error is one text on standard error and exit code 2."""
    try:
        cli.main(standalone_mode=False)
    except FrugalBonsaiError as error:
        hint = _kept_hint(_option_value("--out")) if isinstance(error, OutputError) else ""
        click.echo(f"frugal-bonsai: {error}{hint}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        out = _option_value("--out")
        nothing = " before a round was finished; nothing is left behind" if out else ""
        click.echo(f"frugal-bonsai: stopped{_kept_hint(out) or nothing}", err=True)
        sys.exit(130)


def _kept_hint(out: str | None) -> str:
    """How to go on, where a run is kept: one without a finished round leaves no folder."""
    if out is None or not Path(f"{out}.run").is_dir():
        return ""
    kept = "what was done is" if sys.argv[1:2] == ["adapt"] else "finished rounds are"
    return f"; {kept} in {out}.run, add --resume to continue"


def _option_value(name: str) -> str | None:
    """The value of an option as typed, for the message about a run that ended early."""
    for at, word in enumerate(sys.argv):
        if word == name and at + 1 < len(sys.argv):
            return sys.argv[at + 1].rstrip("/\\")
        if word.startswith(name + "="):
            return word.partition("=")[2].rstrip("/\\")
    return None


if __name__ == "__main__":
    main()
