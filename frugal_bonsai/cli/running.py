"""Threads, progress and printing, which every command shares."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from frugal_bonsai.plain_json import json_text


@contextmanager
def watched(threads: int | None = None) -> Iterator[Any]:
    """Set the number of threads and show progress on standard error while a command works."""
    set_threads(threads)
    from frugal_bonsai.report.live import make_progress

    with make_progress() as progress:
        yield progress


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
