"""The output of ``prune`` and ``inspect``.

In: the values that ``--json`` prints. Out: tables and a few lines of text on a rich console, at 80
columns, on a terminal or a pipe. Computes only ratios and shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from frugal_bonsai.report.card_parts import layout_notes
from frugal_bonsai.report.sampling_words import SCORES, by_round, covered, mask_spending
from frugal_bonsai.report.sheet import Sheet
from frugal_bonsai.report.words import (
    KIND_NAMES,
    all_printable,
    duration,
    latency_words,
    number,
    numbers_from_to,
    peak_words,
    plural,
    ratio,
    runs,
    size_rows,
    span,
    task_figure_rows,
)
from frugal_bonsai.sizes import format_bytes

if TYPE_CHECKING:
    from rich.console import Console

Values = Mapping[str, Any]
# Models with more layers than this have runs of equal layers merged into one row.
_MOST_ROWS = 40


def render_prune(summary: Values, console: Console) -> None:
    """Print figures before and after, kept units, rounds, memory, and how to load the output.

    Args:
        summary: Result of :func:`frugal_bonsai.prune`.
        console: Console that is printed on.
    """
    summary, sheet = all_printable(summary, console.encoding), Sheet(console)
    _say_before_after(summary, sheet)
    _say_kept(summary, sheet)
    _say_rounds(summary, sheet)
    _say_run(summary, sheet)
    sheet.warn(summary.get("warnings", ()))
    for note in (*layout_notes(summary), *summary["notes"]):
        sheet.say(f"note: {note}")
    sheet.blank()
    sheet.verbatim(f"saved: {summary['out']} ({summary['layout']} layout)")
    sheet.verbatim(f"load:  {summary['load']}")


def _say_before_after(summary: Values, sheet: Sheet) -> None:
    before, after = summary["before"], summary["after"]
    rows = size_rows(before, after, "on disk")
    calibration, text = summary["calibration"], summary["eval_text"]
    names = {"perplexity": f"perplexity, held-out calibration, window {calibration['window']}"}
    if text is not None:
        names["eval_perplexity"] = f"perplexity, {text['name']}, window {text['window']}"
    for key, name in names.items():
        dense, pruned = before[key], after[key]
        rows.append((name, number(dense, 3), number(pruned, 3), ratio(dense, pruned)))
    rows += task_figure_rows(before, after)
    sheet.heading(f"{summary['model']}: {summary['sparsity']:.1%} of the block weights removed")
    sheet.table(("", "before", "after", "ratio"), rows)
    counted = [f"{plural(calibration['held_out_windows'], 'window')} of held-out calibration text"]
    if text is not None:
        counted.append(f"{plural(text['windows'], 'window')} of {text['name']}")
    errors = [
        f"{number(before[key])} before and {number(after[key])} after"
        for key in ("perplexity_error", "eval_perplexity_error")
        if before.get(key) is not None
    ]
    said = f"; standard error {', and '.join(errors)}" if errors else ""
    sheet.say(f"perplexity over {' and '.join(counted)}{said}")


def _say_kept(summary: Values, sheet: Sheet) -> None:
    kinds = list(summary["kept"])
    rows = [
        (
            *(f"{summary['kept'][k][at]:,} of {summary['dense'][k][at]:,}" for k in kinds),
            f"{share:.1%}",
        )
        for at, share in enumerate(summary["layer_sparsity"])
    ]
    merge = len(rows) > _MOST_ROWS
    ranges = runs(rows) if merge else ((at, at) for at in range(len(rows)))
    sheet.heading("kept in each layer")
    sheet.table(
        ("layer", *(KIND_NAMES.get(kind, kind) for kind in kinds), "removed"),
        [(numbers_from_to(first, last), *rows[first]) for first, last in ranges],
    )


def _say_rounds(summary: Values, sheet: Sheet) -> None:
    rounds = summary["rounds"]
    sheet.heading("rounds: how far to trust the cut")
    sheet.table(
        ("round", "removed", "masks", "R2", "tau", "sure", "perplexity", "tokens", "time"),
        [
            (
                str(row["round"]),
                f"{row['sparsity']:.1%}",
                f"{row['observations']:,}",
                number(row["r2"]),
                number(row["tau"]),
                number(row["certainty"]),
                number(row.get("perplexity")),
                f"{row['forward_tokens']:,}",
                duration(row["seconds"]),
            )
            for row in rounds
        ],
    )
    if any(row["observations"] for row in rounds):
        sheet.say(SCORES)
        inside = covered(rounds)
        if inside is not None:
            sheet.say(inside)
        sheet.say(f"penalty: {by_round(rounds, 'penalty')}")
        sheet.say(mask_spending(rounds))
    scale = rounds[-1].get("logit_scale") if rounds else None
    if scale is not None and round(scale, 2) != 1:
        sheet.say(
            f"logits: scaled by {number(scale)} in the final norm: the pruned model is "
            f"{'less' if scale < 1 else 'more'} certain than the dense one"
        )
    dense = [row["dense_perplexity"] for row in rounds if row.get("dense_perplexity") is not None]
    if dense:
        sheet.say(
            f"perplexity: of the windows that the search used, window "
            f"{summary['calibration']['window']}; dense {number(dense[-1])}"
        )


def _say_run(summary: Values, sheet: Sheet) -> None:
    """Print memory, tokens, texts and verification of the run."""
    memory, calibration, verify = summary["memory"], summary["calibration"], summary["verify"]
    peaks = [f"{peak_words(memory, 'host')} of host memory"]
    if memory["gpu_peak_bytes"] is not None:
        peaks.append(f"{peak_words(memory, 'gpu')} of GPU memory")
    sheet.heading("the run")
    sheet.say(f"memory: {', '.join(peaks)}")
    if memory["final_micro_batch"] < memory["planned_micro_batch"]:
        sheet.say(
            f"memory ran out on the way: micro-batches were planned with "
            f"{plural(memory['planned_micro_batch'], 'window')} and ended with "
            f"{memory['final_micro_batch']}"
        )
    sheet.say(
        f"spent: {summary['forward_tokens']:,} forward tokens, {duration(summary['seconds'])} "
        f"(method {summary['method']}, seed {summary['settings']['seed']})"
    )
    if summary["latency"] is not None:
        sheet.say(f"predicted speed-up: {latency_words(summary['latency'])}")
    own = calibration["written_windows"]
    written = f", and {own} that the dense model wrote" if own else ""
    sheet.say(
        f"calibration: {calibration['source']}, {plural(calibration['windows'], 'window')} of "
        f"{calibration['window']} tokens{written}"
    )
    sheet.say(
        f"verified: logits equal the masked parent's within "
        f"{verify['max_relative_difference']:.1e} on {plural(verify['windows'], 'window')}"
    )


def gguf_rows(facts: Values) -> list[tuple[str, str]]:
    """Return the rows about a GGUF file: its size, and the number formats of its values."""
    rows = [("bytes of the GGUF file", format_bytes(facts["file_bytes"]))]
    rows += [("its name", str(facts["name"]))] if facts["name"] else []
    rows.append(
        ("its architecture and quantisation", "{architecture}, {quantisation}".format(**facts))
    )
    return rows + [(f"values in {kind}", f"{count:,}") for kind, count in facts["formats"].items()]


def render_inspect(info: Values, console: Console) -> None:
    """Print family, sizes and units of a model.

    Args:
        info: Result of :func:`frugal_bonsai.inspect`.
        console: Console that is printed on.
    """
    info, sheet = all_printable(info, console.encoding), Sheet(console)
    if info["kind"] != "model":
        sheet.say(f"{info['model']} {info['what']}; {info['advice']}")
        if info["command"]:
            sheet.verbatim(info["command"])
        return
    sheet.heading(f"{info['model']}: {info['family']}, {plural(info['layers'], 'layer')}")
    whole = info.get("multimodal")
    if whole is not None and whole["parts"]:
        sheet.say(
            f"the text model of a {whole['model_type']}: it can be pruned, and the other parts are "
            "carried along, or left out with --text-only"
        )
    sheet.table(("", ""), _model_rows(info))
    sheet.heading('units, each kept or removed whole (the paper says "module")')
    sheet.table(
        ("kind", "a layer", "in all", "parameters of one"),
        [
            (
                KIND_NAMES.get(group["kind"], group["kind"]),
                span(group["units_per_layer"]),
                f"{sum(group['units_per_layer']):,}",
                span(group["parameters_per_unit"]),
            )
            for group in info["groups"]
        ],
    )
    sheet.blank()
    sheet.say(_layout_words(info))
    for note in info["notes"]:
        sheet.say(f"note: {note}")


def _layout_words(info: Values) -> str:
    """Return the numbers of units that the layouts can hold."""
    uniform, reason = info["layouts"]["uniform"], info.get("whole_attention")
    channels = f"uniform layout: FFN channels in multiples of {uniform['tile']}"
    if reason is not None:
        return f"{channels}; per-layer and padded: any number; attention stays whole: {reason}"
    if not uniform["attention_counts"]:
        return f"{channels}; padded: any number; per-layer alone removes attention heads, too"
    counts = ", ".join(map(str, uniform["attention_counts"]))
    return f"{channels}, KV groups a layer one of {counts}; per-layer and padded: any counts"


def _model_rows(info: Values) -> list[tuple[str, str]]:
    """Return the rows of a model's sizes."""
    keys = ("hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocabulary", "positions")
    rows = [(key.replace("_", " "), f"{info[key]:,}") for key in keys]
    share = info["block_parameters"] / info["parameters"]
    if info.get("experts"):
        chosen = f"{info['experts']:,}, of which a token is sent to {info['experts_chosen']:,}"
        rows.insert(2, ("experts", chosen))
    rows += [
        ("parameters", f"{info['parameters']:,}"),
        ("block parameters, which can be pruned", f"{info['block_parameters']:,}"),
        ("their share", f"{share:.1%}"),
        ("embedding and head are tied", "yes" if info["tied"] else "no"),
        ("bytes of weights", format_bytes(info["weight_bytes"])),
    ]
    rows += [(f"of these in {name}", format_bytes(size)) for name, size in info["dtypes"].items()]
    if info.get("gguf"):
        rows += gguf_rows(info["gguf"])
    whole = info.get("multimodal")
    if whole is not None and whole["parts"]:
        rows += [
            (f"parameters of {', '.join(whole['parts'])}", f"{whole['parameters']:,}"),
            ("their bytes", format_bytes(whole["bytes"])),
        ]
    return rows
