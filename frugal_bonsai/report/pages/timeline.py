"""Time and memory of a run, from its events, beside the plan and the time model.

In: the events of ``events.jsonl``, the record of a run. Out: charts and rows as plain values. Reads
no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from frugal_bonsai.memory.work import BASE
from frugal_bonsai.report.pages.page import make_section
from frugal_bonsai.report.words import duration
from frugal_bonsai.sizes import GIB, MIB, format_bytes

Values = Mapping[str, Any]
Events = Sequence[Values]
# Start of a sweep's name -> the phase of the time model, and the one of the memory plan.
_PHASES = (
    ("masked evaluation", "masked evaluation", "masked evaluation"),
    ("trial", "recovery", "recovery"),
    ("recovery", "recovery", "recovery"),
    ("refinement", "recovery", "recovery"),
    ("writing the working store", "building stores", "building the store"),
    ("writing text", "writing text", "writing text"),
    ("sampling", "sampling text", "sampling text"),
    ("statistics", "statistics", "statistics"),
    ("verify", "rewriting", "verifying"),
    ("adapting", "training", "training"),
)
_STARTING = "starting"
_TIME_HEAD, _TIME = ("phase", "measured", "share", "time model", "bound by"), ("time",)
# Phases of the memory plan that are part of another one in the events.
_WITHIN = {"refinement": "recovery", "rewriting": "verifying"}
_RESOURCES = {
    "compute": "matrix products",
    "elementwise": "elementwise",
    "disk": "disk",
    "copy": "copies",
}
_BOUND = {"compute": "arithmetic", "disk": "the disk", "copy": "copies to the GPU"}
# A cap that is this many times the peak is named, not drawn.
_FAR = 4


def sessions(events: Events) -> list[dict[str, Any]]:
    """Return the events on one clock: a resumed run goes on where the earlier one ended."""
    found: list[dict[str, Any]] = []
    offset = last = 0.0
    for event in events:
        if event["event"] == "start":
            offset = last
        last = offset + event["seconds"]
        found.append({**event, "seconds": last})
    return found


def phase_seconds(events: Events) -> dict[str, tuple[float, int | None]]:
    """Return the seconds of each phase and the most host bytes that were read in it.

    A phase lasts from the start of its sweep to the start of the next.
    """
    found: dict[str, tuple[float, int | None]] = {}
    name, began = _STARTING, 0.0
    for event in sessions(events):
        seconds, most = found.get(name, (0.0, None))
        if event["event"] == "memory":
            most = max(most or 0, event["host_bytes"])
        found[name] = (seconds + max(0.0, event["seconds"] - began), most)
        began = event["seconds"]
        if event["event"] in ("sweep", "start"):
            name = _phase(event["name"])[0] if event["event"] == "sweep" else _STARTING
    return found


def _phase(sweep: str) -> tuple[str, str]:
    """Return the phases of the time model and of the memory plan that a sweep belongs to."""
    for start, timed, held in _PHASES:
        if sweep.startswith(start):
            return timed, held
    if "perplexity" in sweep:
        return "perplexity", "perplexity"
    return sweep, sweep


def time_section(events: Events, model: Values | None) -> dict[str, Any]:
    """Return the section of the time by phase, measured and by the time model.

    Args:
        events: Events of the run; none of an older one.
        model: ``time_model`` of the record. None without one.
    """
    measured, phases = phase_seconds(events), [] if model is None else model["phases"]
    whole = sum(seconds for seconds, _ in measured.values())
    names = [phase["name"] for phase in phases]
    names += [name for name in measured if name not in names]
    modelled = {phase["name"]: phase for phase in phases}
    rows: list[tuple[str, ...]] = []
    for name in names:
        seconds, phase = measured.get(name, (0.0, None))[0], modelled.get(name)
        rows.append(
            (
                name,
                _seconds(seconds),
                f"{seconds / whole:.0%}" if seconds else "-",
                "-" if phase is None else _seconds(phase["seconds"]),
                "-" if phase is None else _BOUND[phase["binds"]],
            )
        )
    text = "Measured from the run's events: a phase lasts from the start of its sweep to the next."
    if model is None:
        rows = [row[:3] for row in rows]
        return make_section("Where the time went", _TIME_HEAD[:3], rows, text=text, figures=_TIME)
    text += (
        " The time model counts operations and bytes, and divides them by the machine's rates; a "
        "run that shares its machine with others takes longer. Masked evaluation is counted with "
        "all tokens that it may spend; a round that is certain of its cut stops before."
    )
    text += f" Rates: {model['profile']}."
    return make_section("Where the time went", _TIME_HEAD, rows, text=text, figures=_TIME)


def _seconds(seconds: float) -> str:
    """Return a duration; less than a second is not nothing."""
    if not seconds:
        return "-"
    return "< 1 s" if seconds < 1 else duration(seconds)


def time_chart(events: Events, model: Values | None) -> dict[str, Any] | None:
    """Return the roofline of a run: seconds of each resource by phase, and what was measured."""
    measured, phases = phase_seconds(events), [] if model is None else model["phases"]
    names = [phase["name"] for phase in phases]
    names += [name for name in measured if name not in names]
    modelled = {phase["name"]: phase for phase in phases}
    if len(names) < 2:
        return None
    scale, unit = _clock(max(seconds for seconds, _ in measured.values()) if measured else 0.0)
    if model is None:
        return {
            "kind": "bars",
            "caption": "Measured time of each phase.",
            "labels": names,
            "parts": {"measured": [measured[name][0] / scale for name in names]},
            "x": unit,
        }
    parts = {
        title: [modelled.get(name, {}).get(key, 0.0) / scale for name in names]
        for key, title in _RESOURCES.items()
    }
    return {
        "kind": "bars",
        "caption": "Time of each resource by the time model, and the measured time. Products "
        "and elementwise work add up; disk and copies run beside them where buffers allow it, so "
        "the longest of the three sets the pace.",
        "labels": names,
        "parts": {title: seconds for title, seconds in parts.items() if any(seconds)},
        "marks": {
            "measured": [measured[n][0] / scale if n in measured else None for n in names],
        },
        "x": unit,
    }


def slowest_phase(events: Events, model: Values | None) -> str | None:
    """Return a sentence on the phase that took most of the time; None without events."""
    measured = phase_seconds(events)
    whole = sum(seconds for seconds, _ in measured.values())
    if len(measured) < 2 or not whole:
        return None
    name, (seconds, _) = max(measured.items(), key=lambda item: item[1][0])
    phases = {} if model is None else {phase["name"]: phase for phase in model["phases"]}
    pace = f"; {_BOUND[phases[name]['binds']]} sets its pace" if name in phases else ""
    share = f"{duration(seconds)}, {seconds / whole:.0%} of it"
    return f"Most of the time went into {name}: {share}{pace}."


# -- memory -------------------------------------------------------------------------------------
def memory_charts(events: Events, memory: Values) -> dict[str, Any]:
    """Return the charts of a run's memory: over time, by phase, and by item of the plan."""
    return {
        **{
            f"memory_{where}": _over_time(events, memory, where)
            for where in ("host", "gpu")
            if memory.get(f"{where}_cap_bytes") is not None
        },
        "phases": _by_phase(events, memory),
        "plan": _by_item(memory),
    }


