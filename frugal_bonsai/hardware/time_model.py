"""How long a prune takes: its phases, and what binds each of them.

In: seconds by resource, from estimate.py. Out: a phase's seconds, the resource that binds. Within a
sweep reading, copying and computing overlap, so the slowest of the three sets the pace (the
roofline); building a store and rewriting do one after the other. Pure; holds a few numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

# Name of the phase in which `self` draws its text.
SAMPLING = "sampling text"


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase's seconds by resource.

    Attributes:
        name: of the phase.
        compute: matrix products, attention, solves, calls.
        elementwise: norms, activations, masks, dequantisation.
        disk: reads and writes.
        copy: between host and device.
        overlaps: the three run at once, else one after another.
    """

    name: str
    compute: float = 0.0
    elementwise: float = 0.0
    disk: float = 0.0
    copy: float = 0.0
    overlaps: bool = True

    @property
    def by_resource(self) -> dict[str, float]:
        """Seconds of what can run at once."""
        return {"compute": self.compute + self.elementwise, "disk": self.disk, "copy": self.copy}

    @property
    def seconds(self) -> float:
        """How long the phase takes."""
        each = self.by_resource.values()
        return max(each) if self.overlaps else sum(each)

    @property
    def binds(self) -> str:
        """The resource that takes longest."""
        return max(self.by_resource.items(), key=lambda item: item[1])[0]

    def __add__(self, other: Phase) -> Phase:
        """Two parts of one phase as one, under the first one's name."""
        return Phase(
            name=self.name,
            compute=self.compute + other.compute,
            elementwise=self.elementwise + other.elementwise,
            disk=self.disk + other.disk,
            copy=self.copy + other.copy,
            overlaps=self.overlaps,
        )


@dataclass(frozen=True, kw_only=True)
class TimeEstimate:
    """A prune's phases in order."""

    phases: tuple[Phase, ...]

    @property
    def total_seconds(self) -> float:
        """Everything."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def binds(self) -> str:
        """The resource that sets the pace for the largest part of the time."""
        shares = dict.fromkeys(("compute", "disk", "copy"), 0.0)
        for phase in self.phases:
            shares[phase.binds] += phase.seconds
        return max(shares.items(), key=lambda item: item[1])[0]
