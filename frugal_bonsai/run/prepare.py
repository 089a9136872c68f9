"""A prune made ready: options resolved, texts read, memory planned, calibration windows at hand.

In: an open model and options. Out: a :class:`PruneRun`, which ``prune`` searches with. Holds the
windows and the engine's skeleton; reads weights only to check and, for ``self``, to sample.

Shape suffixes: n windows, S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frugal_bonsai.bonsai.calibration import (
    Calibration,
    held_out_count,
    split_windows,
)
from frugal_bonsai.bonsai.written_text import sample_windows
from frugal_bonsai.checkpoint.finite import require_finite
from frugal_bonsai.memory.disk import RUN
from frugal_bonsai.memory.hints import advise, smaller_files
from frugal_bonsai.memory.plan import MemoryPlan
from frugal_bonsai.memory.prune_disk import plan_disk
from frugal_bonsai.progress import Progress
from frugal_bonsai.report.words import duration
from frugal_bonsai.run.disk_room import require_room
from frugal_bonsai.run.engine import make_engine
from frugal_bonsai.run.open import Model
from frugal_bonsai.run.options import PruneOptions
from frugal_bonsai.run.plan import PlannedPrune, plan_fitting, predict, sampling_note, spill_note
from frugal_bonsai.run.resolve import ResolvedPrune, resolve
from frugal_bonsai.run.texts import Text, read_eval_text, read_spread_windows
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.text.sources import SELF


@dataclass(frozen=True, kw_only=True)
class PruneRun(PlannedPrune):
    """A planned prune that is ready to search.

    Attributes:
        source: Name of the calibration text.
        eval_text: The text of ``--eval-text``. None without one.
        engine: Engine of the dense model, within the plan's limits.
        calibration: Windows to search on and windows that are held out.
    """

    source: str
    eval_text: Text | None
    engine: Engine
    calibration: Calibration


def prepare_run(
    model: Model,
    options: PruneOptions,
    folders: Mapping[str, Path],
    *,
    begun: Mapping[str, Any],
    finished: int,
    custom_utility: bool,
    progress: Progress,
    on_plan: Callable[[MemoryPlan], None] | None,
) -> PruneRun:
    """Make a prune ready, or refuse it.

    Args:
        model: The dense model.
        options: The user's options.
        folders: Paths of the run directory and of the output, as the disk plan names them.
        begun: Settings of the run that is resumed, empty for a new one.
        finished: Number of its finished rounds.
        custom_utility: The user passes a utility, which needs all logits of a window.
        progress: Told of notes and sweeps.
        on_plan: Told of the memory plan before any work.

    Raises:
        FrugalBonsaiError: An option cannot work, or the prune does not fit.
    """
    resolved = resolve(model, options, begun=begun)
    budget = resolved.machine.budget
    progress.caps(budget.host_bytes, budget.gpu_bytes)
    for note in (*budget.notes, *resolved.notes):
        progress.note(note)
    eval_text = read_eval_text(model, options.eval_text, resolved.window)
    text = _read_calibration(model, resolved)
    planned = plan_fitting(
        model,
        resolved,
        resolved.windows if text is None else min(resolved.windows, len(text.windows_nS)),
        eval_windows=0 if eval_text is None else len(eval_text.windows_nS),
        custom_utility=custom_utility,
    )
    if on_plan is not None:
        on_plan(planned.memory)
    predicted = predict(planned)
    if predicted is not None:
        progress.note(f"predicted: about {duration(predicted['seconds'])}")
    if planned.memory.spilled_bytes:
        progress.note(spill_note(planned))
    if text is None:
        progress.note(sampling_note(planned))
    require_run_room(planned, folders, finished)
    engine = _make_engine(planned, progress, folders[RUN])
    text = text or _sample(planned, engine)
    return PruneRun(
        **vars(planned),
        source=text.name,
        eval_text=eval_text,
        engine=engine,
        calibration=_split(text, resolved.windows, progress),
    )


def require_run_room(planned: PlannedPrune, folders: Mapping[str, Path], finished: int) -> None:
    """Check that the disks have room for the rounds that are left and the output.

    Raises:
        OutputError: A disk has too little room.
    """
    require_room(
        planned.memory.disk.after(finished),
        folders,
        "this prune",
        held=folders[RUN],
        resumed=finished > 0,
        advise=lambda fits: advise(
            smaller_files(planned.work),
            lambda other: fits(
                plan_disk(planned.model.spec, other, spilled_bytes=planned.memory.spilled_bytes)
            ),
            where="On this disk",
        ),
    )


def _make_engine(planned: PlannedPrune, progress: Progress, disk: Path) -> Engine:
    """Return the dense model's engine, once the weights outside the layers are checked."""
    model, resolved = planned.model, planned.resolved
    # The layers' weights are checked as the working store is written.
    require_finite(model.checkpoint, model.spec.other_tensors)
    device, arithmetic = resolved.machine.device, resolved.settings.arithmetic
    return make_engine(model, planned.memory, device, progress, arithmetic=arithmetic, disk=disk)


def _read_calibration(model: Model, resolved: ResolvedPrune) -> Text | None:
    """Read the calibration text; None if it is sampled, which needs the engine."""
    if resolved.source == SELF:
        return None
    wanted = resolved.windows + held_out_count(resolved.windows)
    return read_spread_windows(
        model, resolved.source, resolved.window, windows=wanted, option="--calibration"
    )


def _sample(planned: PlannedPrune, engine: Engine) -> Text:
    """Sample the calibration text from the dense model."""
    work, seed = planned.work, planned.resolved.settings.seed
    windows_nS = sample_windows(engine, work.sampled, work.window, seed=seed)
    return Text("self (sampled from the model)", windows_nS)


def _split(text: Text, windows: int, progress: Progress) -> Calibration:
    """Take the calibration windows of a text, and hold some of them out."""
    calibration = split_windows(text.windows_nS, windows, f"--calibration {text.name}")
    count, window = calibration.windows_NS.shape
    progress.note(
        f"calibration: {text.name}, {count} windows of {window} tokens, "
        f"{len(calibration.held_out_NS)} held out"
    )
    return calibration
