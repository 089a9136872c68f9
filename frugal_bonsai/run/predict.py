"""The time that a prune will take, from its options, its plan and a machine's profile.

In: a prepared prune and its memory plan. Out: the work that its time depends on, and a prediction
as plain values. Holds nothing.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from frugal_bonsai.bonsai.selection.extent import (
    MOST_SCALES,
    round_goals,
    round_windows,
    scale_windows,
    trial_windows,
)
from frugal_bonsai.bonsai.settings import GROUP, NONE, REFINE_ITERATIONS
from frugal_bonsai.hardware.estimate import estimate_time
from frugal_bonsai.hardware.profile import INT8
from frugal_bonsai.hardware.time_model import PruneWork, TimeEstimate
from frugal_bonsai.memory.plan import MemoryPlan
from frugal_bonsai.memory.work import refined_blocks, refining_passes
from frugal_bonsai.model.family import ModelSpec
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
    from frugal_bonsai.bonsai.masks.sampling import batch_ends
    from frugal_bonsai.bonsai.selection.candidates import MOST_CUTS, MOST_CUTS_SPARED

    settings = ready.settings
    removed = [0.0, *round_goals(settings)]
    mask_windows = min(settings.mask_windows, windows)
    columns = max(group.columns for group in model.spec.table.groups)
    part = round_windows(settings, columns, ready.window, windows)
    tries = settings.tries(uniform=ready.rules.uniform)
    fitted, held_out = trial_windows(columns, ready.window, windows) if tries else (0, 0)
    # Those it is judged by take the pruned model alone through them, at most two passes of three.
    trial = fitted + math.ceil(held_out * 2 / 3)
    # Each batch but the first goes without the unmasked windows.
    ends = [-1, *batch_ends(settings.masks, settings.certainty)]
    batches = tuple(mask_windows * (end - start) for start, end in pairwise(ends))
    tensors = model.checkpoint.tensors
    elements = sum(math.prod(entry.shape) for entry in tensors.values())
    return PruneWork(
        window=ready.window,
        windows=windows,
        reported=held_out_count(windows) + eval_windows,
        shares=tuple(1 - share for share in removed),
        pairs=0 if settings.level == NONE else mask_windows * (settings.masks + 1),
        exact_prior=settings.prior == "exact",
        recovery=settings.recovery,
        refit_inputs=settings.recovery and settings.refit == "all",
        keep_inputs=memory.keep_inputs,
        int8_store=settings.weights == "int8",
        source_bytes=round(model.checkpoint.weight_bytes / elements),
        planned_bytes=memory.total_bytes("host"),
        sampled_tokens=ready.window - 1 if ready.source == "self" else 0,
        arithmetic=INT8 if settings.arithmetic == "int8" else None,
        part=part,
        trial=trial,
        trial_cuts=MOST_CUTS if settings.level == GROUP else MOST_CUTS_SPARED,
        batches=() if settings.level == NONE else batches,
        pool=settings.pool if settings.stand_ins(uniform=ready.rules.uniform) else 0.0,
        rescaled=(
            scale_windows(ready.window, windows) if settings.recovery and settings.rescale else 0
        ),
        refine=settings.refine if settings.recovery else 0,
        refine_iterations=REFINE_ITERATIONS,
        refine_blocks=refined_blocks(columns),
        keep_refinement=memory.keep_refinement,
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


def forward_tokens(spec: ModelSpec, work: PruneWork) -> int:
    """Tokens through the whole model that a prune's search spends at most.

    Every round may spend all masks, and try all cuts of its trial. The scale of the logits takes
    passes of the head, counted by its share of the model. Refinement passes through a part of
    what is left of the model, counted as all of it: in each step there and back and for a solve,
    and once at the end.
    """
    calibration, part = work.windows * work.window, work.part_windows * work.window
    masked = work.rounds * work.pairs * work.window
    if not work.recovery:
        return masked + work.rounds * calibration
    again = 2 if work.keep_inputs else 3
    recovered = (work.rounds - 1) * part + calibration
    tried = work.rounds * work.trial_cuts * work.trial * work.window
    refined = 0.0
    if work.refine:
        passes = refining_passes(
            work.refine_blocks, keep=work.keep_refinement, iterations=work.refine_iterations
        )
        refined = (passes + work.refine + 1) * work.shares[-1]
    head = spec.vocabulary * spec.hidden
    scaled = MOST_SCALES * work.rescaled * work.window * head / (head + spec.block_parameters)
    searched = masked + part + again * (recovered + tried)
    return searched + math.ceil(refined * calibration + scaled)
