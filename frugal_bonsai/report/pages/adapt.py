"""The page of an adaptation: before and after, the training, memory, settings.

In: the values of ``adaptation_report.json``, and of the pruned model's ``pruning_report.json`` if
there is one. Out: a page as plain values. Reads no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from frugal_bonsai.report.adapt_card import bounds_text, figure_rows
from frugal_bonsai.report.card_parts import parent_name, source_name
from frugal_bonsai.report.pages.page import make_page, make_section
from frugal_bonsai.report.pages.prune import (
    kept_chart,
    kept_section,
    page_notes,
    settings_section,
    steps_section,
)
from frugal_bonsai.report.pages.timeline import (
    Events,
    memory_charts,
    slowest_phase,
    time_chart,
    time_section,
)
from frugal_bonsai.report.words import duration, number, peak_words, plural
from frugal_bonsai.sizes import format_bytes

Values = Mapping[str, Any]


def adapt_page(
    summary: Values, pruned: Values | None, commands: Sequence[str] = (), events: Events = ()
) -> dict[str, Any]:
    """Return the page of an adaptation.

    Args:
        summary: Values of an ``adaptation_report.json``.
        pruned: Values of the pruned model's report. None without one.
        commands: Lines that use the result.
        events: Events of its ``events.jsonl``; none of an older run.
    """
    charts = {
        "perplexity": _history_chart(summary, "perplexity"),
        "loss": _history_chart(summary, "loss"),
    }
    charts["divergence"] = _history_chart(summary, "kl")
    charts["time"] = time_chart(events, None)
    charts |= memory_charts(events, {"plan": _largest_part(summary), **summary["memory"]})
    sections = [
        make_section(
            "Before and after",
            ("", "pruned", "adapted", "ratio"),
            figure_rows(summary, "of weights"),
            text=bounds_text(summary),
        ),
        make_section("Training", *_history(summary), figures=("perplexity", "loss", "divergence")),
        time_section(events, None),
        make_section(
            "Memory",
            ("part", "host, planned", "GPU, planned", "largest item"),
            _memory(summary),
            figures=("memory_gpu", "memory_host", "plan"),
        ),
        make_section("Run", ("", ""), _run(summary)),
    ]
    if pruned is not None:
        charts["kept"] = kept_chart(pruned)
        sections.append(kept_section(pruned))
    sections += [steps_section(summary), settings_section(summary)]
    return make_page(
        f"{parent_name(summary['model'])}, adapted",
        sections,
        version=summary["version"],
        lead=[*_lead(summary), *filter(None, [slowest_phase(events, None)])],
        tiles=_tiles(summary),
        notes=page_notes(summary),
        commands=commands,
        charts=charts,
    )


def _lead(summary: Values) -> Iterator[str]:
    training = summary["training"]
    teacher = summary["teacher"]
    taught = "on text alone" if teacher is None else f"with {parent_name(teacher)} as its teacher"
    yield (
        f"Trained {taught}: {training['steps']:,} steps in {duration(training['seconds'])}, of "
        f"which step {training['best_step']:,} is kept."
    )


def _tiles(summary: Values) -> Iterator[tuple[str, str]]:
    before, after, training = summary["before"], summary["after"], summary["training"]
    yield "perplexity, held-out", f"{number(before['perplexity'])} → {number(after['perplexity'])}"
    if before.get("eval_perplexity") is not None:
        pair = (before["eval_perplexity"], after["eval_perplexity"])
        yield "perplexity, eval text", " → ".join(number(value) for value in pair)
    yield "tokens", f"{training['tokens']:,}"
    yield "time", duration(summary["seconds"])
    yield "peak memory", format_bytes(summary["memory"]["host_peak_bytes"])


def _run(summary: Values) -> Iterator[tuple[str, str]]:
    data, training, memory = summary["data"], summary["training"], summary["memory"]
    yield "made by", f"frugal-bonsai {summary['version']}"
    yield "data", ", ".join(source_name(name) for name in data["sources"])
    windows = f"{data['windows']:,} of {data['window']} tokens, {data['held_out_windows']} held out"
    yield "windows", windows
    rank = f", rank {training['rank']}" if training["rank"] else ""
    micro = plural(training["micro_batch"], "window")
    yield (
        "student",
        f"{training['weights']} weights{rank}, {training['optimiser']}, {micro} at once",
    )
    yield "tokens", f"{training['tokens']:,}"
    yield (
        "time",
        f"{duration(training['seconds'])} of training, {duration(summary['seconds'])} in all",
    )
    if training["stopped"]:
        yield "stopped early", str(training["stopped"])
    for where, name in (("host", "host memory"), ("gpu", "GPU memory")):
        if memory.get(f"{where}_peak_bytes") is not None:
            yield name, peak_words(memory, where)
    if summary["cache"] is not None:
        yield "teacher's cache", format_bytes(summary["cache"]["size_bytes"])


def _memory(summary: Values) -> Iterator[tuple[str, str, str, str]]:
    for name, part in summary["memory"].get("plans", {}).items():
        largest = max(part["items"], key=lambda item: item["size_bytes"])
        sizes = (format_bytes(part[f"{where}_bytes"]) for where in ("host", "gpu"))
        yield name, *sizes, f"{largest['name']}, {format_bytes(largest['size_bytes'])}"


def _largest_part(summary: Values) -> list[Any]:
    """Return the items of the part that holds most."""
    parts = summary["memory"].get("plans", {}).values()
    where = "host" if summary["memory"].get("gpu_peak_bytes") is None else "gpu"
    most = max(parts, key=lambda part: part[f"{where}_bytes"], default=None)
    return [] if most is None else list(most["items"])


def _history(summary: Values) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    head = ("step", "loss", "held-out perplexity", "divergence", "at most")
    keys = ("loss", "perplexity", "kl", "kl_upper")
    rows: list[tuple[str, ...]] = [
        (f"{row['step']:,}", *(number(row[key], 3) for key in keys))
        for row in summary["training"]["history"]
    ]
    return head, rows


def _history_chart(summary: Values, key: str) -> dict[str, Any] | None:
    points = [
        [row["step"], row[key]]
        for row in summary["training"]["history"]
        if row.get(key) is not None
    ]
    if len(points) < 2:
        return None
    names = {
        "perplexity": "held-out perplexity",
        "loss": "training loss",
        "kl": "divergence (nats a token)",
    }
    return {
        "kind": "lines",
        "caption": f"{names[key][0].upper()}{names[key][1:]} by step.",
        "series": {names[key]: points},
        "whole": True,
        "x": "step",
        "y": names[key],
    }
