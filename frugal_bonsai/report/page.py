"""The page of a prune: what it removed, what it cost, what the result is worth.

In: the values of ``pruning_report.json``. Out: sections of tables as plain values, and these as
Markdown or HTML. It has the names of folders and files, no local paths. Reads no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from frugal_bonsai.report.card_parts import (
    markdown_table,
    parent_name,
    source_name,
    without_paths,
)
from frugal_bonsai.report.words import (
    KIND_NAMES,
    duration,
    number,
    peak_words,
    size_rows,
    task_figure_rows,
)
from frugal_bonsai.sizes import format_bytes

Values = Mapping[str, Any]


def page_context(summary: Values, commands: Sequence[str] = ()) -> dict[str, Any]:
    """Return what the page is made of.

    Args:
        summary: Values of a ``pruning_report.json``.
        commands: Lines that use the result.

    Returns:
        ``title``, ``version``, ``notes``, ``commands``, ``charts`` (numbers of the figures) and
        ``sections``; a section has ``title``, ``head``, ``rows`` (texts)
        and ``figure`` (the name of its figure, or None). Sections without rows are left out.
    """
    sections = [
        _section("Summary", ("", "before", "after", "ratio"), _before_after(summary)),
        _section("Run", ("", ""), _run(summary)),
        _section("Kept units", *_kept(summary), figure="kept"),
        _section("Rounds", *_rounds(summary), figure="rounds"),
        _section("Memory plan", ("item", "where", "size"), _memory(summary), figure="memory"),
        _section("Rewrites", ("command", "from"), _steps(summary)),
        _section("Settings", ("setting", "value"), _settings(summary)),
    ]
    return {
        "title": f"{parent_name(summary['model'])}, {summary['sparsity']:.1%} removed",
        "version": summary["version"],
        "notes": [
            *(f"Warning: {without_paths(text)}." for text in summary.get("warnings", ())),
            *(f"Note: {without_paths(text)}." for text in summary["notes"]),
        ],
        "commands": commands,
        "charts": _charts(summary),
        "sections": [section for section in sections if section["rows"]],
    }


def render_markdown(context: Values) -> str:
    """Return the page as Markdown tables."""
    parts = [f"# {context['title']}\n", *(f"{note}\n" for note in context["notes"])]
    for section in context["sections"]:
        parts += [f"## {section['title']}\n", markdown_table(section["head"], section["rows"])]
    if context["commands"]:
        parts += ["## Use it\n", "```bash", *context["commands"], "```", ""]
    return "\n".join(parts)


def render_html(context: Values, figures: Mapping[str, str]) -> str:
    """Return the page as HTML that refers to no other file.

    Args:
        context: Result of :func:`page_context`.
        figures: SVG elements by the name of the figure; they are not escaped.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("frugal_bonsai.report", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html.j2").render(page=context, figures=figures)


def _section(title: str, head: Any, rows: Any, figure: str | None = None) -> dict[str, Any]:
    return {
        "title": title,
        "head": list(head),
        "rows": [list(row) for row in rows],
        "figure": figure,
    }


def _before_after(summary: Values) -> list[Any]:
    before, after = summary["before"], summary["after"]
    rows: list[Any] = list(size_rows(before, after, "of weights"))
    for key, name in (("perplexity", "perplexity"), ("eval_perplexity", "perplexity, eval text")):
        dense, pruned = before.get(key), after.get(key)
        if dense is not None and pruned is not None:
            rows.append((name, number(dense, 3), number(pruned, 3), f"{pruned / dense:.2f}"))
    return [*rows, *task_figure_rows(before, after)]


def _run(summary: Values) -> list[tuple[str, str]]:
    calibration, memory = summary["calibration"], summary["memory"]
    rows = [
        ("method", summary["method"]),
        ("layout", summary["layout"]),
        ("block weights removed", f"{summary['sparsity']:.1%}"),
        ("calibration text", source_name(calibration["source"])),
        ("forward tokens", f"{summary['forward_tokens']:,}"),
        ("time", duration(summary["seconds"])),
    ]
    for where in ("host", "gpu"):
        if memory.get(f"{where}_peak_bytes") is not None:
            rows.append((f"{where} memory", peak_words(memory, where)))
    return rows


def _kept(summary: Values) -> tuple[list[str], list[list[str]]]:
    kept, dense = summary["kept"], summary["dense"]
    head = ["layer", *(KIND_NAMES.get(kind, kind) for kind in kept), "removed"]
    rows = [
        [str(layer), *(f"{kept[k][layer]:,} of {dense[k][layer]:,}" for k in kept), f"{share:.1%}"]
        for layer, share in enumerate(summary["layer_sparsity"])
    ]
    return head, rows


def _rounds(summary: Values) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    head = ("round", "removed", "search perplexity", "tokens so far", "time", "masks seen")
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
        )
        for row in summary["rounds"]
    ]
    return (*head, "R2", "tau", "certainty"), rows


def _memory(summary: Values) -> list[tuple[str, str, str]]:
    items = sorted(summary["memory"]["plan"], key=lambda item: -item["size_bytes"])
    return [(item["name"], item["where"], format_bytes(item["size_bytes"])) for item in items]


def _settings(summary: Values) -> list[tuple[str, str]]:
    return [(name, str(value)) for name, value in summary["settings"].items()]


def _steps(summary: Values) -> list[tuple[str, str]]:
    steps = summary.get("provenance", {}).get("steps", ())
    return [(step["command"], parent_name(step["model"])) for step in steps]


def _charts(summary: Values) -> dict[str, Any]:
    """Return the numbers of the figures: shares kept, rounds, bytes of the plan."""
    kept, dense = summary["kept"], summary["dense"]
    shares = {
        KIND_NAMES.get(kind, kind): [
            k / d if d else 0.0 for k, d in zip(kept[kind], dense[kind], strict=True)
        ]
        for kind in kept
    }
    rounds = [row for row in summary["rounds"] if row.get("perplexity") is not None]
    return {
        "kept": shares,
        "rounds": [(row["sparsity"], row["perplexity"]) for row in rounds],
        "memory": [(i["name"], i["size_bytes"]) for i in summary["memory"]["plan"]],
    }
