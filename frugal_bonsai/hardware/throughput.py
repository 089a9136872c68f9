"""Seconds that a machine takes for work, and the phases that they add up to.

In: operations and bytes, of a layer as :mod:`frugal_bonsai.stream.operations` counts them, and a
:class:`HardwareProfile`. Out: seconds by resource, of parts, of phases and of a command. Reading,
copying and computing overlap within a phase, so the slowest of the three sets the pace (the
roofline). Nothing is measured or fitted. Holds a few numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from frugal_bonsai.hardware.profile import FP32, INT8, HardwareProfile
from frugal_bonsai.sizes import MIB

# Name of the phase in which `self` draws its text.
SAMPLING = "sampling text"
# glibc returns freed blocks of at least this size to the system. Each page of the next such block
# costs a page fault.
_FRESH_BLOCK_BYTES = 32 * MIB
# int8 products write each input as two int8 digits and join two sums: bytes read and written for an
# element of the input (absolute value, maximum, quotient, rounding, remainder, digits) and of the
# result (scaling by token, by digit and by row, sum).
_DIGIT_BYTES, _JOIN_BYTES = 66, 36
_RESOURCES = ("compute", "elementwise", "disk", "copy")


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
        sums = {name: getattr(self, name) + getattr(other, name) for name in _RESOURCES}
        return replace(self, **sums)

    def __mul__(self, times: float) -> TimePhase:
        return replace(self, **{name: getattr(self, name) * times for name in _RESOURCES})


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


@dataclass(frozen=True, kw_only=True)
class LayerOperations:
    """What the forward pass of a model's mean layer takes for one token.

    Attributes:
        projections: Operations of the projections, 2 for each weight that multiplies the token.
        attention: Operations of causal attention for each token of the window.
        traffic_bytes: Bytes that elementwise operations and the projections' operands take.
        array_bytes: Bytes of each array that is allocated.
        inputs: Elements that enter the projections.
        outputs: Elements that leave the projections.
        query: Input columns of the attention's output projection.
        ffn: Input columns of the FFN's output projection; of the chosen experts together.
    """

    projections: float
    attention: float
    traffic_bytes: float
    array_bytes: tuple[float, ...]
    inputs: float
    outputs: float
    query: float
    ffn: float

    def kept(self, share: float) -> LayerOperations:
        """Return the operations of the layer with this share of its units.

        About half of the elementwise traffic is the residual stream's, which keeps its width.
        """
        half = (1 + share) / 2
        return replace(
            self,
            projections=self.projections * share,
            attention=self.attention * share,
            traffic_bytes=self.traffic_bytes * half,
            array_bytes=tuple(size * share for size in self.array_bytes),
            inputs=self.inputs * half,
            outputs=self.outputs * half,
            query=self.query * share,
            ffn=self.ffn * share,
        )


@dataclass(frozen=True)
class Rates:
    """Seconds that a machine takes for work of each kind."""

    profile: HardwareProfile

    def products(self, operations: float, kind: str | None = None) -> TimePhase:
        """Return the time of matrix products: of a kind, else of the device's own arithmetic."""
        return TimePhase(
            compute=operations / self.profile.products[kind or self.profile.arithmetic]
        )

    def projections(
        self, operations: float, inputs: float, outputs: float, *, int8: bool = False
    ) -> TimePhase:
        """Return the time of products of activations and weights.

        Args:
            operations: Operations of the products.
            inputs: Elements of the activations.
            outputs: Elements of the results.
            int8: Both int8 digits of each activation are multiplied by the stored codes.
        """
        if not int8:
            return self.products(operations)
        digits = self.traffic(_DIGIT_BYTES * inputs + _JOIN_BYTES * outputs)
        return self.products(2 * operations, INT8) + digits

    def gram(self, columns: float, others: float, tokens: float) -> TimePhase:
        """Return the time of X^T X and X^T Y over tokens, for C columns of X and others of Y."""
        operations = 2 * columns * (columns + others) * tokens
        return self.products(operations, self.profile.gram_arithmetic)

    def cholesky(self, columns: float, rows: float = 0.0) -> TimePhase:
        """Return the time of a Cholesky factor and of solves for rows of right-hand sides.

        The factor takes C^3 / 3 operations, its two triangular solves 2 C^2 a row (Golub and Van
        Loan, Matrix Computations, 4.2).
        """
        operations = columns**3 / 3 + 2 * columns**2 * rows
        return TimePhase(compute=operations / self.profile.solve_flops_per_second)

    def refit(self, columns: float, rows: float, hidden: float, tokens: float) -> TimePhase:
        """Return the time of a ridge regression of a projection's rows on its input columns."""
        product = self.products(2 * columns**2 * rows, FP32)
        return self.gram(columns, hidden, tokens) + product + self.cholesky(columns, rows)

    def traffic(self, size_bytes: float, fresh_bytes: float = 0.0) -> TimePhase:
        """Return the time of elementwise work: bytes read and written, bytes allocated anew."""
        seconds = size_bytes / self.profile.memory_bytes_per_second
        if self.profile.fresh_bytes_per_second is not None:
            seconds += fresh_bytes / self.profile.fresh_bytes_per_second
        return TimePhase(elementwise=seconds)

    def copy(self, size_bytes: float) -> TimePhase:
        """Return the time of copies between host and device; 0 where both share memory."""
        rate = self.profile.copy_bytes_per_second
        return TimePhase(copy=size_bytes / rate if rate else 0.0)

    def forward(
        self,
        layer: LayerOperations,
        window: int,
        windows: float,
        *,
        micro_batch: int = 1,
        int8: bool = False,
    ) -> TimePhase:
        """Return the time of one layer's forward pass.

        Args:
            layer: The layer.
            window: Tokens of a window.
            windows: Number of windows.
            micro_batch: Windows that are computed together, at most.
            int8: See :meth:`projections`.
        """
        tokens, at_once = window * windows, min(micro_batch, windows)
        attention = tokens * window * layer.attention / self.profile.attention_flops_per_second
        calls = windows / at_once * self.profile.call_seconds
        arrays = [
            size for size in layer.array_bytes if size * at_once * window >= _FRESH_BLOCK_BYTES
        ]
        one = self.projections(layer.projections, layer.inputs, layer.outputs, int8=int8)
        one += self.traffic(layer.traffic_bytes, sum(arrays))
        return one * tokens + TimePhase(compute=attention + calls)


def int8_wins(layer: LayerOperations, profile: HardwareProfile) -> bool:
    """Return whether int8 products of a layer are faster than the device's own arithmetic."""
    if INT8 not in profile.products:
        return False
    work, rates = (layer.projections, layer.inputs, layer.outputs), Rates(profile)
    return rates.projections(*work, int8=True).seconds < rates.projections(*work).seconds
