"""A prune made ready: options resolved, texts read, memory planned, calibration windows at hand.

In: an open model and options. Out: a :class:`PruneRun`, which ``prune`` searches with. Holds the
windows and the engine's skeleton; reads weights only to check and, for ``self``, to sample.

Shape suffixes: n, N and K windows, S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from frugal_bonsai.bonsai.calibration import (
    Calibration,
    held_out_count,
    sample_windows,
    split_windows,
)
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
from frugal_bonsai.run.plan import PlannedPrune, plan_fitting, predict, sampling_note
from frugal_bonsai.run.resolve import ResolvedPrune, resolve
from frugal_bonsai.run.texts import Text, read_eval_text, read_windows
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.text.sources import SELF


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Token windows of the texts, read before the plan.

    Attributes:
        source: Name of the calibration text.
        windows_nS: Its windows, int64. None for ``self``: sampled when the engine exists.
        windows: Number of calibration windows that are planned for.
        eval_text: The text of ``--eval-text``. None without one.
    """

    source: str
    windows_nS: torch.Tensor | None
    windows: int
    eval_text: Text | None = None


@dataclass(frozen=True, kw_only=True)
class PruneRun(PlannedPrune):
    """A planned prune that is ready to search.

    Attributes:
        texts: The texts, as read.
        predicted: The predicted time as plain values. None without a profile.
        engine: Engine of the dense model, within the plan's limits.
        calibration: Windows to search on and windows that are held out.
    """

    texts: Texts
    predicted: dict[str, Any] | None
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
    texts = _read_texts(model, resolved, options)
    planned = plan_fitting(
        model,
        resolved,
        texts.windows,
        eval_windows=0 if texts.eval_text is None else len(texts.eval_text.windows_nS),
        custom_utility=custom_utility,
    )
    if on_plan is not None:
        on_plan(planned.memory)
    predicted = predict(planned)
    if predicted is not None:
        progress.note(f"predicted: about {duration(predicted['seconds'])}")
    if texts.windows_nS is None:
        progress.note(sampling_note(planned))
    _require_room(planned, folders, finished)
    engine = _make_engine(planned, progress)
    return PruneRun(
        **vars(planned),
        texts=texts,
        predicted=predicted,
        engine=engine,
        calibration=_calibrate(planned, texts, engine),
    )


def _require_room(planned: PlannedPrune, folders: Mapping[str, Path], finished: int) -> None:
    """Raise if a disk has too little room for the rounds that are left and the output."""
    require_room(
        planned.memory.disk.after(finished),
        folders,
        "this prune",
        held=folders[RUN],
        resumed=finished > 0,
        advise=lambda fits: advise(
            smaller_files(planned.work),
            lambda other: fits(plan_disk(planned.model.spec, other)),
            where="On this disk",
        ),
    )


def _make_engine(planned: PlannedPrune, progress: Progress) -> Engine:
    """Return the dense model's engine, once the weights outside the layers are checked."""
    model, resolved = planned.model, planned.resolved
    # The layers' weights are checked as the working store is written.
    require_finite(model.checkpoint, model.spec.other_tensors)
    device, arithmetic = resolved.machine.device, resolved.settings.arithmetic
    return make_engine(model, planned.memory, device, progress, arithmetic=arithmetic)


def _read_texts(model: Model, resolved: ResolvedPrune, options: PruneOptions) -> Texts:
    """Read the calibration text, unless it is sampled, and the text of ``--eval-text``."""
    window, windows = resolved.window, resolved.windows
    eval_text = read_eval_text(model, options.eval_text, window)
    source, windows_nS = "self (sampled from the model)", None
    if resolved.source != SELF:
        wanted = windows + held_out_count(windows)
        source, windows_nS = read_windows(
            model, resolved.source, window, windows=wanted, option="--calibration"
        )
    return Texts(
        source=source,
        windows_nS=windows_nS,
        windows=windows if windows_nS is None else min(windows, len(windows_nS)),
        eval_text=eval_text,
    )


def _calibrate(planned: PlannedPrune, texts: Texts, engine: Engine) -> Calibration:
    """Sample the calibration windows if they are not read, and hold some of them out."""
    resolved, work, windows_nS = planned.resolved, planned.work, texts.windows_nS
    if windows_nS is None:
        seed = resolved.settings.seed
        windows_nS = sample_windows(engine, work.sampled, work.window, seed=seed)
    calibration = split_windows(windows_nS, resolved.windows, f"--calibration {texts.source}")
    engine.progress.note(
        f"calibration: {texts.source}, {len(calibration.windows_NS)} windows of {work.window} "
        f"tokens, {len(calibration.held_out_NS)} held out"
    )
    return calibration
