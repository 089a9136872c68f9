"""The memory of a training: the best way to hold it that fits, or a refusal.

In: shapes, caps, what is to be trained. Out: a frozen, itemised :class:`TrainingPlan`, or a refusal
that names the largest item and the smallest cap that would work. Pure, as plan.py. The items are
training_items.py's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from frugal_bonsai.memory.budget import Budget
from frugal_bonsai.memory.phases import Phase, refusal
from frugal_bonsai.memory.plan import step_tokens
from frugal_bonsai.memory.training_items import (
    GPU_HEAD_CHUNKS,
    TrainingChoice,
    TrainingItems,
    TrainingWork,
)
from frugal_bonsai.memory.work import GPU, HOST, PlanItem
from frugal_bonsai.model.family import ModelSpec


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a training will hold.

    Attributes:
        phases: what is held together.
        budget: the caps.
        weights: how the frozen weights are held.
        rank: of the adapters; 0 without.
        optimiser: ``"adamw"`` or ``"adamw8bit"``.
        micro_batch: windows computed together.
        head_tokens: tokens whose logits are held.
    """

    phases: tuple[Phase, ...]
    budget: Budget
    weights: str
    rank: int
    optimiser: str
    micro_batch: int
    head_tokens: int

    def peak_phase(self, where: str) -> Phase:
        """The phase that holds most on ``host`` or ``gpu``."""
        return max(self.phases, key=lambda phase: phase.total_bytes(where))

    @property
    def all_items(self) -> tuple[tuple[PlanItem, tuple[str, ...]], ...]:
        """Every item once, in order, with the names of the phases that hold it."""
        held: dict[PlanItem, list[str]] = {}
        for phase in self.phases:
            for item in phase.items:
                held.setdefault(item, []).append(phase.name)
        return tuple((item, tuple(phases)) for item, phases in held.items())

    @property
    def items(self) -> tuple[PlanItem, ...]:
        """Of each place the items of the phase that holds most there."""
        return tuple(
            item
            for where in (GPU, HOST)
            for item in self.peak_phase(where).items
            if item.where == where
        )

    def total_bytes(self, where: str) -> int:
        """Predicted peak on ``host`` or ``gpu``."""
        return self.peak_phase(where).total_bytes(where)


def plan_training(
    spec: ModelSpec, budget: Budget, work: TrainingWork, *, base_bytes: int
) -> TrainingPlan:
    """Fit a training into the caps: the weights first, then rank, optimiser, micro-batch.

    Native weights before int8 before streamed ones, the largest rank, the first optimiser that is
    allowed, and the largest micro-batch that divides the batch.

    Args:
        spec: the pruned model's shapes.
        budget: caps.
        work: what is to be trained.
        base_bytes: what the process holds before the model (measured or nominal).

    Raises:
        BudgetError: nothing fits; names the largest item and the smallest cap that works.
    """
    build = TrainingItems(spec, budget, work, base_bytes)
    choices = [
        TrainingChoice(weights=weights, rank=rank, optimiser=optimiser, micro_batch=1)
        for weights in build.weights()
        for rank in build.ranks()
        for optimiser in work.optimisers
    ]
    choice = next((choice for choice in choices if build.fits(choice)), None)
    if choice is None:
        _refuse(build, choices)
    assert choice is not None
    for chunks in GPU_HEAD_CHUNKS if budget.gpu_bytes is not None else ():
        larger = replace(choice, head_chunks=chunks)
        if build.fits(larger):
            choice = larger
            break
    for micro_batch in _divisors(work.batch, max(1, step_tokens(spec, budget) // work.window)):
        larger = replace(choice, micro_batch=micro_batch)
        if build.fits(larger):
            choice = larger
            break
    return TrainingPlan(
        phases=tuple(build.phases(choice)),
        budget=budget,
        weights=choice.weights,
        rank=choice.rank,
        optimiser=choice.optimiser,
        micro_batch=choice.micro_batch,
        head_tokens=build.head_tokens(choice),
    )


def _divisors(batch: int, most: int) -> list[int]:
    """Micro-batches that make up a batch, the largest first."""
    return [n for n in range(min(batch, most), 0, -1) if batch % n == 0]


def _refuse(build: TrainingItems, choices: list[TrainingChoice]) -> None:
    """Say what the choice that comes closest to the caps would need.

    Streamed weights are not always the smallest: they keep the boundaries of a whole step's
    windows.
    """
    caps = build.caps()

    def excess(choice: TrainingChoice) -> float:
        phases = build.phases(choice)
        return max(p.total_bytes(where) / max(cap, 1) for p in phases for where, cap, _ in caps)

    phases = build.phases(min(choices, key=excess))
    for where, cap, option in caps:
        phase = max(phases, key=lambda phase: phase.total_bytes(where))
        if phase.total_bytes(where) > cap:
            raise refusal(phase, where, cap, option)
