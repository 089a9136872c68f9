"""``report``: one page on what ``prune``, ``adapt`` or ``shrink`` wrote.

In: the output's folder. Out: the page as text, or a file. Reads the reports in the folder, no
weights.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from frugal_bonsai.bonsai.settings import STATE_FILE
from frugal_bonsai.checkpoint.commit import output_errors, write_bytes
from frugal_bonsai.errors import WRONG_VALUES, CheckpointError, OptionError
from frugal_bonsai.plain_json import json_text
from frugal_bonsai.progress import Progress
from frugal_bonsai.report.pages.adapt import adapt_page
from frugal_bonsai.report.pages.compare import compare_page
from frugal_bonsai.report.pages.figures import draw_figures, require_plots
from frugal_bonsai.report.pages.page import GENERATOR, render_html, render_markdown
from frugal_bonsai.report.pages.prune import prune_page
from frugal_bonsai.report.pages.shrink import shrink_page
from frugal_bonsai.report.pages.unfinished import unfinished_page
from frugal_bonsai.run.events import read_events
from frugal_bonsai.run.provenance import ADAPT_REPORT_FILE, REPORT_FILE, read_report
from frugal_bonsai.run.run_folder import EVENTS_FILE, is_run_folder
from frugal_bonsai.run.runs import describe_run

# The path in a line that loads an output, which may lie elsewhere by now.
_QUOTED = re.compile(r"""\((?:'[^']*'|"[^"]*")\)""")
PAGE_FILE, KINDS = "report.html", ("html", "md", "json")
_KEPT = {"kept", "dense", "layer_sparsity", "sparsity"}
_OF_SHRINK = {"model", "before", "after", "mask", *_KEPT}
_OF_PRUNE = {"model", "before", "after", "kept", "dense", "rounds", "memory", "settings"}
_OF_ADAPT = {"model", "before", "after", "training", "data", "memory", "settings"}


def report_page(*folders: str | Path, kind: str = "html") -> str:
    """Return the page of a pruned or an adapted model, or of several side by side.

    Args:
        folders: Folders that ``prune`` or ``adapt`` wrote, or one that ``shrink`` wrote.
        kind: ``html``, ``md`` or ``json``. ``html`` needs matplotlib.

    Raises:
        CheckpointError: A folder is missing, or has no complete report, or a damaged one.
        OptionError: matplotlib is not installed.
    """
    places = [Path(folder).expanduser() for folder in folders]
    with _damaged(places):
        if len(places) == 1:
            return render_page(_page(places[0]), kind)
        results = [(place.resolve().name, *_read(place)) for place in places]
        for place, (_, summary, _pruned) in zip(places, results, strict=True):
            if "mask" in summary:
                raise CheckpointError(
                    f"{place}: shrink wrote it and measured no perplexity, so there is nothing to "
                    f"compare; leave it out"
                )
        return render_page(compare_page(results), kind)


@contextmanager
def _damaged(places: Sequence[Path]) -> Iterator[None]:
    """Turn the errors of values that no run has written into a :class:`CheckpointError`."""
    try:
        yield
    except WRONG_VALUES as error:
        raise CheckpointError(
            f"{', '.join(map(str, places))}: a report there is damaged "
            f"({type(error).__name__}: {str(error)[:200]}); copy the folder again from its source"
        ) from error


def render_page(page: Mapping[str, Any], kind: str) -> str:
    """Return a page as ``html``, ``md`` or ``json``."""
    if kind == "html":
        return render_html(page, draw_figures(page["charts"]))
    return json_text(page, indent=2) if kind == "json" else render_markdown(page)


def _page(folder: Path) -> dict[str, Any]:
    """Read the reports of an output, and make its page as plain values."""
    if folder.is_dir() and is_run_folder(folder.resolve()):
        return _unfinished(folder.resolve())
    summary, pruned = _read(folder)
    commands, events = _commands(folder.resolve().name, summary), read_events(folder)
    if "mask" in summary:
        return shrink_page(summary, commands)
    if "training" in summary:
        return adapt_page(summary, pruned, commands, events)
    return prune_page(summary, commands, events)


def _unfinished(folder: Path) -> dict[str, Any]:
    """Return the page of a run directory.

    Raises:
        CheckpointError: There is no log of a run in it.
    """
    run, events = describe_run(folder, folder.parent), read_events(folder)
    if run is None or not events:
        raise CheckpointError(
            f"{folder / EVENTS_FILE}: there is no log of a run; give the folder of an output, or a "
            f"run directory that frugal-bonsai runs lists"
        )
    saved = read_report(folder / STATE_FILE)
    settings = saved.get("identity", {}).get("settings", {})
    return unfinished_page(run, {"rounds": [], "settings": settings, **saved}, events)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the report of an output; of an adapted one also the report of the prune before it."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the folder that prune wrote")
    adapted, pruned = (read_report(folder / file) for file in (ADAPT_REPORT_FILE, REPORT_FILE))
    if (folder / ADAPT_REPORT_FILE).exists():
        _require(adapted, _OF_ADAPT, folder / ADAPT_REPORT_FILE, "adapt")
        return adapted, pruned if pruned.keys() >= _KEPT else None
    if not pruned.keys() >= _OF_SHRINK:
        _require(pruned, _OF_PRUNE, folder / REPORT_FILE, "prune")
    return pruned, None


