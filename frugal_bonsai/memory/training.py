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
from frugal_bonsai.memory.phases import MemoryPhase, PhaseBuilder, PlannedPhases
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
class TrainingPlan(PlannedPhases):
    """Predicted memory of a training, and the form chosen for it.

    Attributes:
        weights: Form of the frozen weights.
        rank: Rank of the adapters. 0 without.
        optimiser: ``"adamw"`` or ``"adamw8bit"``.
        micro_batch: Windows computed together.
        head_tokens: Tokens whose logits are held.
    """

    weights: str
    rank: int
    optimiser: str
    micro_batch: int
    head_tokens: int

    @property
    def all_items(self) -> tuple[tuple[PlanItem, tuple[str, ...]], ...]:
        """Every item once, in order, with the names of the phases that hold it."""
        held: dict[PlanItem, list[str]] = {}
        for phase in self.phases:
            for item in phase.items:
                held.setdefault(item, []).append(phase.name)
        return tuple((item, tuple(phases)) for item, phases in held.items())


class _TrainingPhases(PhaseBuilder[TrainingChoice]):
    def __init__(self, items: TrainingItems, budget: Budget, base_bytes: int) -> None:
        super().__init__(items, budget, base_bytes)
        self._items = items

    def of(self, choice: TrainingChoice) -> list[MemoryPhase]:
        items, held = self._items, self._items.held(choice)
        return [
            self.phase("training: layers", [*held, *items.layers(choice)]),
            self.phase("training: head", [*held, *items.head(choice)]),
        ]

    def excess(self, choice: TrainingChoice) -> float:
        """Return the largest ratio of a phase's bytes to their cap."""
        phases, caps = self.of(choice), self.caps()
        return max(p.total_bytes(where) / max(cap, 1) for p in phases for where, cap, _ in caps)


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
    build = _TrainingPhases(items, budget, base_bytes)
    choices = _choices(spec, work)
    choice = next((choice for choice in choices if build.fits(choice)), None)
    if choice is None:
        # Streamed weights do not always need least: they keep the boundaries of all windows of a
        # step. So the error names the choice that comes closest to the caps.
        choice = min(choices, key=build.excess)

        def fits(smaller: TrainingWork) -> bool:
            other = _TrainingPhases(TrainingItems(spec, budget, smaller), budget, base_bytes)
            return any(other.fits(choice) for choice in _choices(spec, smaller))

        build.refuse(choice, advise(smaller_trainings(work), fits))
    if budget.gpu_bytes is not None:
        larger = [replace(choice, head_chunks=chunks) for chunks in GPU_HEAD_CHUNKS]
        choice = next((c for c in larger if build.fits(c)), choice)
    divisors = _divisors(work.batch, max(1, step_tokens(spec, budget) // work.window))
    larger = [replace(choice, micro_batch=size) for size in divisors]
    choice = next((c for c in larger if build.fits(c)), choice)
    return TrainingPlan(
        phases=tuple(build.of(choice)),
        budget=budget,
        weights=choice.weights,
        rank=choice.rank,
        optimiser=choice.optimiser,
        micro_batch=choice.micro_batch,
        head_tokens=items.head_tokens(choice),
    )


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


def _divisors(batch: int, most: int) -> list[int]:
    """Return the sizes of micro-batches that divide a batch, the largest first."""
    return [n for n in range(min(batch, most), 0, -1) if batch % n == 0]
