"""The phases of a command, and which items of the plan are held together in each.

In: the items, the work, a choice. Out: phases. A cap must hold in every phase; the peak is the
largest of them. What differs within a phase only by a moment (a layer's activations, a solve, the
head) counts as phases of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from frugal_bonsai.errors import BudgetError
from frugal_bonsai.memory.budget import Budget
from frugal_bonsai.memory.command_items import CommandItems
from frugal_bonsai.memory.items import HEAD_CHUNKS
from frugal_bonsai.memory.work import BASE, GPU, HOST, Choice, PlanItem, SweepLimits
from frugal_bonsai.sizes import MIB, format_bytes

# Rounding and fragmentation. On the host large blocks are mapped one by one: there is little.
_SLACK = {HOST: (0.03, 10 * MIB), GPU: (0.08, 16 * MIB)}


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Items that are held at the same time."""

    name: str
    items: tuple[PlanItem, ...]

    def total_bytes(self, where: str) -> int:
        """What the phase holds in a place."""
        return sum(item.size_bytes for item in self.items if item.where == where)


class Phases:
    """Builds the phases of a command that prunes nothing, for a choice."""

    def __init__(self, items: CommandItems, budget: Budget, base_bytes: int) -> None:
        self._items, self._budget = items, budget
        self._always = [
            PlanItem(name=BASE, where=HOST, size_bytes=base_bytes, formula="measured"),
            items.outer(),
            items.masks(),
        ]
        if budget.gpu_bytes is not None:
            self._always.append(
                PlanItem(
                    name="device context",
                    where=GPU,
                    size_bytes=budget.context_bytes,
                    formula="measured",
                )
            )

    def caps(self) -> list[tuple[str, int, str]]:
        """(place, cap, option), device first."""
        caps = [(HOST, self._budget.host_bytes, "--max-cpu-mem")]
        if self._budget.gpu_bytes is not None:
            caps.insert(0, (GPU, self._budget.gpu_bytes, "--max-gpu-mem"))
        return caps

    def fits(self, choice: Choice) -> bool:
        """Whether all caps hold in all phases."""
        phases = self.of(choice)
        return all(
            phase.total_bytes(where) <= cap for phase in phases for where, cap, _ in self.caps()
        )

    def limits(self, choice: Choice) -> SweepLimits:
        """The sweep's limits for a choice."""
        rows, tokens = self._items.head_sizes(choice)
        return SweepLimits(
            micro_batch=choice.micro_batch,
            windows_in_flight=choice.in_flight,
            resident_windows=choice.resident,
            head_rows=rows,
            head_tokens=tokens,
            layer_buffers=choice.buffers,
        )

    def on_disk(self) -> list[PlanItem]:
        """What lies on disk meanwhile; no cap bounds it."""
        return [] if self._items.work.weights is None else [self._items.stores(1)]

    def of(self, choice: Choice) -> list[Phase]:
        """All phases in the order in which they come first."""
        work = self._items.work
        self._kept = self._items.kept_head(choice)
        phases = self._sampling(choice)
        if work.weights is not None:
            phases.append(self._phase("building the store", self._items.building()))
        if work.measured:
            phases += self._sweep("perplexity", choice, max(work.measured), weights=work.weights)
        if work.rewrite:
            phases += self._rewrite(choice)
        return phases

    def _sampling(self, choice: Choice) -> list[Phase]:
        items = self._items
        if not items.work.sampled:
            return []
        held = [*items.stream(choice, None), items.sampling(), *items.head_rows(choice)]
        return [self._phase("sampling", held)]

    def _sweep(
        self,
        name: str,
        choice: Choice,
        windows: int,
        *,
        weights: str | None,
        products: bool = False,
        called: list[PlanItem] | None = None,
    ) -> list[Phase]:
        """A sweep and the head behind it; the layers' buffers stay meanwhile."""
        items, work = self._items, self._items.work
        windows = min(choice.in_flight, windows)
        held = [
            *items.stream(choice, weights, products=products),
            *items.hidden(choice, windows),
        ]
        head = [
            *items.head_rows(choice, products=products),
            items.logits(choice, products=products),
        ]
        if work.top:
            held.append(items.teacher_shard())
            head.append(items.followers(choice))
        if work.full_logits:
            head.append(items.all_logits())
        if called is None:
            within = items.with_products(choice) if products else choice
            called = [items.activations(within, windows)]
        return [
            self._phase(f"{name}: layers", [*held, *called]),
            self._phase(f"{name}: head", [*held, *head]),
        ]

    def _rewrite(self, choice: Choice) -> list[Phase]:
        items = self._items.in_fp32()
        layers = [*items.stream(choice, None), items.verified_activations()]
        head = [*items.head_rows(choice), items.verified_logits()]
        head += items.heads_in_fp32(choice)
        return [
            self._phase("rewriting", [self._rewriting()]),
            self._phase("verifying: layers", layers),
            self._phase("verifying: head", head),
        ]

    def _rewriting(self) -> PlanItem:
        return self._items.rewriting()

    def _phase(self, name: str, own: list[PlanItem]) -> Phase:
        """Add what is always there, and slack for the phase's own items."""
        if self._kept is not None and not any(item.name == HEAD_CHUNKS for item in own):
            own.append(self._kept)
        return with_slack(name, self._always, own)


def with_slack(name: str, always: list[PlanItem], own: list[PlanItem]) -> Phase:
    """A phase of what is always there, its own items, and the allocators' slack for these."""
    own, slack = [item for item in own if item.size_bytes], []
    for where, (share, fixed) in _SLACK.items():
        size = sum(item.size_bytes for item in own if item.where == where)
        if size:
            slack.append(
                PlanItem(
                    name="allocator slack",
                    where=where,
                    size_bytes=int(share * size) + fixed,
                    formula=f"{share:g} of the rest" + (f" + {fixed // MIB} MiB" if fixed else ""),
                )
            )
    return Phase(name=name, items=(*(i for i in always if i.size_bytes), *own, *slack))


def refusal(phase: Phase, where: str, cap: int, option: str, hint: str = "") -> BudgetError:
    """Why a cap is too small for a phase: the largest item, the smallest cap that works."""
    needed = phase.total_bytes(where)
    items = [item for item in phase.items if item.where == where]
    largest = max(items, key=lambda item: item.size_bytes)
    return BudgetError(
        f"{option} {format_bytes(cap)} is too small: at least {format_bytes(needed)} are needed "
        f"({phase.name}), of which {largest.name} is the largest item "
        f"({format_bytes(largest.size_bytes)}: {largest.formula}). The smallest {option} that "
        f"works is {math.ceil(needed / MIB)}MiB{hint}",
        option=option,
        needed_bytes=needed,
    )
