"""``shrink``, ``export`` and ``bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import cloup

from frugal_bonsai.cli import options
from frugal_bonsai.cli.command import COMMON, Command
from frugal_bonsai.cli.running import print_result, watched


@cloup.command(
    name="shrink",
    cls=Command,
    short_help="Apply a mask that someone shared.",
    examples=(
        "frugal-bonsai shrink example --mask out/example-50/pruning_mask.json --out out/again",
        "frugal-bonsai shrink DENSE --mask pruning_mask.json --layout per-layer --out DIR",
    ),
)
@cloup.argument("model", help="The dense model: a folder, a GGUF file, a hub id, or example.")
@cloup.option_group(
    COMMON,
    click.option(
        "--mask", required=True, metavar="FILE", help="Such as prune's pruning_mask.json."
    ),
    click.option(
        "--out", required=True, metavar="DIR", help="Output folder; appears when complete."
    ),
    options.layout,
    options.as_mistral,
    options.text_only,
    options.max_shard_size,
    options.assume,
    options.overwrite,
    options.no_report,
    options.dry_run,
    options.json_output,
    options.quiet,
    options.verbose,
)
def shrink_command(dry_run: bool, as_json: bool, report: bool, **given: Any) -> None:
    """Prune MODEL with a mask from elsewhere; needs no text and the memory of one tensor.

    A mask holds no weights, so projections that prune refitted are not in it.
    """
    from frugal_bonsai.report.rewrite_tables import render_shrink
    from frugal_bonsai.run.early import check_shrink

    keys = ("max_shard_size", "assume_family", "text_only", "overwrite")
    check_shrink(
        given["model"], Path(given["mask"]), Path(given["out"]), **{key: given[key] for key in keys}
    )
    if dry_run:
        from frugal_bonsai.report.dry_run_tables import render_dry_shrink
        from frugal_bonsai.run.dry_run import dry_shrink

        print_result(dry_shrink(**given), render_dry_shrink, as_json=as_json)
        return
    from frugal_bonsai.run.shrink import shrink

    print_result(shrink(**given, report=report), render_shrink, as_json=as_json)


@cloup.command(
    name="export",
    cls=Command,
    short_help="Write a model as one GGUF file.",
    examples=(
        "frugal-bonsai export out/example-50 --out example-50.gguf",
        "frugal-bonsai export DIR --dtype q8_0 --out model-q8.gguf",
    ),
)
@cloup.argument("model", metavar="PRUNED", help="A pruned or a dense model, any layout.")
@cloup.option_group(
    COMMON,
    click.option(
        "--out", required=True, metavar="FILE", help="Output file; appears when complete."
    ),
    click.option(
        "--format",
        "kind",
        type=click.Choice(["gguf"]),
        default="gguf",
        show_default=True,
        help="Format of the file.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["f16", "bf16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]),
        metavar="NAME",
        default="f16",
        show_default=True,
        help="Number format of the matrices: f16, bf16, f32, q8_0, q5_1, q5_0, q4_1, q4_0; vectors "
        "stay f32.",
    ),
    options.overwrite,
    options.dry_run,
    options.json_output,
    options.quiet,
    options.verbose,
)
def export_command(kind: str, dry_run: bool, as_json: bool, **given: Any) -> None:
    """Write PRUNED (or a dense model) for llama.cpp as one file, tokenizer included."""
    from frugal_bonsai.report.rewrite_tables import render_export
    from frugal_bonsai.run.early import check_export

    check_export(given["model"], Path(given["out"]), overwrite=given["overwrite"])
    if dry_run:
        from frugal_bonsai.report.dry_run_tables import render_dry_export
        from frugal_bonsai.run.dry_run import dry_export

        print_result(dry_export(**given), render_dry_export, as_json=as_json)
        return
    from frugal_bonsai.run.export import export_gguf

    print_result(export_gguf(**given), render_export, as_json=as_json)


@cloup.command(
    name="bench",
    cls=Command,
    short_help="Compare the speed and memory of two models.",
    examples=(
        "frugal-bonsai bench example out/example-50",
        "frugal-bonsai bench dense.gguf pruned.gguf --runtime llama.cpp --threads 4",
    ),
)
@cloup.argument("dense", help="The dense model.")
@cloup.argument("pruned", help="The model that is compared with it.")
@cloup.option_group(
    COMMON,
    click.option(
        "--runtime",
        type=click.Choice(["transformers", "llama.cpp"]),
        default="transformers",
        show_default=True,
        help="llama.cpp takes GGUF files, or folders with one in them.",
    ),
    click.option(
        "--prompt-tokens",
        type=int,
        default=256,
        show_default=True,
        help="Random tokens of the prompt (prefill).",
    ),
    click.option(
        "--new-tokens",
        type=int,
        default=64,
        show_default=True,
        help="Tokens generated after it (decode).",
    ),
    click.option(
        "--repeat", type=int, default=5, show_default=True, help="Counted runs of each model."
    ),
    options.machine_option(
        "--threads", type=click.IntRange(1), help="CPU threads.  [default: the runtime's]"
    ),
    options.device,
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="Dtype of the weights (transformers).  [default: float32 on a CPU, bfloat16 on a GPU]",
    ),
    click.option(
        "--seed", type=int, default=0, show_default=True, help="Seed of the prompt's tokens."
    ),
    options.json_output,
    options.quiet,
    options.verbose,
)
@click.pass_context
def bench_command(
    ctx: click.Context, /, dense: str, pruned: str, as_json: bool, **given: Any
) -> None:
    """Time DENSE and PRUNED in turn: prefill, decode and peak memory."""
    from frugal_bonsai.report.rewrite_tables import render_bench
    from frugal_bonsai.run.early import check_bench
    from frugal_bonsai.run.options import BenchOptions

    if given["runtime"] == "llama.cpp":
        options.drop_environment(ctx, given, "device")
    chosen = BenchOptions(**given)
    check_bench(dense, pruned, chosen)
    with watched() as progress:
        from frugal_bonsai.run.bench import bench

        result = bench(dense, pruned, chosen, progress=progress)
    print_result(result, render_bench, as_json=as_json)
