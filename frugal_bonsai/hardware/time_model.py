"""A predicted time: phases, the resource that binds each of them, and their total.

In: seconds by resource. Out: seconds of a phase and of a command. Reading, copying and computing
overlap within a sweep, so the slowest of the three sets the pace (the roofline). Holds a few
numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# Name of the phase in which `self` draws its text.
SAMPLING = "sampling text"


@dataclass(frozen=True, kw_only=True)
class TimePhase:
    """Seconds of a phase, or of a part of one, by resource.

    Attributes:
        name: Name of the phase; empty for a part of one.
        compute: Seconds of matrix products, attention, solves and calls.
        elementwise: Seconds of norms, activations, masks and dequantisation.
        disk: Seconds of reads and writes.
        copy: Seconds of copies between host and device.
        overlaps: Whether computing, disk and copies run at the same time.
    """

    name: str = ""
    compute: float = 0.0
    elementwise: float = 0.0
    disk: float = 0.0
    copy: float = 0.0
    overlaps: bool = True

    @property
    def by_resource(self) -> dict[str, float]:
        """Seconds of each resource."""
        return {"compute": self.compute + self.elementwise, "disk": self.disk, "copy": self.copy}

    @property
    def seconds(self) -> float:
        """Seconds of the phase."""
        each = self.by_resource.values()
        return max(each) if self.overlaps else sum(each)

    @property
    def binds(self) -> str:
        """Resource that takes longest."""
        return max(self.by_resource.items(), key=lambda item: item[1])[0]

    def __add__(self, other: TimePhase) -> TimePhase:
        names = ("compute", "elementwise", "disk", "copy")
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in names})

    def __mul__(self, times: float) -> TimePhase:
        names = ("compute", "elementwise", "disk", "copy")
        return replace(self, **{name: getattr(self, name) * times for name in names})


@dataclass(frozen=True, kw_only=True)
class TimeEstimate:
    """The phases of a command in order."""

    phases: tuple[TimePhase, ...]

    @property
    def total_seconds(self) -> float:
        """Seconds of all phases."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def binds(self) -> str:
        """Resource that binds for the largest part of the time."""
        shares = dict.fromkeys(("compute", "disk", "copy"), 0.0)
        for phase in self.phases:
            shares[phase.binds] += phase.seconds
        return max(shares.items(), key=lambda item: item[1])[0]
