"""How long a prune takes: the work that decides it, its phases, and what binds each of them.

In: seconds by resource, from estimate.py. Out: a phase's seconds, the resource that binds. Within a
sweep reading, copying and computing overlap, so the slowest of the three sets the pace (the
roofline); building a store and rewriting do one after the other. Pure; holds a few numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

# Name of the phase in which `self` draws its text.
SAMPLING = "sampling text"


@dataclass(frozen=True, kw_only=True)
class PruneWork:
    """What a prune does, as far as its time depends on it.

    Attributes:
        window: S.
        windows: calibration windows.
        reported: windows whose perplexity is reported before and after.
        shares: share of the block parameters that is left before each round, and after the last.
        pairs: (mask, window) pairs of a round, the unmasked windows included; 0 for no masks.
        exact_prior: the prior needs a Gram matrix.
        recovery: projections are refitted after each round.
        refit_inputs: q, k, v, gate and up too.
        keep_inputs: recovery holds a layer's inputs.
        part: windows that statistics and every recovery but the last take; None is all.
        trial: windows that cuts are recovered on in every round; 0 for no trials.
        trial_cuts: how many cuts that may be.
        batches: the pairs in the batches that a round evaluates one after the other, each of which
            reads the layers; empty is one batch.
        pool: units that have stand-ins, as a multiple of what a round removes; 0 for none.
        rescaled: windows of which the last recovery computes the head again, to find the logits'
            scale; 0 for none.
        refine: steps in which the last recovery moves the FFN's channels; 0 never.
        refine_iterations: of conjugate gradients in a step.
        refine_blocks: of channels, one moved after the other.
        keep_refinement: refinement holds what it aims at and its slopes.
        int8_store: the working store is int8, else the source's dtype.
        source_bytes: of one element of the checkpoint.
        planned_bytes: of host memory, which the page cache does not get.
        sampled_tokens: calibration tokens of a window that are sampled first; 0 for a text.
        arithmetic: of the masked evaluation; None is the device's own.
    """

    window: int
    windows: int
    reported: int
    shares: tuple[float, ...]
    pairs: int
    exact_prior: bool
    recovery: bool
    refit_inputs: bool
    keep_inputs: bool
    int8_store: bool
    source_bytes: int
    planned_bytes: int = 0
    sampled_tokens: int = 0
    part: int | None = None
    trial: int = 0
    trial_cuts: int = 2
    batches: tuple[int, ...] = ()
    pool: float = 0.0
    rescaled: int = 0
    refine: int = 0
    refine_iterations: int = 0
    refine_blocks: int = 1
    keep_refinement: bool = True
    arithmetic: str | None = None

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return len(self.shares) - 1

    @property
    def part_windows(self) -> int:
        """Windows of statistics and of every recovery but the last."""
        return self.windows if self.part is None else self.part

    def stand_ins(self, number: int) -> float:
        """Share of the units alive before this round (from 0) that have stand-ins, at most."""
        before, after = self.shares[number : number + 2]
        return min(1.0, self.pool * (before - after) / before)


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