def _require(summary: Mapping[str, Any], keys: set[str], path: Path, command: str) -> None:
    """Raise unless a report has these keys."""
    if missing := keys - summary.keys():
        raise CheckpointError(
            f"{path}: missing, damaged or without {', '.join(sorted(missing))}; give the --out "
            f"folder of a finished prune or adapt (finish a run with {command} --resume)"
        )


def page_kind(path: Path) -> str:
    """Return the format of a page by the ending of its file; html if it has none.

    Raises:
        OptionError: There is no such format.
    """
    kind = path.suffix.removeprefix(".") or "html"
    if kind not in KINDS:
        raise OptionError(f"--report {path}: ends in {path.suffix}, expected .html, .md or .json")
    return kind


def require_page(path: Path, *, option: str = "--report", overwrite: bool = False) -> None:
    """Raise unless a path is free, or holds a page.

    Raises:
        OptionError: Another file is there.
    """
    if not overwrite and path.exists() and not _is_page(path):
        raise OptionError(
            f"{option} {path}: exists and is no page of this command, so it is not replaced; name "
            f"another file, or add --overwrite"
        )


def write_page(path: Path, text: str, *, option: str = "--report", overwrite: bool = False) -> None:
    """Write a page as a file. It replaces another page, and any other file only if asked to.

    Raises:
        OptionError: Another file is there.
        OutputError: It cannot be written.
    """
    require_page(path, option=option, overwrite=overwrite)
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.encode())


def _is_page(path: Path) -> bool:
    """Tell whether a file was written by this command."""
    try:
        with path.open("rb") as file:
            return GENERATOR.encode() in file.read(1000)
    except OSError:
        return False


def write_page_beside(out: Path, progress: Progress) -> None:
    """Write the page into a finished output. A failure is a note: the output is complete."""
    try:
        require_plots()
    except OptionError:
        progress.note(
            f"no {PAGE_FILE}: matplotlib is missing; pip install 'frugal-bonsai[plots]', then "
            f"frugal-bonsai report {shlex.quote(str(out))}"
        )
        return
    try:
        write_page(out / PAGE_FILE, report_page(out))
    except Exception as error:  # whatever a drawing library raises, the model is finished
        progress.note(f"no {PAGE_FILE}: {type(error).__name__}: {error}")


def _commands(name: str, summary: Mapping[str, Any]) -> list[str]:
    """Return the lines that use the output, quoted for a shell."""
    quoted = shlex.quote(name)
    load = _QUOTED.sub(lambda _: f"({name!r})", str(summary.get("load", "")))
    return [
        *([f"python -i -c {_quoted_code(load)}"] if load else []),
        f"frugal-bonsai eval {quoted} --text FILE",
        f"frugal-bonsai adapt {quoted} --teacher MODEL --data SOURCE --out DIR",
        f"frugal-bonsai bench MODEL {quoted}",
        f"frugal-bonsai export {quoted} --format gguf --out FILE",
    ]


def _quoted_code(code: str) -> str:
    """Return code quoted for a shell, in double quotes where these change nothing."""
    return shlex.quote(code) if set(code) & set('"$`\\!') else f'"{code}"'
