"""The page of a run that has not finished: its rounds so far, where its time and memory went.

In: the events of a run directory, the values of its state. Out: a page as plain values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from frugal_bonsai.report.pages.page import make_page, make_section
from frugal_bonsai.report.pages.prune import settings_section
from frugal_bonsai.report.pages.rounds import round_charts, round_sections
from frugal_bonsai.report.pages.timeline import (
    Events,
    memory_charts,
    sessions,
    slowest_phase,
    time_chart,
    time_section,
)
from frugal_bonsai.report.words import duration

Values = Mapping[str, Any]


def unfinished_page(run: Values, state: Values, events: Events) -> dict[str, Any]:
    """Return the page of a run directory.

    Args:
        run: ``out``, ``state``, ``command``, ``model`` and ``progress``, as ``runs`` lists them.
        state: ``rounds``, ``forward_tokens`` and ``settings`` so far.
        events: Events of the run; at least one.
    """
    starts = [event for event in events if event["event"] == "start"]
    caps = next((event for event in reversed(events) if event["event"] == "caps"), {})
    memory: dict[str, Any] = {"plan": ()}
    for where in ("host", "gpu"):
        memory |= {
            f"{where}_cap_bytes": caps.get(f"{where}_bytes"),
            f"{where}_peak_bytes": None,
            f"{where}_predicted_bytes": None,
        }
    notes = [[event["text"]] for event in events if event["event"] == "note"]
    return make_page(
        f"{run['out']}: {run['command']} of {run['model']}, {run['state']}",
        [
            *round_sections(state),
            time_section(events, None),
            make_section("Memory", figures=("memory_gpu", "memory_host")),
            make_section("What it said", ("note",), notes),
            settings_section(state),
        ],
        version=starts[-1]["version"] if starts else "?",
        lead=[
            f"It was in {run['progress']}.",
            *filter(None, [slowest_phase(events, None)]),
        ],
        tiles=[
            ("state", run["state"]),
            ("rounds finished", str(len(state["rounds"]))),
            ("time so far", duration(sessions(events)[-1]["seconds"])),
            ("processes", str(len(starts))),
        ],
        commands=["frugal-bonsai runs    # prints the line that resumes it"],
        charts={
            **round_charts(state),
            "time": time_chart(events, None),
            **memory_charts(events, memory),
        },
    )
