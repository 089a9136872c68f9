"""The memory planner: chooses the sizes of a run so that it fits into the caps.

In: shapes, caps, a workload. Out: a frozen, itemised :class:`MemoryPlan`, or an error that names
the largest item and the smallest cap that works. Pure: reads no file and no device. The items and
their formulas are in items.py, command_items.py and prune_items.py; phases.py and prune_phases.py
say which of them are held together. disk.py and prune_disk.py do the same for files.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from frugal_bonsai.accelerator import is_accelerator
from frugal_bonsai.memory.budget import Budget
from frugal_bonsai.memory.command_items import CommandItems
from frugal_bonsai.memory.disk import DiskPlan
from frugal_bonsai.memory.hints import advise, smaller_sweeps
from frugal_bonsai.memory.phases import CommandPhases, PlannedPhases
from frugal_bonsai.memory.prune_disk import plan_disk
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
class MemoryPlan(PlannedPhases):
    """Predicted memory of a run, and the sizes chosen for it.

    Attributes:
        limits: Limits of the sweeps.
        keep_inputs: Reconstruction holds the inputs of a layer's projections.
        keep_updates: Channel updates hold their targets and slopes.
        spilled_bytes: Hidden states that lie on disk, at most.
        disk: Files that lie on disk meanwhile.
    """

    limits: SweepLimits
    keep_inputs: bool
    keep_updates: bool
    spilled_bytes: int = 0
    disk: DiskPlan = field(default_factory=DiskPlan)

    @property
    def items(self) -> tuple[PlanItem, ...]:
        """Items of the peak phase of the GPU, of the host, then of the disk."""
        return (*super().items, *self.disk.peak().items)

    def total_bytes(self, where: str) -> int:
        """Return the predicted peak in bytes on ``host``, ``gpu`` or ``disk``."""
        if where == DISK:
            return self.disk.total_bytes
        return super().total_bytes(where)

    @property
    def binding(self) -> PlanItem:
        """Largest item of the GPU if there is one, else of the host, without the process itself."""
        place = GPU if self.budget.gpu_bytes is not None else HOST
        return max(
            (item for item in self.items if item.where == place and item.name != BASE),
            key=lambda item: item.size_bytes,
        )


def plan_memory(
    spec: ModelSpec, budget: Budget, work: SweepWorkload, *, base_bytes: int
) -> MemoryPlan:
    """Choose the sizes of a run so that it fits into the caps.

    Args:
        spec: Shapes of the model.
        budget: The caps.
        work: The workload.
        base_bytes: Bytes that the process holds before the model (measured or nominal).

    Raises:
        BudgetError: Nothing fits; names the largest item and the smallest cap that works.
    """
    build = _phases(spec, budget, work, base_bytes)
    choice = _choose(build, spec, budget, work, base_bytes)
    if isinstance(work, PruneWorkload):
        choice = _keep(build, choice, work)
    spilled = build.spilled_bytes(choice)
    return MemoryPlan(
        phases=tuple(build.of(choice)),
        budget=budget,
        limits=build.limits(choice),
        keep_inputs=choice.keep_inputs,
        keep_updates=choice.keep_updates,
        spilled_bytes=spilled,
        disk=plan_disk(spec, work, spilled_bytes=spilled),
    )


def _phases(spec: ModelSpec, budget: Budget, work: SweepWorkload, base_bytes: int) -> CommandPhases:
    if isinstance(work, PruneWorkload):
        return PrunePhases(PruneItems(spec, budget, work), base_bytes)
    return CommandPhases(CommandItems(spec, budget, work), base_bytes)


def _choose(
    build: CommandPhases, spec: ModelSpec, budget: Budget, work: SweepWorkload, base_bytes: int
) -> Choice:
    """Choose two layer buffers, the largest micro-batch, windows in flight, resident windows.

    Each is as large as fits with the ones before it. A prune on a CPU spills hidden states to disk
    only where it does not fit without.
    """
    first = Choice(micro_batch=1, in_flight=1, resident=0, keep_inputs=False)
    choices = [first, replace(first, buffers=1)]  # one buffer: no reading ahead
    if budget.gpu_bytes is None and isinstance(work, PruneWorkload):
        choices += [replace(choice, on_disk=True) for choice in choices]
    least = choices[-1]
    choice = next((c for c in choices if build.planned(c).fits), least)
    if choice == least:

        def fits(smaller: SweepWorkload) -> bool:
            return _phases(spec, budget, smaller, base_bytes).planned(least).fits

        build.planned(least).require_fit(lambda: advise(smaller_sweeps(work), fits))
    most = max(1, min(work.most_windows, step_tokens(spec, budget) // work.window))
    choice = _largest(build, choice, "micro_batch", most)
    most = min(work.most_windows, most_windows_in_flight(budget, work))
    if choice.on_disk:  # more would take more room on disk than the reconstruction does
        most = min(most, work.windows)
    choice = _largest(build, choice, "in_flight", most)
    if budget.gpu_bytes is None and not choice.on_disk:
        return choice
    return _largest(build, choice, "resident", max(choice.in_flight, work.windows))


def _keep(build: CommandPhases, choice: Choice, work: PruneWorkload) -> Choice:
    """Keep reconstruction's inputs if they fit, then the targets of channel updates."""
    wishes = ((work.reconstruction, "keep_inputs"), (work.channel_updates, "keep_updates"))
    for wanted, name in wishes:
        kept = replace(choice, **{name: True})
        if wanted and build.planned(kept).fits:
            choice = kept
    return choice


def _largest(build: CommandPhases, choice: Choice, name: str, most: int) -> Choice:
    """Return the choice with the largest value of one field, up to ``most``, that fits."""
    least = getattr(choice, name)
    while least < most:
        middle = (least + most + 1) // 2
        if build.planned(replace(choice, **{name: middle})).fits:
            least = middle
        else:
            most = middle - 1
    return replace(choice, **{name: least})


def most_windows_in_flight(budget: Budget, work: SweepWorkload) -> int:
    """Return the number of windows in flight beyond which a sweep gets no faster.

    On a GPU, computing a layer then takes ten times as long as reading it, and more hidden states
    would pin host memory for nothing. A CPU's hidden states are not pinned.
    """
    if budget.gpu_bytes is None:
        return work.most_windows
    return max(work.windows, _GPU_TOKENS_IN_FLIGHT // work.window, 1)


def step_tokens(spec: ModelSpec, budget: Budget) -> int:
    """Return the number of tokens of a micro-batch beyond which a sweep gets no faster.

    On a CPU, the FFN's activations, the widest of a layer, must fit in a cache.
    """
    if is_accelerator(budget.device):
        return _GPU_TOKENS
    widest_bytes = 4 * 3 * max(group.columns for group in spec.table.groups)
    return max(_CPU_LEAST_TOKENS, min(_CPU_TOKENS, _CPU_MICRO_BATCH_BYTES // widest_bytes))
