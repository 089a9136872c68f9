"""The page of machines: their rates, and what they can prune at which cap in what time.

In: profiles and plans as plain values. Out: a page as plain values. Reads no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from frugal_bonsai.report.pages.page import make_page, make_section
from frugal_bonsai.report.words import NOTHING, duration, rate_rows
from frugal_bonsai.sizes import GIB, format_bytes

Values = Mapping[str, Any]
_BOUND = {"compute": "arithmetic", "disk": "the disk", "copy": "copies to the GPU"}
_RESOURCES = {
    "compute": "matrix products",
    "elementwise": "elementwise",
    "disk": "disk",
    "copy": "copies",
}
_TEXT = (
    "Predicted from shapes alone, for the default method, 50% of the block weights and 65,536 "
    "tokens of calibration text. Below the smallest cap no plan exists. A larger cap can take "
    "longer, where it has room for text that the model writes for the last reconstruction. Nothing "
    "here was run."
)


def machines_page(machines: Sequence[Values], *, version: str) -> dict[str, Any]:
    """Return the page of machines.

    Args:
        machines: For each one its ``label``, the fields of its profile, and ``plans``: for each
            shape and window ``needed`` (smallest caps in bytes by option), ``at_cap`` and ``whole``
            (figures at the smallest cap and with all memory, None where nothing fits).
        version: Version of frugal-bonsai that plans.
    """
    charts: dict[str, Any] = {"caps": _cap_chart(machines), "times": _time_chart(machines)}
    sections = [
        make_section("Rates", *_rates(machines), text="What each machine does in a second."),
        make_section(
            "Side by side",
            *_overview(machines),
            text=f"{_TEXT} Windows of {_windows(machines)[-1]:,} tokens.",
            figures=("caps", "times"),
        ),
    ]
    for at, machine in enumerate(machines):
        charts[f"machine{at}"] = _resource_chart(machine)
        sections.append(
            make_section(
                machine["label"],
                _HEAD,
                _plans(machine),
                text=_about(machine),
                figures=(f"machine{at}",),
            )
        )
    names = ", ".join(machine["label"] for machine in machines)
    return make_page(
        f"What {names} can prune",
        sections,
        version=version,
        notes=[
            f"Warning: {machine['label']} was measured on a busy machine: its rates may be too low."
            for machine in machines
            if "BUSY" in machine["source"]
        ],
        charts=charts,
    )


_HEAD = (
    *("model", "window", "smallest cap", "time at it", "fits all memory", "time"),
    *("bound by", "host memory", "disk"),
)


def _about(machine: Values) -> str:
    memory = f"{format_bytes(machine['host_bytes'])} of host memory"
    if machine["gpu_bytes"] is not None:
        memory = f"{format_bytes(machine['gpu_bytes'])} of GPU memory and {memory}"
    return f"{machine['name']}: {memory}. Rates: {machine['source']}."


def _rates(machines: Sequence[Values]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    columns = [dict(rate_rows(machine)) for machine in machines]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, *(column.get(name, NOTHING) for column in columns)) for name in names]
    return ("", *(machine["label"] for machine in machines)), rows


def _windows(machines: Sequence[Values]) -> list[int]:
    return sorted({plan["window"] for machine in machines for plan in machine["plans"]})


def _last(machine: Values) -> list[Values]:
    """Return the plans with the longest windows."""
    longest = max(plan["window"] for plan in machine["plans"])
    return [plan for plan in machine["plans"] if plan["window"] == longest]


def _overview(machines: Sequence[Values]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    rows = [
        (shapes[0]["shape"], *(_verdict(plan) for plan in shapes))
        for shapes in zip(*(_last(machine) for machine in machines), strict=True)
    ]
    return ("model", *(machine["label"] for machine in machines)), rows


def _verdict(plan: Values) -> str:
    whole = plan["whole"]
    if whole is None:
        return f"does not fit: needs {_needed(plan)}"
    return f"{duration(whole['seconds'])}, bound by {_BOUND[whole['binds']]}; from {_needed(plan)}"


def _needed(plan: Values) -> str:
    """Return the smallest cap: of the GPU's memory if there is one."""
    needed = plan["needed"]
    gpu, host = needed.get("max_gpu_mem"), needed.get("max_cpu_mem")
    if gpu is not None:
        return f"{format_bytes(gpu)} GPU"
    return NOTHING if host is None else format_bytes(host)


def _plans(machine: Values) -> Iterator[tuple[str, ...]]:
    for plan in machine["plans"]:
        whole, at_cap = plan["whole"], plan["at_cap"]
        parts = (
            (NOTHING,) * 4
            if whole is None
            else (
                duration(whole["seconds"]),
                _BOUND[whole["binds"]],
                format_bytes(whole["totals"]["host"]),
                format_bytes(whole["totals"]["disk"]),
            )
        )
        yield (
            plan["shape"],
            f"{plan['window']:,}",
            _needed(plan),
            NOTHING if at_cap is None else duration(at_cap["seconds"]),
            "no" if whole is None else "yes",
            *parts,
        )


# -- figures ------------------------------------------------------------------------------------
def _cap_chart(machines: Sequence[Values]) -> dict[str, Any]:
    """Return the smallest cap of each shape, and the memory of the machines."""
    best = max(machines, key=lambda machine: machine["gpu_bytes"] or 0)
    key = "max_cpu_mem" if best["gpu_bytes"] is None else "max_gpu_mem"
    plans = [plan for plan in _last(best) if key in plan["needed"]]
    memory = {
        machine["label"]: (machine["gpu_bytes"] or machine["host_bytes"]) / GIB
        for machine in machines
        if (machine["gpu_bytes"] is None) == (best["gpu_bytes"] is None)
    }
    kind = "GPU" if key == "max_gpu_mem" else "host"
    return {
        "kind": "bars",
        "caption": f"Smallest {kind} memory with which each model can be pruned, and the memory of "
        "the machines.",
        "labels": [plan["shape"] for plan in plans],
        "parts": {"smallest cap": [plan["needed"][key] / GIB for plan in plans]},
        "levels": memory,
        "x": "GiB",
    }


def _time_chart(machines: Sequence[Values]) -> dict[str, Any] | None:
    """Return the time of each shape on each machine."""
    series = {
        machine["label"]: [
            [plan["parameters"] / 1e9, plan["whole"]["seconds"] / 3600]
            for plan in _last(machine)
            if plan["whole"] is not None
        ]
        for machine in machines
    }
    series = {label: points for label, points in series.items() if points}
    if not series:
        return None
    return {
        "kind": "lines",
        "caption": "Predicted hours of a prune to 50% with all memory of each machine.",
        "series": series,
        "logarithmic": True,
        "x": "parameters (billions)",
        "y": "hours",
    }


def _resource_chart(machine: Values) -> dict[str, Any] | None:
    """Return the roofline of a machine: hours of each resource by shape."""
    plans = [plan for plan in _last(machine) if plan["whole"] is not None]
    if not plans:
        return None
    return {
        "kind": "bars",
        "caption": "Predicted hours of each resource. Disk and copies run beside the arithmetic "
        "(products and elementwise) where buffers allow it: the longest sets the pace.",
        "labels": [plan["shape"] for plan in plans],
        "parts": {
            title: [plan["whole"]["phases"][key] / 3600 for plan in plans]
            for key, title in _RESOURCES.items()
            if any(plan["whole"]["phases"][key] for plan in plans)
        },
        "marks": {"in all": [plan["whole"]["seconds"] / 3600 for plan in plans]},
        "x": "hours",
    }
