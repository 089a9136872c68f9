"""The results page, made of the lines of a run and of nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_checks.check import DONE, FAILURE, FIGURE, MACHINE, SKIPPED, Line
from gpu_checks.steps import STEPS

_OWN_KEYS = ("step", "kind", "table", "at_seconds")
_GIB, _MIB = 2**30, 2**20


def page_name(lines: Sequence[Line]) -> str:
    """``gpu_<card>_<date>.md``."""
    machine = _machine(lines)
    card = re.sub(r"[^a-z0-9]+", "-", str(machine.get("card", "unknown")).lower()).strip("-")
    return f"gpu_{card}_{machine.get('date', 'undated')}.md"


def write_page(lines: Sequence[Line], folder: Path) -> Path:
    """Write the page into a folder; its path."""
    path = folder / page_name(lines)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(render(lines), encoding="utf-8")
    return path


def render(lines: Sequence[Line]) -> str:
    """The page. Of a step that ran more than once its last run counts."""
    machine, by_step = _machine(lines), _latest(lines)
    parts = [
        f"# GPU check: {machine.get('card', 'unknown card')}, {machine.get('date', 'undated')}",
        f"```\n{machine.get('command', 'python tools/gpu_check.py')}\n```",
        _about(machine),
        _table([{"fact": name, "value": value} for name, value in _facts(machine)]),
        _outcome(by_step),
    ]
    known = {step.name: step.about for step in STEPS}
    for name in [*known, *(other for other in by_step if other not in known)]:
        if name in by_step and name != MACHINE:
            parts += [f"## {name}", known.get(name, ""), *_step(by_step[name])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _about(machine: Line) -> str:
    if machine.get("dry_run"):
        return "A dry run: shapes are tiny and the figures mean nothing."
    return "Each step ran in a separate process with a time limit."


def _machine(lines: Sequence[Line]) -> Line:
    """The last run's facts of the machine."""
    return next((line for line in reversed(lines) if line.get("kind") == MACHINE), {})


def _facts(machine: Line) -> list[tuple[str, str]]:
    left_out = (*_OWN_KEYS, "card", "date", "command")
    return [(_head(key), _cell(key, machine[key])) for key in machine if key not in left_out]


def _latest(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """The lines of each step, of the last run that it has lines of."""
    found: dict[str, tuple[int, list[Line]]] = {}
    run = 0
    for line in lines:
        run += line.get("kind") == MACHINE
        step = str(line.get("step"))
        if step not in found or found[step][0] != run:
            found[step] = (run, [])
        found[step][1].append(line)
    return {step: rows for step, (_, rows) in found.items()}


def _outcome(by_step: dict[str, list[Line]]) -> str:
    """One row a step: its figures, failures, what was left out."""
    rows = []
    for name, lines in by_step.items():
        if name == MACHINE:
            continue
        kinds = [line.get("kind") for line in lines]
        done = [line.get("seconds") for line in lines if line.get("kind") == DONE]
        rows.append(
            {
                "step": name,
                "figures": kinds.count(FIGURE),
                "failures": kinds.count(FAILURE),
                "left_out": kinds.count(SKIPPED),
                "seconds": done[-1] if done else None,
            }
        )
    return _table(rows)


def _step(lines: list[Line]) -> list[str]:
    """Tables, then what failed, then what was left out."""
    tables: dict[str, list[Line]] = {}
    for line in lines:
        if line.get("kind") == FIGURE:
            row = {key: value for key, value in line.items() if key not in _OWN_KEYS}
            tables.setdefault(str(line.get("table")), []).append(row)
    parts = [f"{name[:1].upper()}{name[1:]}:\n\n{_table(rows)}" for name, rows in tables.items()]
    for line in lines:
        if line.get("kind") == FAILURE:
            last = "\n".join(line.get("last_lines", []))
            said = f"{line.get('error')}: {line.get('message')}"
            parts.append(f"**Failed: {line.get('part')}.** {said}\n\n```\n{last}\n```")
        elif line.get("kind") == SKIPPED:
            parts.append(f"Left out: {line.get('why')}.")
    return parts


def _table(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = [columns_line([_head(key) for key in columns]), columns_line(["---"] * len(columns))]
    text += [columns_line([_cell(key, row.get(key)) for key in columns]) for row in rows]
    return "\n".join(text)


def columns_line(cells: Sequence[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


def _head(key: str) -> str:
    return key.removesuffix("_bytes").replace("_", " ")


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("_bytes") and isinstance(value, int):
        return f"{value / _GIB:.2f} GiB" if value >= _GIB else f"{value / _MIB:.1f} MiB"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
