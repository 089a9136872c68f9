"""The page of a prune: what it removed, what it cost, what the result is worth.

In: the values of ``pruning_report.json``. Out: a page as plain values. Reads no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from frugal_bonsai.report.card_parts import parent_name, source_name, without_paths
from frugal_bonsai.report.pages.page import make_page, make_section
from frugal_bonsai.report.pages.rounds import round_charts, round_sections
from frugal_bonsai.report.pages.timeline import (
    Events,
    memory_charts,
    plan_rows,
    slowest_phase,
    time_chart,
    time_section,
)
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
from frugal_bonsai.sizes import format_bytes

Values = Mapping[str, Any]


def prune_page(
    summary: Values, commands: Sequence[str] = (), events: Events = ()
) -> dict[str, Any]:
    """Return the page of a prune.

    Args:
        summary: Values of a ``pruning_report.json``.
        commands: Lines that use the result.
        events: Events of its ``events.jsonl``; none of an older run.
    """
    model = summary.get("time_model")
    charts = {
        "kept": kept_chart(summary),
        **round_charts(summary),
        "time": time_chart(events, model),
        **memory_charts(events, summary["memory"]),
    }
    sections = [
        make_section("Before and after", ("", "before", "after", "ratio"), _before_after(summary)),
        kept_section(summary),
        *round_sections(summary),
        time_section(events, model),
        make_section(
            "Memory",
            ("item of the plan's peak", "where", "formula", "size"),
            plan_rows(summary["memory"]),
            text="Items of memory are held together in the phase of the plan's peak; items of the "
            "disk are those of the whole run.",
            figures=("memory_gpu", "memory_host", "phases", "plan"),
        ),
        make_section("Run", ("", ""), _run(summary)),
        steps_section(summary),
        settings_section(summary),
    ]
    return make_page(
        f"{parent_name(summary['model'])}, {summary['sparsity']:.1%} removed",
        sections,
        version=summary["version"],
        lead=[most_pruned(summary), *filter(None, [slowest_phase(events, model)])],
        tiles=_tiles(summary),
        notes=page_notes(summary),
        commands=commands,
        charts=charts,
    )


def page_notes(summary: Values) -> list[str]:
    """Return the warnings and the notes of a command."""
    return [
        *(f"Warning: {without_paths(text)}." for text in summary.get("warnings", ())),
        *(f"Note: {without_paths(text)}." for text in summary["notes"]),
    ]


def most_pruned(summary: Values) -> str:
    """Return a sentence on the layers that lost most and least of their weights."""
    shares = summary["layer_sparsity"]
    order = sorted(range(len(shares)), key=lambda layer: -shares[layer])
    if max(shares) - min(shares) < 0.01:
        return f"Every layer lost the same share of its weights ({max(shares):.1%})."
    most = ", ".join(f"layer {layer} ({shares[layer]:.1%})" for layer in order[:3])
    least = f"layer {order[-1]} ({shares[order[-1]]:.1%})"
    return f"The layers that lost most of their weights: {most}. The least: {least}."


def _tiles(summary: Values) -> Iterator[tuple[str, str]]:
    before, after = summary["before"], summary["after"]
    yield "weights removed", f"{summary['sparsity']:.1%}"
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


# -- settings -----------------------------------------------------------------------------------
def settings_section(summary: Values) -> dict[str, Any]:
    """Return the section of settings."""
    rows = [(name, settings_text(value)) for name, value in summary["settings"].items()]
    return make_section("Settings", ("setting", "value"), rows)


def settings_text(value: Any) -> str:
    """Return the value of a setting as text."""
    words = {None: "default", True: "yes", False: "no"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


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
