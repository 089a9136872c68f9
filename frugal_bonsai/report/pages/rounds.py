"""The rounds of a prune: perplexity, quality of the regression, candidates, relevance.

In: the values of ``pruning_report.json``. Out: sections and charts as plain values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from frugal_bonsai.report.pages.page import make_section
from frugal_bonsai.report.words import KIND_NAMES, duration, number

Values = Mapping[str, Any]
_CANDIDATES = {
    "cut": "the masks' own cut",
    "even": "equal FFN widths",
    "even_attention": "equal widths, attention too",
    "even_attention_x2": "equal widths, twice the attention",
    "even_attention_x3": "equal widths, three times the attention",
}
_ROUNDS_TEXT = (
    "R2 and tau compare the regression's predictions with losses that were held out from it (1 is "
    "best, 0 is no better than the mean). Certainty is 1 minus the share of the cut's predicted "
    "loss that full knowledge would save."
)


def round_charts(summary: Values) -> dict[str, Any]:
    """Return the charts of the rounds by name; None for those without numbers."""
    return {
        "rounds": _perplexity_chart(summary),
        "quality": _quality_chart(summary),
        "candidates": _candidates_chart(summary),
        "evidence": _evidence_chart(summary),
    }


def round_sections(summary: Values) -> list[dict[str, Any]]:
    """Return the sections of the rounds, of the candidates and of the evidence."""
    return [
        make_section("Rounds", *_rounds(summary), text=_ROUNDS_TEXT, figures=("rounds", "quality")),
        make_section(
            "Candidates",
            *_candidates(summary),
            text="Each round compares its cut with cuts of equal widths: the loss after "
            "reconstruction, on windows that none was fitted to. Another cut replaces the first of "
            "equal widths only where it is better beyond the error of the difference.",
            figures=("candidates",),
        ),
        make_section(
            "Importance and relevance",
            *_evidence(summary),
            text="Importance comes from the activations of one sweep; relevance is the loss that "
            "the regression on masked sub-models predicts for removing a layer's candidates. Where "
            "both agree, the points rise together. The last round that evaluated masks is shown.",
            figures=("evidence",),
        ),
    ]


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
    return ("round", "candidate", "loss"), rows


def _candidates_chart(summary: Values) -> dict[str, Any] | None:
    series: dict[str, list[list[float]]] = {}
    for row in summary["rounds"]:
        losses = row.get("trial", {})
        for name, loss in losses.items():
            above = loss - min(losses.values())
            series.setdefault(_CANDIDATES.get(name, name), []).append([row["round"], above])
    if not series or len(summary["rounds"]) < 2:
        return None
    return {
        "kind": "lines",
        "caption": "Loss of each candidate after reconstruction, above the lowest of its round.",
        "series": series,
        "whole": True,
        "x": "round",
        "y": "above the lowest loss",
    }


def _last_evidence(summary: Values) -> Values:
    """Return the evidence of the last round that evaluated masks; empty if none did."""
    found: list[Values] = [row["evidence"] for row in summary["rounds"] if row.get("evidence")]
    return found[-1] if found else {}


def _evidence(summary: Values) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    rows: list[tuple[str, ...]] = [
        (KIND_NAMES.get(kind, kind), str(layer), f"{importance:.4g}", f"{loss:.4g}")
        for kind, points in _last_evidence(summary).items()
        for layer, importance, loss in points
    ]
    return ("units", "layer", "importance", "relevance"), rows


def _evidence_chart(summary: Values) -> dict[str, Any] | None:
    groups = {
        KIND_NAMES.get(kind, kind): [
            [importance, loss, str(layer)] for layer, importance, loss in points if importance > 0
        ]
        for kind, points in _last_evidence(summary).items()
    }
    if not any(groups.values()):
        return None
    return {
        "kind": "scatter",
        "caption": "Candidates of each layer and kind; numbers are layers.",
        "groups": {name: points for name, points in groups.items() if points},
        "log_x": True,
        "x": "importance, summed over the candidates",
        "y": "predicted loss (nats)",
    }
