"""A page: title, key figures, notes, sections of tables and charts, as Markdown or HTML.

In: plain values. Out: text. It has the names of folders and files, no local paths. Reads no file
but its template.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from frugal_bonsai.report.card_parts import markdown_table

Values = Mapping[str, Any]
# Stands in every page, so that `report` replaces its own files and no others.
GENERATOR = "frugal-bonsai report"


def make_section(
    title: str,
    head: Sequence[str] = (),
    rows: Iterable[Sequence[str]] = (),
    *,
    text: str = "",
    figures: Sequence[str] = (),
) -> dict[str, Any]:
    """Return a section.

    Args:
        title: Its title.
        head: Names of the table's columns.
        rows: Rows of the table, all texts.
        text: A paragraph above the table.
        figures: Names of the charts that stand in it.
    """
    return {
        "title": title,
        "text": text,
        "figures": list(figures),
        "head": list(head),
        "rows": [list(row) for row in rows],
    }


def make_page(
    title: str,
    sections: Sequence[Values],
    *,
    version: str,
    lead: Iterable[str] = (),
    tiles: Iterable[tuple[str, str]] = (),
    notes: Sequence[str] = (),
    commands: Sequence[str] = (),
    charts: Mapping[str, Values | None] | None = None,
) -> dict[str, Any]:
    """Return a page as plain values.

    Args:
        title: Its title.
        sections: Results of :func:`make_section`. Empty ones are left out.
        version: Version of frugal-bonsai that measured.
        lead: Sentences under the title.
        tiles: Key figures: names and values.
        notes: Warnings and notes.
        commands: Lines for a shell that use the result.
        charts: Numbers of the figures by name; figures.py draws them.
    """
    drawn = {name: chart for name, chart in (charts or {}).items() if chart}
    kept = [
        {**section, "figures": [name for name in section["figures"] if name in drawn]}
        for section in sections
    ]
    return {
        "generator": GENERATOR,
        "title": title,
        "version": version,
        "lead": list(lead),
        "tiles": [list(tile) for tile in tiles],
        "notes": list(notes),
        "commands": list(commands),
        "charts": drawn,
        "sections": [section for section in kept if section["rows"] or section["figures"]],
    }


def render_markdown(page: Values) -> str:
    """Return a page as Markdown: all tables, no figures."""
    parts = [f"<!-- {GENERATOR} -->\n# {page['title']}\n"]
    parts += [f"{text}\n" for text in (*page["lead"], *page["notes"])]
    for section in page["sections"]:
        if not section["rows"]:
            continue
        parts += [
            f"## {section['title']}\n",
            *([f"{section['text']}\n"] if section["text"] else []),
        ]
        parts.append(markdown_table(section["head"], section["rows"]))
    if page["commands"]:
        parts += ["## Use it\n", "```bash", *page["commands"], "```", ""]
    return "\n".join(parts)


def render_html(page: Values, figures: Mapping[str, str]) -> str:
    """Return a page as HTML that refers to no other file.

    Args:
        page: Result of :func:`make_page`.
        figures: SVG elements by the name of the figure; they are not escaped.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("frugal_bonsai.report", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html.j2").render(page=page, figures=figures)
