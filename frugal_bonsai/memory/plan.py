"""The memory planner: what is held, where, and how much work fits beside it.

In: shapes, caps, the work to be done. Out: a frozen, itemised :class:`MemoryPlan`, or a refusal
that names the largest item and the smallest cap that would work. A pure function: it reads no file
and no device. The items and their formulas are in items.py, which of them are held together in
phases.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from frugal_bonsai.accelerator import is_accelerator
from frugal_bonsai.memory.budget import Budget
from frugal_bonsai.memory.command_items import CommandItems
from frugal_bonsai.memory.phases import Phase, Phases, refusal
from frugal_bonsai.memory.prune_items import PruneItems
from frugal_bonsai.memory.prune_phases import PrunePhases
from frugal_bonsai.memory.work import (
    BASE,
    DISK,
    GPU,
    HOST,
    Choice,
    PlanItem,
    PruneWorkload,
    SweepLimits,
    SweepWorkload,
)
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.sizes import MIB

__all__ = [
    "MemoryPlan",
    "PlanItem",
    "PruneWorkload",
    "SweepLimits",
    "SweepWorkload",
    "plan_memory",
]

# Micro-batches beyond this many tokens gain nothing: matrix products are long enough. On a CPU,
# int8 products lose once a micro-batch has left the cache, fp32 ones gain up to 2,048 tokens (1B
# shape, seconds of one sweep with 512, 1,024 and 2,048: int8 3.5, 3.6, 3.6; fp32 10.6, 10.2,
# 10.0), and small layers need many tokens to outweigh the call of a layer.
_GPU_TOKENS, _GPU_TOKENS_IN_FLIGHT = 16384, 2**19
_CPU_TOKENS, _CPU_LEAST_TOKENS, _CPU_MICRO_BATCH_BYTES = 4096, 512, 128 * MIB


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a run will hold.

    Attributes:
        phases: what is held together, phase by phase.
        on_disk: what lies on disk meanwhile.
        budget: the caps.
        limits: for the sweeps.
        keep_inputs: recovery holds the inputs of a layer's projections.
        keep_refinement: refinement holds what it aims at and its slopes.
    """

    phases: tuple[Phase, ...]
    on_disk: tuple[PlanItem, ...]
    budget: Budget
    limits: SweepLimits
    keep_inputs: bool
    keep_refinement: bool

    def peak_phase(self, where: str) -> Phase:
        """The phase that holds most on ``host`` or ``gpu``."""
        return max(self.phases, key=lambda phase: phase.total_bytes(where))

    @property
    def items(self) -> tuple[PlanItem, ...]:
        """Of each place the items of the phase that holds most there; then those on disk."""
        return (
            *(
                item
                for where in (GPU, HOST)
                for item in self.peak_phase(where).items
                if item.where == where
            ),
            *self.on_disk,
        )

    def total_bytes(self, where: str) -> int:
        """Predicted peak on ``host``, ``gpu`` or ``disk``."""
        if where == DISK:
            return sum(item.size_bytes for item in self.on_disk)
        return self.peak_phase(where).total_bytes(where)

    @property
    def binding(self) -> PlanItem:
        """The largest item of the place that has a cap (the base of the process left aside)."""
        place = GPU if self.budget.gpu_bytes is not None else HOST
        return max(
            (item for item in self.items if item.where == place and item.name != BASE),
            key=lambda item: item.size_bytes,
        )


def plan_memory(
    spec: ModelSpec, budget: Budget, work: SweepWorkload, *, base_bytes: int
) -> MemoryPlan:
    """Fit the work into the caps.

    Args:
        spec: shapes.
        budget: caps.
        work: what is to be done.
        base_bytes: what the process holds before the model (measured or nominal).

    Raises:
        BudgetError: nothing fits; names the largest item and the smallest cap that works.
    """
    build = _phases(spec, budget, work, base_bytes)
    choice = _choose(build, spec, budget, work)
    if isinstance(work, PruneWorkload):
        choice = _keep(build, choice, work)
    return MemoryPlan(
        phases=tuple(build.of(choice)),
        on_disk=tuple(build.on_disk()),
        budget=budget,
        limits=build.limits(choice),
        keep_inputs=choice.keep_inputs,
        keep_refinement=choice.keep_refinement,
    )


