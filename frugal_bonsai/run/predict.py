"""The time that a prune will take, from its workload, its plan and a machine's profile.

In: a prepared prune, its workload and its memory plan. Out: a prediction as plain values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from frugal_bonsai.hardware.prune_time import estimate_time
from frugal_bonsai.hardware.time_model import TimeEstimate
from frugal_bonsai.memory.plan import MemoryPlan
from frugal_bonsai.memory.work import PruneWorkload
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


def predict(
    model: Model, ready: Prepared, work: PruneWorkload, memory: MemoryPlan
) -> dict[str, Any] | None:
    """The time that a prune will take, for its report; None without a profile."""
    if ready.profile is None:
        return None
    estimate = estimate_time(model.spec, ready.operations, work, memory, ready.profile)
    return {
        "seconds": estimate.total_seconds,
        "binds": estimate.binds,
        "phases": describe_phases(estimate),
        "profile": ready.profile.source,
    }
