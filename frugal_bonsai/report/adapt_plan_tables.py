"""The output of ``adapt --dry-run``: whether the adaptation fits, then every item.

In: the plan as plain values (``--json`` prints them). Out: text and tables on a rich console.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from frugal_bonsai.report.sheet import Sheet
from frugal_bonsai.report.words import all_printable, plural
from frugal_bonsai.sizes import format_bytes

if TYPE_CHECKING:
    from rich.console import Console

Values = Mapping[str, Any]
_PLACES = {"gpu": "GPU memory", "host": "host memory"}


def render_adapt_plan(plan: Values, console: Console) -> None:
    """Print totals and caps, the bytes of each part, and every item of the training.

    Args:
        plan: what :func:`frugal_bonsai.plan_adapt` returns.
        console: console to print to.
    """
    plan, sheet = all_printable(plan, console.encoding), Sheet(console)
    taught = "" if plan["teacher"] is None else f", with {plan['teacher']} as its teacher"
    sheet.heading(f"{plan['model']} ({plan['family']}): adapted{taught}")
    places = [where for where in _PLACES if plan["caps"][where] is not None]
    sheet.say(f"fits: {', '.join(_share(plan, where) for where in places)}")
    sheet.blank()
    sheet.table(
        ("part of the run", "most in", *(_PLACES[where] for where in places)),
        [_part(part, places) for part in plan["parts"]],
        left=2,
    )
    sheet.heading("what the training holds")
    sheet.table(
        ("item", "where", "while", "formula", "size"),
        [
            (
                item["name"],
                item["where"],
                _while(item["phases"]),
                item["formula"],
                format_bytes(item["size_bytes"]),
            )
            for item in plan["items"]
        ],
        left=4,
    )
    sheet.blank()
    rank = f", rank {plan['rank']}" if plan["rank"] else ""
    sheet.say(
        f"student: {plan['weights']} weights{rank}, {plan['optimiser']}, steps of "
        f"{plural(plan['batch'], 'window')} of {plan['window']} tokens, "
        f"{plan['micro_batch']} at once"
    )
    sheet.say(f"data: {', '.join(plan['data'])}, {plural(plan['windows'], 'window')}")
    files = ", ".join(f"{f['name']} {format_bytes(f['size_bytes'])}" for f in plan["files"])
    sheet.say(f"disk: {format_bytes(plan['totals']['disk'])} ({files})")
    for note in plan["notes"]:
        sheet.say(f"note: {note}")


def _share(plan: Values, where: str) -> str:
    total, cap = plan["totals"][where], plan["caps"][where]
    return f"{_PLACES[where]} {format_bytes(total)} of {format_bytes(cap)} ({total / cap:.0%})"


def _part(part: Values, places: Sequence[str]) -> tuple[str, ...]:
    """Return a part's name, its largest phase in the first place's memory, and its bytes."""
    largest = max(part["phases"], key=lambda phase: phase[f"{places[0]}_bytes"])
    sizes = (format_bytes(part[f"{where}_bytes"]) for where in places)
    return (part["name"], largest["name"], *sizes)


def _while(phases: Sequence[str]) -> str:
    """Return the phase that holds an item, or ``always``."""
    return "always" if len(phases) > 1 else phases[0].removeprefix("training: ")
