"""``shrink``, ``export`` and ``bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from frugal_bonsai.cli import options
from frugal_bonsai.cli.running import print_result, watched


@click.command(name="shrink")
@click.argument("model")
@click.option("--mask", required=True, metavar="FILE", help="Such as prune's pruning_mask.json.")
@click.option("--out", required=True, metavar="DIR", help="Appears when it is complete.")
@options.layout
@options.text_only
@options.max_shard_size
@options.assume
@options.json_output
def shrink_command(as_json: bool, **given: Any) -> None:
    """Prune MODEL with a mask from elsewhere; needs no text and the memory of one tensor.

    A mask holds no weights, so projections that prune refitted are not in it.
    """
    from frugal_bonsai.report.rewrite_tables import render_shrink
    from frugal_bonsai.run.early import check_shrink

    keys = ("max_shard_size", "assume_family", "text_only")
    check_shrink(
        given["model"], Path(given["mask"]), Path(given["out"]), **{key: given[key] for key in keys}
    )
    from frugal_bonsai.run.shrink import shrink

    print_result(shrink(**given), render_shrink, as_json=as_json)


@click.command(name="export")
@click.argument("model", metavar="PRUNED")
@click.option("--format", "kind", type=click.Choice(["gguf"]), default="gguf", show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["f16", "bf16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]),
    default="f16",
    show_default=True,
    help="Number format of the matrices; vectors stay f32.",
)
@click.option("--out", required=True, metavar="FILE", help="Appears when it is complete.")
@options.json_output
def export_command(kind: str, as_json: bool, **given: Any) -> None:
    """Write PRUNED (or a dense model) for llama.cpp as one file, tokenizer included."""
    from frugal_bonsai.report.rewrite_tables import render_export
    from frugal_bonsai.run.early import check_export

    check_export(given["model"], Path(given["out"]))
    from frugal_bonsai.run.export import export_gguf

    print_result(export_gguf(**given), render_export, as_json=as_json)


@click.command(name="bench")
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
@click.option(
    "--repeat", type=int, default=5, show_default=True, help="Counted runs of each model."
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: the runtime's]")
@options.device
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="[default: float32 on a CPU, bfloat16 on a GPU]",
)
@options.json_output
def bench_command(dense: str, pruned: str, as_json: bool, **given: Any) -> None:
    """Time DENSE and PRUNED in turn: prefill, decode and peak memory."""
    from frugal_bonsai.report.rewrite_tables import render_bench
    from frugal_bonsai.run.early import check_bench
    from frugal_bonsai.run.options import BenchOptions

    chosen = BenchOptions(**given)
    check_bench(dense, pruned, chosen)
    with watched() as progress:
        from frugal_bonsai.run.bench import bench

        result = bench(dense, pruned, chosen, progress=progress)
    print_result(result, render_bench, as_json=as_json)


@click.command(name="report")
@click.argument("output")
@click.option("--out", metavar="FILE", help="Default: report.html for html, else the console.")
@click.option(
    "--format", "kind", type=click.Choice(["html", "md", "json"]), default="html", show_default=True
)
def report_command(output: str, out: str | None, kind: str) -> None:
    """Write one page on OUTPUT, a folder that prune wrote: what it removed, what it cost."""
    from frugal_bonsai.run.report import report_page, write_page

    text = report_page(output, kind=kind)
    if out is None and kind != "html":
        click.echo(text)
        return
    path = Path(out or "report.html")
    write_page(path, text)
    click.echo(f"written: {path}")
