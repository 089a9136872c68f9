"""The phases of a command, and the items that are held together in each.

In: items, a choice of sizes. Out: phases. The caps must hold in every phase; the predicted peak is
the largest of them. Steps that hold different items for a moment (the activations of a layer, a
solve, the head) are phases of their own. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from frugal_bonsai.errors import BudgetError
from frugal_bonsai.memory.budget import Budget
from frugal_bonsai.memory.command_items import HEAD_CHUNKS, CommandItems
from frugal_bonsai.memory.work import BASE, GPU, HOST, Choice, PlanItem, SweepLimits
from frugal_bonsai.sizes import MIB, format_bytes

# Rounding and fragmentation. On the host large blocks are mapped one by one: there is little.
_SLACK = {HOST: (0.03, 10 * MIB), GPU: (0.08, 16 * MIB)}


@dataclass(frozen=True, kw_only=True)
class MemoryPhase:
    """Items that are held at the same time."""

    name: str
    items: tuple[PlanItem, ...]

    def total_bytes(self, where: str) -> int:
        """Return the bytes that the phase holds on ``host`` or ``gpu``."""
        return sum(item.size_bytes for item in self.items if item.where == where)


@dataclass(frozen=True, kw_only=True)
class PlannedPhases:
    """The phases of a plan and their peaks.

    Attributes:
        phases: Phases in the order in which they come first.
        budget: The caps.
    """

    phases: tuple[MemoryPhase, ...]
    budget: Budget

    def peak_phase(self, where: str) -> MemoryPhase:
        """Return the phase that holds most on ``host`` or ``gpu``."""
        return max(self.phases, key=lambda phase: phase.total_bytes(where))

    @property
    def items(self) -> tuple[PlanItem, ...]:
        """Items of the GPU's peak phase, then of the host's."""
        return tuple(
            item
            for where in (GPU, HOST)
            for item in self.peak_phase(where).items
            if item.where == where
        )

    def total_bytes(self, where: str) -> int:
        """Return the predicted peak in bytes on ``host`` or ``gpu``."""
        return self.peak_phase(where).total_bytes(where)

    def _caps(self) -> list[tuple[str, int, str]]:
        """Return (place, cap in bytes, option) of each cap, the device first."""
        caps = [(HOST, self.budget.host_bytes, "--max-cpu-mem")]
        if self.budget.gpu_bytes is not None:
            caps.insert(0, (GPU, self.budget.gpu_bytes, "--max-gpu-mem"))
        return caps

    @property
    def excess(self) -> float:
        """Largest ratio of a peak to its cap."""
        return max(self.total_bytes(where) / max(cap, 1) for where, cap, _ in self._caps())

    @property
    def fits(self) -> bool:
        """Whether all caps hold in all phases."""
        return all(self.total_bytes(where) <= cap for where, cap, _ in self._caps())

    def require_fit(self, hint: Callable[[], str]) -> None:
        """Raise if a cap does not hold.

        Args:
            hint: Returns further advice for the error text.

        Raises:
            BudgetError: Names the largest item and the smallest cap that works.
        """
        for where, cap, option in self._caps():
            phase, needed = self.peak_phase(where), self.total_bytes(where)
            if needed <= cap:
                continue
            items = [item for item in phase.items if item.where == where]
            largest = max(items, key=lambda item: item.size_bytes)
            raise BudgetError(
                f"{option} {format_bytes(cap)} is too small: at least {format_bytes(needed)} are "
                f"needed ({phase.name}), of which {largest.name} is the largest item "
                f"({format_bytes(largest.size_bytes)}: {largest.formula}). The smallest {option} "
                f"that works is {math.ceil(needed / MIB)}MiB{hint()}",
                option=option,
                needed_bytes=needed,
            )


class CommandPhases:
    """Builds the phases of a command that streams a model and prunes nothing.

    Args:
        items: Items of the command.
        base_bytes: Bytes that the process holds before the model.
    """

    def __init__(self, items: CommandItems, base_bytes: int) -> None:
        self._items = items
        self._kept: PlanItem | None = None
        self._always = [
            PlanItem(name=BASE, where=HOST, size_bytes=base_bytes, formula="measured"),
            items.outer(),
            items.masks(),
        ]
        if items.budget.gpu_bytes is not None:
            context = items.budget.context_bytes
            self._always.append(
                PlanItem(name="device context", where=GPU, size_bytes=context, formula="measured")
            )

    def planned(self, choice: Choice) -> PlannedPhases:
        """Return the phases for a choice, with their caps."""
        return PlannedPhases(phases=tuple(self.of(choice)), budget=self._items.budget)

    def phase(self, name: str, own: list[PlanItem]) -> MemoryPhase:
        """Return a phase: the items always held, its own, and the allocators' slack for its own."""
        own, slack = [item for item in own if item.size_bytes], []
        for where, (share, fixed) in _SLACK.items():
            size = sum(item.size_bytes for item in own if item.where == where)
            if size:
                slack.append(
                    PlanItem(
                        name="allocator slack",
                        where=where,
                        size_bytes=int(share * size) + fixed,
                        formula=f"{share:g} of the rest + {fixed // MIB} MiB",
                    )
                )
        always = (item for item in self._always if item.size_bytes)
        return MemoryPhase(name=name, items=(*always, *own, *slack))

    def spilled_bytes(self, choice: Choice) -> int:
        """Return the bytes of the hidden states that lie on disk, at most."""
        return 0

    def limits(self, choice: Choice) -> SweepLimits:
        """Return the limits of the sweeps for a choice."""
        rows, tokens = self._items.head_sizes(choice)
        return SweepLimits(
            micro_batch=choice.micro_batch,
            windows_in_flight=choice.in_flight,
            resident_windows=choice.resident,
            head_rows=rows,
            head_tokens=tokens,
            layer_buffers=choice.buffers,
            on_disk=choice.on_disk,
        )

    def of(self, choice: Choice) -> list[MemoryPhase]:
        """Return all phases in the order in which they come first."""
        work = self._items.work
        self._kept = self._items.kept_head(choice)
        phases = self._sampling(choice)
        if work.weights is not None:
            phases.append(self._held("building the store", self._items.building()))
        if work.measured:
            phases += self._sweep("perplexity", choice, max(work.measured), weights=work.weights)
        if work.rewrite:
            phases += self._rewrite(choice)
        return phases

    def _sampling(self, choice: Choice) -> list[MemoryPhase]:
        items = self._items
        if not items.work.sampled:
            return []
        held = [*items.stream(choice, None), items.sampling(), *items.head_rows(choice)]
        return [self._held("sampling", held)]

    def _sweep(
        self,
        name: str,
        choice: Choice,
        windows: int,
        *,
        weights: str | None,
        products: bool = False,
        called: Callable[[Choice, int], list[PlanItem]] | None = None,
    ) -> list[MemoryPhase]:
        """Return the phases of a sweep: the layers, then the head beside the layers' buffers.

        ``called`` gives the items of a layer that is called on that many windows.
        """
        items, work = self._items, self._items.work
        windows = min(choice.in_flight, windows)
        held = [
            *items.stream(choice, weights, products=products),
            *items.hidden(choice, windows),
        ]
        head = self._head(choice, products=products)
        if work.top:
            held.append(items.teacher_shard())
            head.append(items.top_tokens(choice))
        within = items.with_products(choice) if products else choice
        layer = [items.activations(within, windows)] if called is None else called(within, windows)
        return [
            self._held(f"{name}: layers", [*held, *layer]),
            self._held(f"{name}: head", [*held, *head]),
        ]

    def _head(self, choice: Choice, *, products: bool = False) -> list[PlanItem]:
        """Return the head's items; a user's utility takes all logits of a window."""
        items = self._items
        logits = [items.logits(choice, products=products)]
        if items.work.full_logits:
            logits.append(items.all_logits())
        return [*items.head_rows(choice, products=products), *logits]

    def _rewrite(self, choice: Choice, *, refitted: bool = False) -> list[MemoryPhase]:
        items = self._items.in_fp32()
        layers = [*items.stream(choice, None), items.verified_activations()]
        head = [*items.head_rows(choice), items.verified_logits()]
        head += items.heads_in_fp32(choice)
        return [
            self._held("rewriting", [self._items.rewriting(refitted=refitted)]),
            self._held("verifying: layers", layers),
            self._held("verifying: head", head),
        ]

    def _held(self, name: str, own: list[PlanItem]) -> MemoryPhase:
        """Return a phase; a head that is one chunk stays in phases without chunks of their own."""
        if self._kept is not None and not any(item.name == HEAD_CHUNKS for item in own):
            own.append(self._kept)
        return self.phase(name, own)
