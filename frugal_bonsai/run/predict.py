"""The time that a prune will take, from its options, its plan and a machine's profile.

In: a prepared prune and its memory plan. Out: the work that its time depends on, and a prediction
as plain values. Holds nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from frugal_bonsai.memory.estimate import estimate_time
from frugal_bonsai.memory.hardware import INT8
from frugal_bonsai.memory.plan import MemoryPlan
from frugal_bonsai.memory.time_model import PruneWork, TimeEstimate
from frugal_bonsai.run.prepare import Model

if TYPE_CHECKING:
    from frugal_bonsai.run.plan import Prepared


def describe_phases(estimate: TimeEstimate) -> list[dict[str, Any]]:
    """A time estimate's phases as plain values, seconds each."""
    return [
        {
            "name": phase.name,
            "seconds": phase.seconds,
            "compute": phase.compute,
            "elementwise": phase.elementwise,
            "disk": phase.disk,
            "copy": phase.copy,
            "binds": phase.binds,
        }
        for phase in estimate.phases
    ]


def prune_work(
    model: Model,
    ready: Prepared,
    memory: MemoryPlan,
    windows: int,
    *,
    eval_windows: int = 0,
) -> PruneWork:
    """What the prune does, as far as its time depends on it.

    Args:
        model: the model.
        ready: the prepared prune.
        memory: its plan.
        windows: calibration windows.
        eval_windows: of the text that the user names with ``--eval-text``.
    """
    from frugal_bonsai.bonsai.calibration import held_out_count

    settings = ready.settings
    rounds = math.ceil(settings.sparsity / settings.step - 1e-9)
    # The last round takes a sliver that would be left over (bonsai/search.py).
    if settings.sparsity - (rounds - 1) * settings.step < 0.2 * settings.step and rounds > 1:
        rounds -= 1
    removed = [*(settings.step * number for number in range(rounds)), settings.sparsity]
    mask_windows = min(settings.mask_windows, windows)
    tensors = model.checkpoint.tensors
    elements = sum(math.prod(entry.shape) for entry in tensors.values())
    return PruneWork(
        window=ready.window,
        windows=windows,
        reported=held_out_count(windows) + eval_windows,
        shares=tuple(1 - share for share in removed),
        pairs=0 if settings.method == "local" else mask_windows * (settings.masks + 1),
        exact_prior=settings.prior == "exact",
        recovery=settings.recovery,
        refit_inputs=settings.recovery and settings.refit == "all",
        keep_inputs=memory.keep_inputs,
        int8_store=settings.weights == "int8",
        source_bytes=round(model.checkpoint.weight_bytes / elements),
        planned_bytes=memory.total_bytes("host"),
        sampled_tokens=ready.window - 1 if ready.source == "self" else 0,
        arithmetic=INT8 if settings.arithmetic == "int8" else None,
    )


def predict(
    model: Model, ready: Prepared, memory: MemoryPlan, windows: int, *, eval_windows: int = 0
) -> dict[str, Any] | None:
    """The time that a prune will take, for its report; None without a profile."""
    if ready.profile is None:
        return None
    work = prune_work(model, ready, memory, windows, eval_windows=eval_windows)
    estimate = estimate_time(model.spec, work, memory.limits, ready.profile)
    return {
        "seconds": estimate.total_seconds,
        "binds": estimate.binds,
        "phases": describe_phases(estimate),
        "profile": ready.profile.source,
    }


def forward_tokens(work: PruneWork) -> int:
    """Tokens through the whole model that a prune's search spends."""
    calibration = work.windows * work.window
    again = (2 if work.keep_inputs else 3) if work.recovery else 1
    rounds = work.rounds * (work.pairs * work.window + again * calibration)
    return calibration + rounds - (0 if work.recovery else calibration)