def _phases(spec: ModelSpec, budget: Budget, work: SweepWorkload, base_bytes: int) -> Phases:
    if isinstance(work, PruneWorkload):
        return PrunePhases(PruneItems(spec, budget, work), budget, base_bytes)
    return Phases(CommandItems(spec, budget, work), budget, base_bytes)


def _choose(build: Phases, spec: ModelSpec, budget: Budget, work: SweepWorkload) -> Choice:
    """The largest micro-batch that fits; then windows in flight; then resident ones."""
    least = Choice(micro_batch=1, in_flight=1, resident=0, keep_inputs=False)
    if not build.fits(least):  # then without reading ahead
        least = replace(least, buffers=1)
    _require(build, least, work)
    largest = max(1, min(work.most_windows, step_tokens(spec, budget) // work.window))
    choice = replace(
        least, micro_batch=_largest(1, largest, lambda m: build.fits(replace(least, micro_batch=m)))
    )
    most_in_flight = min(work.most_windows, most_windows_in_flight(budget, work))
    choice = replace(
        choice,
        in_flight=_largest(
            least.in_flight, most_in_flight, lambda n: build.fits(replace(choice, in_flight=n))
        ),
    )
    if budget.gpu_bytes is None:
        return choice
    most_resident = max(choice.in_flight, work.windows)
    resident = _largest(0, most_resident, lambda n: build.fits(replace(choice, resident=n)))
    return replace(choice, resident=resident)


def _keep(build: Phases, choice: Choice, work: PruneWorkload) -> Choice:
    """Keep reconstruction's inputs, then what channel updates aim at, where they fit."""
    kept = replace(choice, keep_inputs=work.reconstruction)
    if work.reconstruction and build.fits(kept):
        choice = kept
    kept = replace(choice, keep_refinement=work.channel_updates > 0)
    return kept if work.channel_updates and build.fits(kept) else choice


def most_windows_in_flight(budget: Budget, work: SweepWorkload) -> int:
    """Windows in flight beyond which nothing is gained.

    With so many tokens a layer is computed ten times as long as it is read, and hidden states that
    spill would pin the host's memory for nothing. A CPU's hidden states are not pinned.
    """
    if budget.gpu_bytes is None:
        return work.most_windows
    return max(work.windows, _GPU_TOKENS_IN_FLIGHT // work.window, 1)


def step_tokens(spec: ModelSpec, budget: Budget) -> int:
    """Tokens of a micro-batch beyond which nothing is gained."""
    return _GPU_TOKENS if is_accelerator(budget.device) else _cpu_tokens(spec)


def _cpu_tokens(spec: ModelSpec) -> int:
    """Tokens whose FFN activations, the widest of a layer, take no more than a cache has."""
    widest_bytes = 4 * 3 * max(group.columns for group in spec.table.groups)
    return max(_CPU_LEAST_TOKENS, min(_CPU_TOKENS, _CPU_MICRO_BATCH_BYTES // widest_bytes))


def _largest(least: int, most: int, fits: Callable[[int], bool]) -> int:
    """The largest number in ``least..most`` that fits; ``least`` is known to."""
    while least < most:
        middle = (least + most + 1) // 2
        if fits(middle):
            least = middle
        else:
            most = middle - 1
    return least


def _require(build: Phases, choice: Choice, work: SweepWorkload) -> None:
    """Refuse when even the smallest choice does not fit."""
    for where, cap, option in build.caps():
        phase = max(build.of(choice), key=lambda phase: phase.total_bytes(where))
        needed = phase.total_bytes(where)
        if needed <= cap:
            continue
        hint = ""
        if work.windows > 1:
            hint = f"; fewer windows (--windows, now {work.windows}) need less"
        raise refusal(phase, where, cap, option, hint)