def _over_time(events: Events, memory: Values, where: str) -> dict[str, Any] | None:
    key = f"{where}_bytes"
    found = [e for e in sessions(events) if e["event"] == "memory" and e.get(key)]
    if len(found) < 2:
        return None
    peak = memory[f"{where}_peak_bytes"] or max(event[key] for event in found)
    scale, unit = _unit(peak)
    ticks, clock = _clock(found[-1]["seconds"])
    levels = {"predicted peak": memory[f"{where}_predicted_bytes"], "measured peak": peak}
    cap, place = memory[f"{where}_cap_bytes"], "GPU" if where == "gpu" else "host"
    caption = f"{place} memory between layers".capitalize()
    if cap > _FAR * peak:
        caption += f". The cap, {format_bytes(cap)}, is far above."
    else:
        levels, caption = {"cap": cap, **levels}, f"{caption}, and its cap."
    return {
        "kind": "lines",
        "caption": caption,
        "dense": True,
        "series": {f"{place} memory": [[e["seconds"] / ticks, e[key] / scale] for e in found]},
        "levels": {name: size / scale for name, size in levels.items() if size is not None},
        "least": 0,
        "x": clock,
        "y": unit,
    }


def _by_phase(events: Events, memory: Values) -> dict[str, Any] | None:
    """Return planned and measured host memory by phase."""
    planned: dict[str, int] = {}
    for phase in memory.get("phases", ()):
        name = phase["name"].partition(":")[0]
        name = _WITHIN.get(name, name)
        planned[name] = max(planned.get(name, 0), phase["host_bytes"])
    found: dict[str, int] = {}
    name = ""
    for event in events:
        if event["event"] == "sweep":
            name = _phase(event["name"])[1]
        elif event["event"] == "memory" and name in planned:
            found[name] = max(found.get(name, 0), event["host_bytes"])
    if not found:
        return None
    scale, unit = _unit(max(planned.values()))
    return {
        "kind": "bars",
        "caption": "Host memory by phase: the plan, and the most that was read between layers. "
        "Readings include what the allocator keeps of earlier phases.",
        "labels": list(planned),
        "parts": {"planned": [size / scale for size in planned.values()]},
        "marks": {"measured": [found[n] / scale if n in found else None for n in planned]},
        "x": unit,
    }


