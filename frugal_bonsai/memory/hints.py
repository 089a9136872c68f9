"""Advice for work that does not fit: smaller work that was tried in the planner and fits.

In: a workload, and a function that plans one. Out: text for the error. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

from frugal_bonsai.memory.training_items import TrainingWork
from frugal_bonsai.memory.work import PruneWorkload, SweepWorkload

_Work = TypeVar("_Work", SweepWorkload, TrainingWork)
_LEAST_WINDOW, _LEAST_WINDOWS, _LEAST_RANK = 128, 8, 4


def advise(
    changes: Iterator[tuple[str, _Work]],
    fits: Callable[[_Work], bool],
    *,
    where: str = "Under this cap",
) -> str:
    """Return the options that would make the work fit into the same room; empty without any.

    Of several values of one option, the text names the first that fits: it changes least.
    """
    found: dict[str, str] = {}
    for option, work in changes:
        name = option.partition(" ")[0]
        if name not in found and fits(work):
            found[name] = option
    return f". {where} it fits with {' or with '.join(found.values())}" if found else ""


def smaller_sweeps(work: SweepWorkload) -> Iterator[tuple[str, SweepWorkload]]:
    """Yield options that make a command smaller, and the work that is left with each."""
    if isinstance(work, PruneWorkload):
        if work.written:
            yield "--self-windows 0", replace(work, written=0)
        if work.channel_updates:
            yield "--refine 0", replace(work, channel_updates=0)
        if work.reconstruction:
            yield "--no-recovery", _without_recovery(work)
        for windows in _halves(work.windows, _LEAST_WINDOWS):
            yield f"--windows {windows}", _with_windows(work, windows)
    for window in _halves(work.window, _LEAST_WINDOW):
        yield f"--window {window}", replace(work, window=window)


def smaller_files(work: PruneWorkload) -> Iterator[tuple[str, PruneWorkload]]:
    """Yield options that make the files of a prune smaller, and the work that is left with each."""
    if work.weights != "int8":
        yield "--weights int8", replace(work, weights="int8")
    if work.refit_inputs:
        yield "--refit outputs", replace(work, refit_inputs=False)
    if work.reconstruction:
        yield "--no-recovery", _without_recovery(work)


def smaller_trainings(work: TrainingWork) -> Iterator[tuple[str, TrainingWork]]:
    """Yield options that make a training smaller, and the work that is left with each."""
    if work.weights is not None:
        yield "another --weights, or none named", replace(work, weights=None)
    for rank in _halves(work.rank or 0, _LEAST_RANK):
        yield f"--rank {rank}", replace(work, rank=rank)
    for batch in _halves(work.batch, 1):
        yield f"--batch {batch}", replace(work, batch=batch)
    for window in _halves(work.window, _LEAST_WINDOW):
        yield f"--window {window}", replace(work, window=window)


def _without_recovery(work: PruneWorkload) -> PruneWorkload:
    return replace(
        work,
        reconstruction=False,
        refit_inputs=False,
        written=0,
        channel_updates=0,
        trial_windows=0,
        candidates=0,
        scale_windows=0,
    )


def _with_windows(work: PruneWorkload, windows: int) -> PruneWorkload:
    return replace(
        work,
        windows=windows,
        part_windows=min(work.part_windows, windows),
        mask_windows=min(work.mask_windows, windows),
        sampled=min(work.sampled, windows + max(1, windows // 8)),
        trial_windows=min(work.trial_windows, windows),
        scale_windows=min(work.scale_windows, windows),
    )


def _halves(value: int, least: int) -> Iterator[int]:
    """Yield half of a value, a quarter, and so on, down to the least."""
    while value // 2 >= least:
        value //= 2
        yield value
