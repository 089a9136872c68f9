"""The page of a model that ``shrink`` wrote: the units that are kept, the sizes before and after.

In: the values of the ``pruning_report.json`` of ``shrink``. Out: a page as plain values. Reads no
file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from frugal_bonsai.report.card_parts import parent_name
from frugal_bonsai.report.pages.page import make_page, make_section
from frugal_bonsai.report.pages.prune import (
    kept_chart,
    kept_section,
    most_pruned,
    page_notes,
    steps_section,
)
from frugal_bonsai.report.words import duration, size_rows
from frugal_bonsai.sizes import format_bytes

Values = Mapping[str, Any]


def shrink_page(summary: Values, commands: Sequence[str] = ()) -> dict[str, Any]:
    """Return the page of a shrink.

    Args:
        summary: Values of its ``pruning_report.json``.
        commands: Lines that use the result.
    """
    before, after = summary["before"], summary["after"]
    sizes = size_rows(before, after, "of weights")
    return make_page(
        f"{parent_name(summary['model'])}, {summary['sparsity']:.1%} removed by a mask",
        [
            make_section("Before and after", ("", "before", "after", "ratio"), sizes),
            kept_section(summary),
            make_section("Run", ("", ""), _run(summary)),
            steps_section(summary),
        ],
        version=summary["version"],
        lead=[most_pruned(summary), "No text was read, so no perplexity was measured."],
        tiles=[
            ("weights removed", f"{summary['sparsity']:.1%}"),
            ("parameters left", f"{after['parameters'] / before['parameters']:.1%}"),
            (
                "size",
                f"{format_bytes(before['weight_bytes'])} → {format_bytes(after['weight_bytes'])}",
            ),
        ],
        notes=page_notes(summary),
        commands=commands,
        charts={"kept": kept_chart(summary)},
    )


def _run(summary: Values) -> Iterator[tuple[str, str]]:
    yield "made by", f"frugal-bonsai {summary['version']}"
    yield "mask", summary["mask"]
    yield "layout", summary["layout"]
    yield "time", duration(summary["seconds"])
