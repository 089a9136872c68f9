"""The output of ``adapt``.

In: the summary as plain values (``--json`` prints them). Out: tables and text on a rich console.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from frugal_bonsai.report.adapt_card import bounds_text, figure_rows
from frugal_bonsai.report.sheet import Sheet
from frugal_bonsai.report.words import all_printable, duration, number, plural
from frugal_bonsai.sizes import format_bytes

if TYPE_CHECKING:
    from rich.console import Console


def render_adapt(summary: Mapping[str, Any], console: Console) -> None:
    """Print figures before and after, the training's measurements, memory, and the output folder.

    Args:
        summary: what :func:`frugal_bonsai.adapt` returns.
        console: console to print to.
    """
    summary, sheet = all_printable(summary, console.encoding), Sheet(console)
    training, data, memory = summary["training"], summary["data"], summary["memory"]
    sheet.heading(f"{summary['model']}: adapted")
    sheet.table(("", "pruned", "adapted", "ratio"), figure_rows(summary, "on disk"))
    if bounds := bounds_text(summary):
        sheet.say(bounds)
    sheet.heading("training")
    sheet.table(
        ("step", "loss", "held-out perplexity", "divergence", "at most"),
        [
            (
                str(row["step"]),
                number(row["loss"], 3),
                number(row["perplexity"], 3),
                number(row["kl"], 3),
                number(row["kl_upper"], 3),
            )
            for row in training["history"]
        ],
    )
    sheet.say(
        f"kept: step {training['best_step']:,} of {training['steps']:,}; {training['tokens']:,} "
        f"tokens in {duration(training['seconds'])}, {duration(summary['seconds'])} in all"
    )
    if training["stopped"]:
        sheet.say(f"stopped early at {training['stopped']}")
    sheet.heading("the run")
    peaks = [_peak(memory, "host")]
    if memory["gpu_peak_bytes"] is not None:
        peaks.append(_peak(memory, "gpu"))
    sheet.say(f"memory: {', '.join(peaks)}")
    rank = f", rank {training['rank']}" if training["rank"] else ""
    sheet.say(
        f"student: {training['weights']} weights{rank}, {training['optimiser']}, micro-batches of "
        f"{plural(training['micro_batch'], 'window')}"
    )
    sheet.say(
        f"data: {', '.join(data['sources'])}, {data['windows']:,} windows of {data['window']} "
        f"tokens, {data['held_out_windows']} held out"
    )
    verify = summary["verify"]
    sheet.say(
        f"verified in fp32: logits equal the merged weights' within "
        f"{verify['max_relative_difference']:.1e}, the trained student's within "
        f"{verify['student_difference']:.1e}, on {plural(verify['windows'], 'window')}"
    )
    sheet.warn(summary.get("warnings", ()))
    for note in summary["notes"]:
        sheet.say(f"note: {note}")
    sheet.blank()
    sheet.verbatim(f"saved: {summary['out']} ({summary['layout']} layout)")
    sheet.verbatim(f"load:  {summary['load']}")


def _peak(memory: Mapping[str, Any], where: str) -> str:
    used, predicted = (format_bytes(memory[f"{where}_{k}_bytes"]) for k in ("peak", "predicted"))
    cap = format_bytes(memory[f"{where}_cap_bytes"])
    name = "GPU" if where == "gpu" else "host"
    return f"peak {used} (predicted {predicted}) of {cap} of {name} memory"
