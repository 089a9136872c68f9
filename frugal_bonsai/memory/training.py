"""The memory of a training: the fastest form that fits into the caps.

In: shapes, caps, a training. Out: a frozen, itemised :class:`TrainingPlan`, or an error that names
the largest item and the smallest cap that works. Pure, as plan.py. The items are in
training_items.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from frugal_bonsai.memory.budget import Budget
from frugal_bonsai.memory.hints import advise, smaller_trainings
from frugal_bonsai.memory.phases import CommandPhases, PlannedPhases
from frugal_bonsai.memory.plan import step_tokens
from frugal_bonsai.memory.training_items import (
    GPU_HEAD_CHUNKS,
    INT8,
    NATIVE,
    STREAMED,
    TrainingChoice,
    TrainingItems,
    TrainingWork,
)
from frugal_bonsai.memory.work import PlanItem
from frugal_bonsai.model.family import ModelSpec

RANKS = (64, 32, 16, 8, 4)
# Largest rank of an adapter, as a share of the hidden size: beyond it, full training is smaller.
_RANK_SHARE = 4


@dataclass(frozen=True, kw_only=True)
class TrainingPlan(PlannedPhases, TrainingChoice):
    """Predicted memory of a training, and the sizes chosen for it.

    Attributes:
        head_tokens: Tokens whose logits are held.
    """

    head_tokens: int

    @property
    def all_items(self) -> tuple[tuple[PlanItem, tuple[str, ...]], ...]:
        """Every item once, in order, with the names of the phases that hold it."""
        held: dict[PlanItem, list[str]] = {}
        for phase in self.phases:
            for item in phase.items:
                held.setdefault(item, []).append(phase.name)
        return tuple((item, tuple(phases)) for item, phases in held.items())


def plan_training(
    spec: ModelSpec, budget: Budget, work: TrainingWork, *, base_bytes: int
) -> TrainingPlan:
    """Choose the form of a training so that it fits into the caps.

    Native weights are preferred to int8 weights and these to streamed ones; then the largest rank,
    the first optimiser that is allowed, and the largest micro-batch that divides the batch.

    Args:
        spec: Shapes of the pruned model.
        budget: The caps.
        work: The training.
        base_bytes: Bytes that the process holds before the model (measured or nominal).

    Raises:
        BudgetError: Nothing fits; names the largest item and the smallest cap that works.
    """
    items = TrainingItems(spec, budget, work)
    choices = _choices(spec, work)
    # Streamed weights do not always need least: they keep the boundaries of all windows of a step.
    # So the error names the choice that comes closest to the caps.
    closest = min(choices, key=lambda choice: _planned(items, base_bytes, choice).excess)

    def fits(smaller: TrainingWork) -> bool:
        other = TrainingItems(spec, budget, smaller)
        return _first_that_fits(other, base_bytes, _choices(spec, smaller)) is not None

    _planned(items, base_bytes, closest).require_fit(lambda: advise(smaller_trainings(work), fits))
    choice = _first_that_fits(items, base_bytes, choices) or closest
    if budget.gpu_bytes is not None:
        larger = [replace(choice, head_chunks=chunks) for chunks in GPU_HEAD_CHUNKS]
        choice = _first_that_fits(items, base_bytes, larger) or choice
    most = min(work.batch, max(1, step_tokens(spec, budget) // work.window))
    divisors = [size for size in range(most, 0, -1) if work.batch % size == 0]
    larger = [replace(choice, micro_batch=size) for size in divisors]
    choice = _first_that_fits(items, base_bytes, larger) or choice
    return TrainingPlan(
        phases=_planned(items, base_bytes, choice).phases,
        budget=budget,
        head_tokens=items.head_tokens(choice),
        **vars(choice),
    )


def _planned(items: TrainingItems, base_bytes: int, choice: TrainingChoice) -> PlannedPhases:
    build, held = CommandPhases(items, base_bytes), items.held(choice)
    layers = build.phase("training: layers", [*held, *items.layers(choice)])
    head = build.phase("training: head", [*held, *items.head(choice)])
    return PlannedPhases(phases=(layers, head), budget=items.budget)


def _first_that_fits(
    items: TrainingItems, base_bytes: int, choices: list[TrainingChoice]
) -> TrainingChoice | None:
    return next((c for c in choices if _planned(items, base_bytes, c).fits), None)


def _choices(spec: ModelSpec, work: TrainingWork) -> list[TrainingChoice]:
    """Return every form with the smallest micro-batch, in order of preference."""
    return [
        TrainingChoice(weights=weights, rank=rank, optimiser=optimiser, micro_batch=1)
        for weights in _weights(work)
        for rank in _ranks(spec, work)
        for optimiser in work.optimisers
    ]


def _weights(work: TrainingWork) -> Sequence[str]:
    """Forms of the frozen weights that are allowed, in order of preference."""
    if not work.lora:
        return (NATIVE,)
    return (NATIVE, INT8, STREAMED) if work.weights is None else (work.weights,)


def _ranks(spec: ModelSpec, work: TrainingWork) -> Sequence[int]:
    """Ranks that are allowed, the largest first."""
    if not work.lora:
        return (0,)
    if work.rank is not None:
        return (work.rank,)
    most = max(RANKS[-1], spec.hidden // _RANK_SHARE)
    return [rank for rank in RANKS if rank <= most]
