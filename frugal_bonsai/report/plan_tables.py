"""The output of ``plan`` and ``profile``: the verdict first, then its figures.

In: the values that ``--json`` prints. Out: text and tables on a rich console, at 80 columns, on a
terminal or a pipe. Computes only shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from frugal_bonsai.report.sheet import Sheet
from frugal_bonsai.report.words import NOTHING, all_printable, duration, plural, rate_rows
from frugal_bonsai.sizes import format_bytes

if TYPE_CHECKING:
    from rich.console import Console

Values = Mapping[str, Any]
_CAP_OPTIONS = {"gpu": "--max-gpu-mem", "host": "--max-cpu-mem"}
_PLACES = {"gpu": "GPU memory", "host": "host memory", "disk": "disk"}
_BINDS = {
    "compute": "arithmetic sets the pace",
    "disk": "the disk sets the pace",
    "copy": "copying to the GPU sets the pace",
}
_RESOURCES = ("compute", "elementwise", "disk", "copy")


def render_plan(plan: Values, console: Console) -> None:
    """Print the verdict, the time and the binding resource in ten lines; then every item.

    Args:
        plan: Result of :func:`frugal_bonsai.plan`.
        console: Console that is printed on.
    """
    plan, sheet = all_printable(plan, console.encoding), Sheet(console)
    if plan.get("advice"):
        sheet.say(plan["advice"])
    sheet.heading(
        f"{plan['model']} ({plan['family']}, {_count(plan['parameters'])} parameters) on "
        f"{plan['device_name']}"
    )
    sheet.say(_fits(plan))
    sheet.say(f"time: about {duration(plan['seconds'])}; {_BINDS[plan['binds']]}")
    sheet.blank()
    _phases(plan, sheet)
    sheet.heading("memory items")
    sheet.table(
        ("item", "where", "formula", "size"),
        [
            (item["name"], item["where"], item["formula"], format_bytes(item["size_bytes"]))
            for item in plan["items"]
        ],
        left=3,
    )
    sheet.blank()
    sheet.say(
        f"work: {plural(plan['rounds'], 'round')} over {plural(plan['windows'], 'window')} of "
        f"{plan['window']} tokens, {plan['forward_tokens']:,} forward tokens at most, "
        f"masks in {plan['arithmetic']} arithmetic"
    )
    sheet.say(
        f"at once: micro-batches of {plural(plan['micro_batch'], 'window')}, "
        f"{plan['windows_in_flight']:,} in flight, {plural(plan['concurrent_masks'], 'mask')} a "
        "sweep"
    )
    if plan["ranks"] > 1:
        sheet.say(f"ranks: {plan['ranks']} share masks and candidates; memory is that of each")
    sheet.say(f"rates: {plan['profile']}")
    for note in plan["notes"]:
        sheet.say(f"note: {note}")


def _count(parameters: int) -> str:
    """Return ``70.6 billion``."""
    for scale, word in ((10**9, "billion"), (10**6, "million")):
        if parameters >= scale:
            return f"{parameters / scale:.1f} {word}"
    return f"{parameters:,}"


def _fits(plan: Values) -> str:
    """Return ``fits: GPU memory 21.00 GiB of 22.35 GiB (94%), ...; most in ...``."""
    totals, caps = plan["totals"], plan["caps"]
    parts, over = [], []
    for where, place in _PLACES.items():
        cap, total = caps.get(where), totals.get(where, 0)
        if cap is None and not total:
            continue
        if cap is None:
            parts.append(f"{place} {format_bytes(total)}")
            continue
        if total > cap:
            over.append(_CAP_OPTIONS[where])
        parts.append(f"{place} {format_bytes(total)} of {format_bytes(cap)} ({total / cap:.0%})")
    verdict = f"does NOT fit, raise {' and '.join(over)}" if over else "fits"
    place = "host" if caps.get("gpu") is None else "gpu"
    most = f"most in {plan['peak_phases'][place]}, largest: {plan['binding']}"
    return f"{verdict}: {', '.join(parts)}; {most}"


def _phases(plan: Values, sheet: Sheet) -> None:
    """Print the seconds of each phase by resource, and the resource that binds it."""
    phases = plan["phases"]
    used = [name for name in _RESOURCES if any(phase[name] > 0 for phase in phases)]
    rows = [
        (
            phase["name"],
            phase["binds"],
            _time(phase["seconds"]),
            *(_time(phase[name]) for name in used),
        )
        for phase in phases
    ]
    total = ("in all", plan["binds"], _time(plan["seconds"]))
    rows.append((*total, *(_time(sum(phase[name] for phase in phases)) for name in used)))
    sheet.table(("phase", "bound by", "time", *used), rows, left=2)


def _time(seconds: float) -> str:
    if seconds <= 0:
        return NOTHING
    return "< 1 s" if seconds < 1 else duration(seconds)


def render_profile(profile: Values, console: Console) -> None:
    """Print the rates of a machine.

    Args:
        profile: Result of :func:`frugal_bonsai.profile`.
        console: Console that is printed on.
    """
    profile, sheet = all_printable(profile, console.encoding), Sheet(console)
    sheet.heading(f"{profile['name']} ({profile['device']})")
    sheet.table(("", ""), list(rate_rows(profile)))
    sheet.say(f"source: {profile['source']}")
