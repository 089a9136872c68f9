"""What every command does around its work: threads, progress, printing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click


@contextmanager
def watched(given: dict[str, Any]) -> Iterator[Any]:
    """Threads set, progress on standard error, for as long as the command works."""
    set_threads(given.pop("threads"))
    from frugal_bonsai.memory.budget import find_device, make_budget
    from frugal_bonsai.report.live import make_progress

    device = find_device(given["device"])
    budget = make_budget(device, given["max_gpu_mem"], given["max_cpu_mem"])
    with make_progress(budget.host_bytes, gpu_cap_bytes=budget.gpu_bytes) as progress:
        yield progress


def set_threads(threads: int | None) -> None:
    """CPU threads of everything that follows; None leaves them as they are."""
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        import torch

        torch.set_num_threads(threads)


def print_result(
    values: dict[str, Any], render: Callable[[dict[str, Any], Any], None], *, as_json: bool
) -> None:
    """One JSON object, or tables on the console."""
    if as_json:
        click.echo(json.dumps(values, allow_nan=False))
        return
    from rich.console import Console

    render(values, Console())
