"""Threads, progress and printing, which every command shares."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from frugal_bonsai.cli.command import QUIET, VERBOSE, verbosity
from frugal_bonsai.plain_json import json_text
from frugal_bonsai.progress import Silent
from frugal_bonsai.ranks.launch import launched


@contextmanager
def watched(threads: int | None = None, *, quiet: bool = False) -> Iterator[Any]:
    """Set the number of threads and show progress on standard error while a command works.

    ``--quiet`` shows none, and so does ``quiet``. ``--verbose`` shows a line for every layer, and
    what libraries log.
    """
    set_threads(threads)
    level = verbosity(click.get_current_context())
    if quiet or level == QUIET:
        yield Silent()
        return
    if level == VERBOSE:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    from frugal_bonsai.report.live import PlainProgress, make_progress

    if level == VERBOSE:
        yield PlainProgress(sys.stderr, seconds=0.0)
        return
    with make_progress() as progress:
        yield progress


def is_worker() -> bool:
    """Return whether this process works for rank 0 of its launch, and prints nothing."""
    launch = launched()
    return launch is not None and launch.rank > 0


def set_threads(threads: int | None) -> None:
    """Set the number of CPU threads; None keeps it."""
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        import torch

        torch.set_num_threads(threads)


def print_result(
    values: dict[str, Any], render: Callable[[dict[str, Any], Any], None], *, as_json: bool
) -> None:
    """Print one JSON object, or tables on the console."""
    if as_json:
        click.echo(json_text(values))
        return
    from rich.console import Console

    render(values, Console())
