"""The model card of a pruned model: its parent, its settings, its figures.

In: the summary of a prune as plain values. Out: Markdown with a YAML head. It has the names of
folders and files, no local paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from frugal_bonsai.report.card_parts import (
    card_head,
    how_to_load,
    layout_notes,
    markdown_table,
    note_lines,
    parent_name,
    provenance_lines,
    source_name,
    warning_lines,
)
from frugal_bonsai.report.sampling_words import SCORES, covered, mask_spending
from frugal_bonsai.report.words import (
    KIND_NAMES,
    duration,
    latency_words,
    number,
    plural,
    ratio,
    size_rows,
    task_figure_rows,
)
from frugal_bonsai.sizes import format_bytes

Values = Mapping[str, Any]
_CITATION = """The method is Bonsai's (arXiv 2402.05406); the settings above say where it differs:

```bibtex
@misc{dery2024everybody,
  title = {Everybody Prune Now: Structured Pruning of LLMs with only Forward Passes},
  author = {Lucio Dery and Steven Kolawole and Jean-Fran{\\c{c}}ois Kagy and Virginia Smith and
            Graham Neubig and Ameet Talwalkar},
  year = {2024},
  eprint = {2402.05406},
  archivePrefix = {arXiv},
}
```
"""


def model_card(summary: Values, *, dense_card_name: str | None = None) -> str:
    """Return the text of the pruned model's README.md.

    Args:
        summary: Result of :func:`frugal_bonsai.prune`; "out" and "load" are not used.
        dense_card_name: Name of the dense parent, such as the hub id of a local copy. None takes
            the summary's "model".

    Returns:
        Markdown.
    """
    model = summary["model"] if dense_card_name is None else dense_card_name
    parent = parent_name(model)
    parts = [
        card_head(model, summary),
        f"# {parent}, {summary['sparsity']:.1%} of its block weights removed\n",
        f"Made from `{parent}` ({summary['family']}) with frugal-bonsai {summary['version']}: "
        f"whole KV groups and FFN channels are gone, found with forward passes only. "
        f"{summary['layout'].capitalize()} layout. The parent's licence applies.\n",
        *warning_lines(summary),
        *note_lines(summary),
        "## Figures\n",
        _figures(summary),
        *(f"{note}\n" for note in layout_notes(summary)),
        "## How to load it\n",
        how_to_load(summary),
        "## How it was made\n",
        _how(summary),
        "## Kept units\n",
        _kept(summary),
        "## Rounds\n",
        _rounds(summary),
        *provenance_lines(summary),
        "## Source of the method\n",
        _CITATION,
        "## Licence\n",
        f"The parent's licence applies: these are weights of `{parent}`.\n",
    ]
    return "\n".join(parts)


def _figures(summary: Values) -> str:
    before, after, calibration = summary["before"], summary["after"], summary["calibration"]
    text = summary["eval_text"]
    rows = size_rows(before, after, "of weights")
    names = {
        "perplexity": f"perplexity, held-out calibration windows, window {calibration['window']}"
    }
    if text is not None:
        names["eval_perplexity"] = (
            f"perplexity, {source_name(text['name'])}, window {text['window']}"
        )
    for key, name in names.items():
        dense, pruned = before[key], after[key]
        rows.append((name, number(dense, 3), number(pruned, 3), ratio(dense, pruned)))
    rows += task_figure_rows(before, after)
    lines = [
        markdown_table(("", "before", "after", "ratio"), rows),
        f"Perplexity is exp(mean NLL of tokens 2..S) over windows of S tokens (S is the window "
        f"length beside each figure) without overlap and without special tokens: "
        f"{plural(calibration['held_out_windows'], 'window')} of calibration text that the search "
        f"did not see" + _and_text(text) + ".\n",
        f"Verified: the rewritten model's logits equal the masked parent's within "
        f"{summary['verify']['max_relative_difference']:.1e} of the largest logit "
        f"({plural(summary['verify']['windows'], 'window')}).\n",
    ]
    return "\n".join(lines)


def _and_text(text: Values | None) -> str:
    if text is None:
        return ""
    return f", {plural(text['windows'], 'window')} of {source_name(text['name'])}"


def _how(summary: Values) -> str:
    calibration, memory, settings = (
        summary["calibration"],
        summary["memory"],
        summary["settings"],
    )
    peak = f"{_peak(memory, 'host')} of host memory"
    if memory["gpu_peak_bytes"] is not None:
        peak += f" and {_peak(memory, 'gpu')} of GPU memory"
    batch = plural(memory["final_micro_batch"], "window")
    if memory["final_micro_batch"] < memory["planned_micro_batch"]:
        batch += f" (planned {memory['planned_micro_batch']}; memory ran out)"
    latency = summary["latency"]
    speed = [("predicted speed-up", latency_words(latency))] if latency else []
    facts = (
        ("method", f"`{summary['method']}`"),
        ("calibration text", source_name(calibration["source"])),
        ("window length", f"{calibration['window']} tokens"),
        ("calibration windows", str(calibration["windows"])),
        (
            "windows that the dense model wrote for the last recovery",
            str(calibration["written_windows"]),
        ),
        ("seed", str(settings["seed"])),
        ("layout", f"{summary['layout']}, FFN channels in multiples of {summary['tile']}"),
        ("forward tokens", f"{summary['forward_tokens']:,}"),
        ("time", duration(summary["seconds"])),
        ("peak", peak),
        *speed,
        ("micro-batch", batch),
    )
    chosen = ((f"`{name}`", f"`{value}`") for name, value in settings.items())
    return "\n".join(
        (markdown_table(("", ""), facts), markdown_table(("setting", "value"), chosen))
    )


def _peak(memory: Values, where: str) -> str:
    predicted = format_bytes(memory[f"{where}_predicted_bytes"])
    return f"{format_bytes(memory[f'{where}_peak_bytes'])} (predicted {predicted})"


def _kept(summary: Values) -> str:
    kinds = list(summary["kept"])
    rows = (
        (
            str(layer),
            *(f"{summary['kept'][k][layer]:,} of {summary['dense'][k][layer]:,}" for k in kinds),
            f"{share:.1%}",
        )
        for layer, share in enumerate(summary["layer_sparsity"])
    )
    return markdown_table(
        ("layer", *(KIND_NAMES.get(kind, kind) for kind in kinds), "removed"), rows
    )


def _rounds(summary: Values) -> str:
    head = (
        "round",
        "removed",
        "masks seen",
        "R2",
        "tau",
        "certainty",
        "sampling ended with",
        "penalty",
        f"search perplexity, window {summary['calibration']['window']}",
        "forward tokens so far",
    )
    rows = (
        (
            str(row["round"]),
            f"{row['sparsity']:.1%}",
            f"{row['observations']:,}",
            number(row["r2"]),
            number(row["tau"]),
            number(row["certainty"]),
            row["stopped"] or "-",
            row["penalty"] or "-",
            number(row.get("perplexity")),
            f"{row['forward_tokens']:,}",
        )
        for row in summary["rounds"]
    )
    explained = "The search perplexity is measured on the calibration windows, so it is too low.\n"
    if any(row["observations"] for row in summary["rounds"]):
        said = (SCORES, covered(summary["rounds"]), mask_spending(summary["rounds"]))
        explained = "\n\n".join((*(f"{line}." for line in said if line), explained))
    return "\n".join((markdown_table(head, rows), explained))
