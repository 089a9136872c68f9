"""The model card of a model that ``shrink`` wrote.

In: the summary as plain values. Out: Markdown with a YAML head, without local paths.
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
    warning_lines,
)
from frugal_bonsai.report.words import KIND_NAMES, size_rows, span


def mask_card(summary: Mapping[str, Any]) -> str:
    """Return the text of README.md.

    Args:
        summary: Result of :func:`frugal_bonsai.shrink`; "out" and "load" are not used.
    """
    parent = parent_name(summary["model"])
    kept = [
        (KIND_NAMES.get(kind, kind), span(summary["dense"][kind]), span(counts))
        for kind, counts in summary["kept"].items()
    ]
    parts = [
        card_head(summary["model"], summary),
        f"# {parent}, {summary['sparsity']:.1%} of its block weights removed\n",
        f"Made from `{parent}` ({summary['family']}) and a keep mask with frugal-bonsai "
        f"{summary['version']}: the units that `pruning_mask.json` lists are gone. "
        f"{summary['layout'].capitalize()} layout. The parent's licence applies: these are "
        f"weights of `{parent}`.\n",
        *note_lines(summary),
        *warning_lines(summary),
        "## Figures\n",
        markdown_table(
            ("", "before", "after", "ratio"),
            size_rows(summary["before"], summary["after"], "of weights"),
        ),
        markdown_table(("units a layer", "before", "after"), kept),
        *(f"{note}\n" for note in layout_notes(summary)),
        "Kept weights are bit for bit the parent's. No perplexity was measured.\n",
        "## How to load it\n",
        how_to_load(summary),
        *provenance_lines(summary),
    ]
    return "\n".join(parts)
