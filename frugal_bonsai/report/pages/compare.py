"""The page of several results side by side: perplexity against sparsity, tokens and parameters.

In: names and reports of outputs. Out: a page as plain values. Reads no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from frugal_bonsai.report.card_parts import parent_name, source_name
from frugal_bonsai.report.pages.page import make_page, make_section
from frugal_bonsai.report.pages.prune import settings_text
from frugal_bonsai.report.words import NOTHING, duration, number
from frugal_bonsai.sizes import format_bytes

Values = Mapping[str, Any]
_DENSE = "dense"
_HEAD = (
    *("", "result", "command", "removed", "parameters", "bytes", "tokens", "time"),
    *("before", "after"),
)
# Perplexities that differ by more than this are drawn on a logarithmic scale.
_WIDE = 4.0


def compare_page(results: Sequence[tuple[str, Values, Values | None]]) -> dict[str, Any]:
    """Return the page of several results.

    Args:
        results: For each one its name, its report, and the report of the prune before it if it is
            an adaptation.
    """
    rows = [_row(at, *result) for at, result in enumerate(results, 1)]
    texts = {row["text"] for row in rows}
    key = "perplexity" if len(texts) > 1 or None in texts else "eval_perplexity"
    measured = {row["text"] if key == "eval_perplexity" else row["held_out"] for row in rows}
    notes = []
    if len(measured) > 1:
        notes.append(
            "Warning: these perplexities are of different texts or windows, so they do not "
            "compare; prune with the same --eval-text and --window."
        )
    if len({row["dense"] for row in rows}) > 1:
        notes.append("Note: these results do not come from the same dense model.")
    [measure] = measured if len(measured) == 1 else ["different texts"]
    return make_page(
        f"{len(rows)} results side by side",
        [
            make_section(
                "Perplexity",
                _HEAD,
                [_cells(row, key) for row in rows],
                text=f"Perplexity of {measure}. Numbers in the figure are rows of the table. "
                "Tokens are those through the model: of the search, or of the training.",
                figures=("perplexity",),
            ),
            make_section("Settings that differ", *_differences(rows)),
        ],
        version=str(results[0][1]["version"]),
        notes=notes,
        charts={"perplexity": _chart(rows, key)},
    )


def _row(at: int, name: str, summary: Values, pruned: Values | None) -> dict[str, Any]:
    adapted = "training" in summary
    first = pruned or summary
    calibration = summary.get("data") or summary["calibration"]
    source = calibration.get("source") or ", ".join(map(source_name, calibration["sources"]))
    text = summary.get("eval_text")
    return {
        "number": at,
        "name": name,
        "command": "adapt" if adapted else f"prune, {summary['method']}",
        "sparsity": None if first is summary and adapted else first["sparsity"],
        "tokens": summary["training"]["tokens"] if adapted else summary["forward_tokens"],
        "seconds": summary["seconds"],
        "before": summary["before"],
        "after": summary["after"],
        "dense": summary.get("provenance", {}).get("dense") or parent_name(summary["model"]),
        "text": None if not text else f"{source_name(text['name'])}, window {text['window']}",
        "held_out": f"{calibration.get('held_out_windows')} held-out windows of "
        f"{source_name(source)}, window {calibration.get('window')}",
        "settings": {"layout": summary["layout"], **summary["settings"]},
        "adapted": adapted,
    }


def _cells(row: Values, key: str) -> tuple[str, ...]:
    before, after = row["before"], row["after"]
    return (
        str(row["number"]),
        row["name"],
        row["command"],
        NOTHING if row["sparsity"] is None else f"{row['sparsity']:.1%}",
        f"{after['parameters']:,}",
        format_bytes(after["weight_bytes"]),
        f"{row['tokens']:,}",
        duration(row["seconds"]),
        number(before.get(key), 3),
        number(after.get(key), 3),
    )


def _differences(rows: Sequence[Values]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the settings that differ between results that have them."""
    names = dict.fromkeys(name for row in rows for name in row["settings"])
    found = []
    for name in names:
        values = [settings_text(row["settings"].get(name, NOTHING)) for row in rows]
        if len(set(values) - {NOTHING}) > 1:
            found.append((name, *values))
    return ("setting", *(str(row["number"]) for row in rows)), found


def _chart(rows: Sequence[Values], key: str) -> dict[str, Any] | None:
    """Return three panels that share their perplexities."""
    drawn = [row for row in rows if row["after"].get(key) is not None]
    if not drawn:
        return None
    sparsity: dict[str, list[list[Any]]] = {}
    tokens: dict[str, list[list[Any]]] = {}
    parameters: dict[str, list[list[Any]]] = {}
    for row in drawn:
        value, label, group = row["after"][key], str(row["number"]), row["command"]
        if row["sparsity"] is not None:
            sparsity.setdefault(group, []).append([100 * row["sparsity"], value, label])
        tokens.setdefault(group, []).append([row["tokens"] / 1e6, value, label])
        parameters.setdefault(group, []).append([row["after"]["parameters"] / 1e6, value, label])
    dense = {
        (row["before"]["parameters"], row["before"][key])
        for row in drawn
        if row["before"].get(key) is not None and not row["adapted"]
    }
    if dense:
        sparsity[_DENSE] = [[0.0, value] for _, value in sorted(dense)]
        parameters[_DENSE] = [[count / 1e6, value] for count, value in sorted(dense)]
    values = [row["after"][key] for row in drawn] + [value for _, value in dense]
    return {
        "kind": "panels",
        "caption": "Perplexity after, against the share of block weights removed, the tokens that "
        "were spent and the parameters that are left.",
        "panels": [
            {"x": "block weights removed (%)", "groups": sparsity},
            {"x": "tokens (millions)", "groups": tokens},
            {"x": "parameters (millions)", "groups": parameters},
        ],
        "references": [_DENSE],
        "logarithmic": max(values) > _WIDE * min(values),
        "y": "perplexity",
    }
