"""The output of ``shrink``, ``export`` and ``bench``.

In: the values that ``--json`` prints. Out: tables and a few lines of text on a rich console.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from frugal_bonsai.report.card_parts import layout_notes
from frugal_bonsai.report.sheet import Sheet
from frugal_bonsai.report.words import KIND_NAMES, all_printable, duration, size_rows, span
from frugal_bonsai.sizes import format_bytes

if TYPE_CHECKING:
    from rich.console import Console

Values = Mapping[str, Any]


def render_shrink(summary: Values, console: Console) -> None:
    """Print sizes before and after, kept units, and how to load the output.

    Args:
        summary: Result of :func:`frugal_bonsai.shrink`.
        console: Console that is printed on.
    """
    summary, sheet = all_printable(summary, console.encoding), Sheet(console)
    sheet.heading(f"{summary['model']}: {summary['sparsity']:.1%} of the block weights removed")
    rows = size_rows(summary["before"], summary["after"], "on disk")
    sheet.table(("", "before", "after", "ratio"), rows)
    sheet.heading("units a layer")
    sheet.table(
        ("kind", "dense", "kept"),
        [
            (KIND_NAMES.get(kind, kind), span(summary["dense"][kind]), span(counts))
            for kind, counts in summary["kept"].items()
        ],
    )
    sheet.warn(summary.get("warnings", ()))
    for note in (*layout_notes(summary), *summary["notes"]):
        sheet.say(f"note: {note}")
    sheet.say(f"time: {duration(summary['seconds'])}")
    sheet.blank()
    sheet.verbatim(f"saved: {summary['out']} ({summary['layout']} layout)")
    sheet.verbatim(f"load:  {summary['load']}")


def render_export(summary: Values, console: Console) -> None:
    """Print architecture, tokenizer, tensors and size of the file.

    Args:
        summary: Result of :func:`frugal_bonsai.export_gguf`.
        console: Console that is printed on.
    """
    summary, sheet = all_printable(summary, console.encoding), Sheet(console)
    sheet.heading(f"{summary['model']}: {summary['format']}")
    tensors = ", ".join(f"{count} {kind}" for kind, count in summary["tensors"].items())
    rows = [
        ("architecture", summary["architecture"]),
        ("tokenizer", summary["tokenizer"]),
        ("tensors", tensors),
        ("parameters", f"{summary['parameters']:,}"),
        ("bytes of the checkpoint", format_bytes(summary["weight_bytes"])),
        ("bytes of the file", format_bytes(summary["file_bytes"])),
        ("time", duration(summary["seconds"])),
    ]
    sheet.table(("", ""), rows)
    for note in summary["notes"]:
        sheet.say(f"note: {note}")
    sheet.blank()
    sheet.verbatim(f"saved: {summary['out']}")


def render_bench(result: Values, console: Console) -> None:
    """Print rates and memory of both models, and their ratios.

    Args:
        result: Result of :func:`frugal_bonsai.bench`.
        console: Console that is printed on.
    """
    result, sheet = all_printable(result, console.encoding), Sheet(console)
    dense, pruned, ratios = result["dense"], result["pruned"], result["ratios"]
    sheet.heading(f"{pruned['model']} against {dense['model']} ({result['runtime']})")
    names = {
        "prefill": f"prefill of {result['prompt_tokens']} tokens, tokens/s",
        "decode": f"decode of {result['new_tokens']} tokens, tokens/s",
    }
    rows = [
        (
            name,
            *(_rate(model[f"{kind}_tokens_per_second"]) for model in (dense, pruned)),
            f"{ratios[kind]:.2f}",
        )
        for kind, name in names.items()
    ]
    for where, name in (("host", "peak host memory"), ("gpu", "peak GPU memory")):
        key = f"{where}_peak_bytes"
        if dense[key] and pruned[key]:
            sizes = (format_bytes(dense[key]), format_bytes(pruned[key]))
            rows.append((name, *sizes, f"{ratios[key]:.2f}"))
    sizes = (format_bytes(dense["weight_bytes"]), format_bytes(pruned["weight_bytes"]))
    share = pruned["weight_bytes"] / dense["weight_bytes"]
    rows.append(("bytes of weights", *sizes, f"{share:.2f}"))
    sheet.table(("", "dense", "pruned", "ratio"), rows)
    how = [f"{dense[key]}" for key in ("dtype", "device") if key in dense]
    if "threads" in dense:
        how.append(f"{dense['threads']} threads")
    sheet.say(
        f"medians of {result['repeat']} alternating runs of each, smallest to largest in "
        f"brackets{'; ' + ', '.join(how) if how else ''}"
    )


def _rate(figure: Values) -> str:
    low, high = figure["smallest"], figure["largest"]
    return f"{figure['median']:,.1f} ({low:,.1f} to {high:,.1f})"
