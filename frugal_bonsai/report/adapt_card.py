"""The model card of an adapted model.

In: the summary of ``adapt`` as plain values. Out: Markdown with a YAML head. The card has no local
paths, only the names of folders and files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from frugal_bonsai.report.card_parts import (
    card_head,
    how_to_load,
    is_hub_id,
    markdown_table,
    note_lines,
    parent_name,
    provenance_lines,
    source_name,
    warning_lines,
)
from frugal_bonsai.report.words import duration, number, plural, ratio, size_rows
from frugal_bonsai.sizes import format_bytes

Values = Mapping[str, Any]
TERMS = {
    "lm": "language modelling",
    "kl": "language modelling and the divergence from the teacher",
    "kl+hidden": "language modelling, the divergence from the teacher and its hidden states",
}


def adapt_card(summary: Values) -> str:
    """Return the text of the adapted model's README.md.

    Args:
        summary: what :func:`frugal_bonsai.adapt` returns; "out" and "load" are not used.
    """
    pruned, teacher = parent_name(summary["model"]), summary["teacher"]
    base = teacher if teacher is not None and is_hub_id(teacher) else summary["model"]
    taught = "" if teacher is None else f", with `{parent_name(teacher)}` as its teacher"
    parts = [
        card_head(base, summary, "adapted"),
        f"# {pruned}, adapted after pruning\n",
        f"Trained from `{pruned}` ({summary['family']}) with frugal-bonsai {summary['version']}"
        f"{taught}: {TERMS[summary['settings']['loss']]}. Shapes and layout are those of the "
        f"pruned model ({summary['layout']}). The licence of the model that was pruned applies.\n",
        *warning_lines(summary),
        *note_lines(summary),
        "## Figures\n",
        markdown_table(("", "pruned", "adapted", "ratio"), figure_rows(summary, "of weights")),
        _explained(summary),
        "## How to load it\n",
        how_to_load(summary),
        "## How it was made\n",
        markdown_table(("", ""), list(_facts(summary))),
        markdown_table(
            ("setting", "value"),
            [(f"`{name}`", f"`{value}`") for name, value in summary["settings"].items()],
        ),
        "## Training\n",
        markdown_table(
            ("step", "loss", "held-out perplexity", "divergence"),
            [
                (str(row["step"]), number(row["loss"], 3), number(row["perplexity"], 3), _kl(row))
                for row in summary["training"]["history"]
            ],
        ),
        *provenance_lines(summary),
        "`pruning_report.json`, if there is one, says how the model was pruned.\n",
    ]
    return "\n".join(parts)


def figure_rows(summary: Values, where: str) -> list[tuple[str, str, str, str]]:
    """Return rows of sizes and perplexities of the pruned and of the adapted model."""
    before, after, window = summary["before"], summary["after"], summary["data"]["window"]
    rows = size_rows(before, after, where)
    names = {"perplexity": f"perplexity, held-out data, window {window}"}
    if summary["eval_text"] is not None:
        names["eval_perplexity"] = (
            f"perplexity, {source_name(summary['eval_text']['name'])}, window {window}"
        )
    if before["kl"] is not None:
        names["kl"] = "divergence from the teacher, nats a token"
    for key, name in names.items():
        pair = (number(before[key], 3), number(after[key], 3))
        rows.append((name, *pair, ratio(before[key], after[key])))
    return rows


def bounds_text(summary: Values) -> str:
    """Explain the bounds of the divergence; empty without a teacher's cache."""
    cache, after = summary["cache"], summary["after"]
    if cache is None:
        return ""
    return (
        f"the divergence is a lower bound, from the teacher's {cache['top']} most likely next "
        f"tokens, which leave out {cache['rest_mass']:.2%} of its probability; the upper bound for "
        f"the adapted model is {number(after['kl_upper'], 3)}"
    )


def _explained(summary: Values) -> str:
    bounds = bounds_text(summary)
    verify = summary["verify"]
    return (
        f"Perplexity is exp(mean NLL of tokens 2..S) over windows of S tokens, without overlap "
        f"and without special tokens.{f' {bounds[0].upper()}{bounds[1:]}.' if bounds else ''} "
        f"Verified in fp32: the file's logits equal the merged weights' within "
        f"{verify['max_relative_difference']:.1e} of the largest logit; the merged weights' logits "
        f"before rounding equal those of the trained adapters or projections within "
        f"{verify['student_difference']:.1e} ({plural(verify['windows'], 'window')}).\n"
    )


def _facts(summary: Values) -> Iterator[tuple[str, str]]:
    data, training, memory = summary["data"], summary["training"], summary["memory"]
    yield "data", ", ".join(source_name(name) for name in data["sources"])
    yield "window length", f"{data['window']} tokens"
    yield "windows", f"{data['windows']:,}, and {data['held_out_windows']} held out"
    yield "frozen weights", training["weights"]
    if training["rank"]:
        yield "rank", str(training["rank"])
    yield "optimiser", training["optimiser"]
    yield "steps", f"{training['steps']:,} (the best one is {training['best_step']:,})"
    yield "tokens", f"{training['tokens']:,}"
    yield "time", f"{duration(training['seconds'])} of {duration(summary['seconds'])} in all"
    if training["stopped"]:
        yield "stopped", training["stopped"]
    peak = f"{format_bytes(memory['host_peak_bytes'])} of host memory (predicted "
    yield "peak", f"{peak}{format_bytes(memory['host_predicted_bytes'])})"
    if memory["gpu_peak_bytes"] is not None:
        gpu = format_bytes(memory["gpu_peak_bytes"])
        yield "GPU peak", f"{gpu} (predicted {format_bytes(memory['gpu_predicted_bytes'])})"
    if summary["cache"] is not None:
        yield "teacher's cache", format_bytes(summary["cache"]["size_bytes"])


def _kl(row: Values) -> str:
    if row["kl"] is None:
        return "-"
    return f"{number(row['kl'], 3)} to {number(row['kl_upper'], 3)}"
