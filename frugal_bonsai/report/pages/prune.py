"""The page of a prune: what it removed, what it cost, what the result is worth.

In: the values of ``pruning_report.json``. Out: a page as plain values. Reads no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from frugal_bonsai.report.card_parts import parent_name, source_name, without_paths
from frugal_bonsai.report.pages.page import make_page, make_section
from frugal_bonsai.report.words import (
    KIND_NAMES,
    duration,
    number,
    peak_words,
    plural,
    ratio,
    size_rows,
    task_figure_rows,
)
from frugal_bonsai.sizes import GIB, MIB, format_bytes

Values = Mapping[str, Any]
_CANDIDATES = {
    "cut": "the masks' own cut",
    "even": "equal FFN widths",
    "even_attention": "equal widths, attention too",
    "even_attention_x2": "equal widths, twice the attention",
    "even_attention_x3": "equal widths, three times the attention",
}
# Bars of a memory plan; smaller items are summed.
_MOST_ITEMS = 6


def prune_page(summary: Values, commands: Sequence[str] = ()) -> dict[str, Any]:
    """Return the page of a prune.

    Args:
        summary: Values of a ``pruning_report.json``.
        commands: Lines that use the result.
    """
    charts = {
        "kept": kept_chart(summary),
        "rounds": _perplexity_chart(summary),
        "quality": _quality_chart(summary),
        "candidates": _candidates_chart(summary),
        "plan": plan_chart(summary["memory"]),
    }
    sections = [
        make_section("Before and after", ("", "before", "after", "ratio"), _before_after(summary)),
        kept_section(summary),
        make_section("Rounds", *_rounds(summary), text=_ROUNDS_TEXT, figures=("rounds", "quality")),
        make_section(
            "Candidates",
            *_candidates(summary),
            text="Each round compares its cut with cuts of equal widths after reconstruction, on "
            "windows that none was fitted to. Another cut replaces the first of equal widths only "
            "where it is better beyond the error of the difference.",
            figures=("candidates",),
        ),
        make_section(
            "Memory", ("item", "where", "size"), plan_rows(summary["memory"]), figures=("plan",)
        ),
        make_section("Run", ("", ""), _run(summary)),
        steps_section(summary),
        settings_section(summary),
    ]
    return make_page(
        f"{parent_name(summary['model'])}, {summary['sparsity']:.1%} removed",
        sections,
        version=summary["version"],
        lead=_lead(summary),
        tiles=_tiles(summary),
        notes=page_notes(summary),
        commands=commands,
        charts=charts,
    )


_ROUNDS_TEXT = (
    "R2 and tau compare the regression's predictions with losses that were held out from it (1 is "
    "best, 0 is no better than the mean). Certainty is the share of the predicted loss that the "
    "chosen cut has of the best cuts of the posterior."
)


def page_notes(summary: Values) -> list[str]:
    """Return the warnings and the notes of a command."""
    return [
        *(f"Warning: {without_paths(text)}." for text in summary.get("warnings", ())),
        *(f"Note: {without_paths(text)}." for text in summary["notes"]),
    ]


def _lead(summary: Values) -> Iterator[str]:
    shares = summary["layer_sparsity"]
    order = sorted(range(len(shares)), key=lambda layer: -shares[layer])
    if max(shares) - min(shares) < 0.01:
        yield f"Every layer lost the same share of its weights ({max(shares):.1%})."
        return
    most = ", ".join(f"layer {layer} ({shares[layer]:.0%})" for layer in order[:3])
    least = f"layer {order[-1]} ({shares[order[-1]]:.0%})"
    yield f"The layers that lost most of their weights: {most}. The least: {least}."


def _tiles(summary: Values) -> Iterator[tuple[str, str]]:
    before, after = summary["before"], summary["after"]
    yield "block weights removed", f"{summary['sparsity']:.1%}"
    yield "parameters left", f"{after['parameters'] / before['parameters']:.1%}"
    key = "perplexity" if before.get("eval_perplexity") is None else "eval_perplexity"
    if before.get(key) is not None and after.get(key) is not None:
        name = "perplexity" if key == "perplexity" else "perplexity, eval text"
        yield name, f"{number(before[key])} → {number(after[key])}"
    yield "time", duration(summary["seconds"])
    yield "forward tokens", f"{summary['forward_tokens']:,}"
    for where, name in (("host", "peak memory"), ("gpu", "peak GPU memory")):
        peak = summary["memory"].get(f"{where}_peak_bytes")
        if peak is not None:
            yield name, format_bytes(peak)


def _before_after(summary: Values) -> list[Any]:
    before, after = summary["before"], summary["after"]
    rows: list[Any] = list(size_rows(before, after, "of weights"))
    for key, name in (("perplexity", "perplexity"), ("eval_perplexity", "perplexity, eval text")):
        dense, pruned = before.get(key), after.get(key)
        if dense is not None and pruned is not None:
            rows.append((name, number(dense, 3), number(pruned, 3), ratio(dense, pruned)))
    return [*rows, *task_figure_rows(before, after)]


def _run(summary: Values) -> Iterator[tuple[str, str]]:
    calibration, memory = summary["calibration"], summary["memory"]
    yield "made by", f"frugal-bonsai {summary['version']}"
    yield "method", summary["method"]
    yield "layout", summary["layout"]
    yield "calibration text", source_name(calibration["source"])
    if "windows" in calibration:
        windows = plural(calibration["windows"], "window")
        yield "calibration windows", f"{windows} of {calibration['window']} tokens"
    yield "forward tokens", f"{summary['forward_tokens']:,}"
    yield "time", duration(summary["seconds"])
    for where, name in (("host", "host memory"), ("gpu", "GPU memory")):
        if memory.get(f"{where}_peak_bytes") is not None:
            yield name, peak_words(memory, where)
    verify = summary.get("verify")
    if verify:
        found = f"{verify['max_relative_difference']:.1e}"
        yield "verified", f"logits equal the masked parent's within {found} of the largest"


# -- kept units ---------------------------------------------------------------------------------
def kept_section(summary: Values) -> dict[str, Any]:
    """Return the section of kept units by layer and kind."""
    kept, dense = summary["kept"], summary["dense"]
    head = ["layer", *(KIND_NAMES.get(kind, kind) for kind in kept), "removed"]
    rows = [
        [str(layer), *(f"{kept[k][layer]:,} of {dense[k][layer]:,}" for k in kept), f"{share:.1%}"]
        for layer, share in enumerate(summary["layer_sparsity"])
    ]
    return make_section("Kept units", head, rows, figures=("kept",))


def kept_chart(summary: Values) -> dict[str, Any]:
    """Return the heat map of the shares of units that are kept."""
    kept, dense = summary["kept"], summary["dense"]
    layers = len(summary["layer_sparsity"])
    return {
        "kind": "heat",
        "caption": "Share of the units that is kept, by layer and kind.",
        "rows": [KIND_NAMES.get(kind, kind) for kind in kept],
        "columns": [str(layer) for layer in range(layers)],
        "values": [
            [k / d if d else 0.0 for k, d in zip(kept[kind], dense[kind], strict=True)]
            for kind in kept
        ],
        "x": "layer",
    }


# -- rounds -------------------------------------------------------------------------------------
def _rounds(summary: Values) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    head = ("round", "removed", "search perplexity", "tokens so far", "time", "masks", "R2")
    rows: list[tuple[str, ...]] = [
        (
            str(row["round"]),
            f"{row['sparsity']:.1%}",
            number(row.get("perplexity")),
            f"{row['forward_tokens']:,}",
            duration(row["seconds"]),
            f"{row['observations']:,}",
            number(row["r2"]),
            number(row["tau"]),
            number(row["certainty"]),
            row.get("stopped") or "",
        )
        for row in summary["rounds"]
    ]
    return (*head, "tau", "certainty", "sampling ended"), rows


def _perplexity_chart(summary: Values) -> dict[str, Any] | None:
    found = [row for row in summary["rounds"] if row.get("perplexity") is not None]
    if len(found) < 2:
        return None
    return {
        "kind": "lines",
        "caption": "Perplexity of the search's own windows after each round.",
        "series": {"search": [[100 * row["sparsity"], row["perplexity"]] for row in found]},
        "x": "block weights removed (%)",
        "y": "search perplexity",
    }


def _quality_chart(summary: Values) -> dict[str, Any] | None:
    names = {"r2": "R2", "tau": "Kendall's tau", "certainty": "certainty"}
    series = {
        name: [[row["round"], row[key]] for row in summary["rounds"] if row.get(key) is not None]
        for key, name in names.items()
    }
    series = {name: points for name, points in series.items() if points}
    if not series or len(summary["rounds"]) < 2:
        return None
    return {
        "kind": "lines",
        "caption": "Quality of the regression of masks on losses, and certainty of the cut.",
        "series": series,
        "whole": True,
        "most": 1.05,
        "x": "round",
        "y": "",
    }


def _candidates(summary: Values) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    rows: list[tuple[str, ...]] = [
        (str(row["round"]), _CANDIDATES.get(name, name), number(loss, 4))
        for row in summary["rounds"]
        for name, loss in row.get("trial", {}).items()
    ]
    return ("round", "candidate", "loss after reconstruction"), rows


def _candidates_chart(summary: Values) -> dict[str, Any] | None:
    series: dict[str, list[list[float]]] = {}
    for row in summary["rounds"]:
        for name, loss in row.get("trial", {}).items():
            series.setdefault(_CANDIDATES.get(name, name), []).append([row["round"], loss])
    if not series or len(summary["rounds"]) < 2:
        return None
    return {
        "kind": "lines",
        "caption": "Loss of each candidate after reconstruction; lower is better.",
        "series": series,
        "whole": True,
        "x": "round",
        "y": "mean loss",
    }


# -- memory -------------------------------------------------------------------------------------
def plan_rows(memory: Values) -> list[tuple[str, str, str]]:
    """Return the items of a memory plan, the largest first."""
    items = sorted(memory["plan"], key=lambda item: -item["size_bytes"])
    return [(item["name"], item["where"], format_bytes(item["size_bytes"])) for item in items]


def plan_chart(memory: Values) -> dict[str, Any] | None:
    """Return the plan's items in memory beside the measured peak and the cap."""
    items = [item for item in memory["plan"] if item["where"] != "disk"]
    if not items:
        return None
    items = sorted(items, key=lambda item: -item["size_bytes"])
    scale, unit = (GIB, "GiB") if items[0]["size_bytes"] >= GIB else (MIB, "MiB")
    shown = items[:12]
    return {
        "kind": "bars",
        "caption": "The largest items of the memory plan. They are not all held at once.",
        "labels": [f"{item['name']} ({item['where']})" for item in shown],
        "parts": {"planned": [item["size_bytes"] / scale for item in shown]},
        "x": unit,
    }


# -- settings -----------------------------------------------------------------------------------
def settings_section(summary: Values) -> dict[str, Any]:
    """Return the section of settings."""
    rows = [(name, str(value)) for name, value in summary["settings"].items()]
    return make_section("Settings", ("setting", "value"), rows)


def steps_section(summary: Values) -> dict[str, Any]:
    """Return the section of rewrites since the dense model."""
    steps = summary.get("provenance", {}).get("steps", ())
    rows = [
        (step["command"], parent_name(step["model"]), *map(_from_to, _pairs(step)))
        for step in steps
    ]
    head = ("command", "from", "block parameters", "perplexity")
    return make_section("Provenance", head, rows)


def _pairs(step: Values) -> list[Any]:
    return [step.get(key) for key in ("block_parameters", "perplexity")]


def _from_to(pair: Sequence[float | None] | None) -> str:
    if not pair or pair[0] is None or pair[1] is None:
        return "-"
    return " → ".join(f"{n:,}" if isinstance(n, int) else number(n, 3) for n in pair)