def _by_item(memory: Values) -> dict[str, Any] | None:
    """Return the items of the plan's peak, stacked, beside the measured peak."""
    where = "host" if memory.get("gpu_peak_bytes") is None else "gpu"
    peak = memory.get(f"{where}_peak_bytes")
    items = [item for item in memory["plan"] if item["where"] == where and item["size_bytes"]]
    if peak is None or not items:
        return None
    items = sorted(items, key=lambda item: -item["size_bytes"])
    scale, unit = _unit(peak)
    parts = {item["name"]: [item["size_bytes"] / scale, 0.0] for item in items[:5]}
    if items[5:]:
        parts["all others"] = [sum(item["size_bytes"] for item in items[5:]) / scale, 0.0]
    # The process is measured before the work; single items of the work cannot be seen from outside.
    process = parts.get(BASE, [0.0, 0.0])
    process[1] = min(process[0], peak / scale)
    parts["work, measured"] = [0.0, peak / scale - process[1]]
    place = "GPU" if where == "gpu" else "Host"
    return {
        "kind": "bars",
        "caption": f"{place} memory at the plan's peak by item, and the measured peak of the run: "
        "the process before the work, and all that the work held.",
        "labels": ["planned", "measured"],
        "parts": parts,
        "x": unit,
    }


def _clock(seconds: float) -> tuple[float, str]:
    """Return the unit of a time axis that ends here."""
    for scale, name in ((3600.0, "hours"), (60.0, "minutes")):
        if seconds > 3 * scale:
            return scale, name
    return 1.0, "seconds"


def _unit(size_bytes: int) -> tuple[int, str]:
    return (GIB, "GiB") if size_bytes >= 2 * GIB else (MIB, "MiB")


def plan_rows(memory: Values) -> Iterator[tuple[str, str, str, str]]:
    """Yield the items of a memory plan, the largest first."""
    for item in sorted(memory["plan"], key=lambda item: -item["size_bytes"]):
        size = format_bytes(item["size_bytes"])
        yield item["name"], item["where"], item.get("formula", ""), size
