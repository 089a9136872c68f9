"""The work of one layer, and the seconds that a machine takes for work of each kind.

In: the operations and bytes of a layer, which :mod:`frugal_bonsai.stream.operations` counts, and a
:class:`HardwareProfile`. Out: seconds as a :class:`TimePhase`. Nothing is measured or fitted here.
Holds a few numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from frugal_bonsai.hardware.profile import FP32, INT8, HardwareProfile
from frugal_bonsai.hardware.time_model import TimePhase
from frugal_bonsai.sizes import MIB

# glibc returns freed blocks of at least this size to the system. Each page of the next such block
# costs a page fault.
FRESH_BLOCK_BYTES = 32 * MIB
# int8 products write each input as two int8 digits and join two sums. Bytes read and written for
# an element of the input (absolute value, maximum, quotient, rounding, remainder, digits) and of
# the result (scaling by token, by digit and by row, sum).
_DIGIT_BYTES, _JOIN_BYTES = 66, 36


@dataclass(frozen=True, kw_only=True)
class LayerOperations:
    """What the forward pass of a model's mean layer takes for one token.

    Attributes:
        projections: Operations of the projections, 2 for each weight that multiplies the token.
        attention: Operations of causal attention for each token of the window.
        traffic_bytes: Bytes that elementwise operations and the projections' operands take.
        array_bytes: Bytes of each array that is allocated.
        inputs: Elements that enter the projections.
        outputs: Elements that leave them.
        hidden: H, width of the residual stream.
        query: Input columns of the attention's output projection.
        ffn: Input columns of the FFN's output projection; of the chosen experts together.
        ffn_inputs: Number of projections into the FFN: 2 where it is gated, else 1.
    """

    projections: float
    attention: float
    traffic_bytes: float
    array_bytes: tuple[float, ...]
    inputs: float
    outputs: float
    hidden: float
    query: float
    ffn: float
    ffn_inputs: int

    def kept(self, share: float) -> LayerOperations:
        """Return the operations of the layer with this share of its units.

        About half of the elementwise traffic is the residual stream's, which keeps its width.
        """
        return replace(
            self,
            projections=self.projections * share,
            attention=self.attention * share,
            traffic_bytes=self.traffic_bytes * (1 + share) / 2,
            array_bytes=tuple(size * share for size in self.array_bytes),
            inputs=self.inputs * (1 + share) / 2,
            outputs=self.outputs * (1 + share) / 2,
            query=self.query * share,
            ffn=self.ffn * share,
        )

    def fresh_bytes(self, tokens: float) -> float:
        """Return the bytes a token of arrays that the system allocates anew for these tokens."""
        return sum(size for size in self.array_bytes if size * tokens >= FRESH_BLOCK_BYTES)


@dataclass(frozen=True)
class Rates:
    """Seconds that a machine takes for work of each kind.

    Attributes:
        profile: The machine.
    """

    profile: HardwareProfile

    def products(self, operations: float, rate: float | None = None) -> TimePhase:
        """Return the time of matrix products, by default in the device's own arithmetic."""
        own = self.profile.products[self.profile.arithmetic]
        return TimePhase(compute=operations / (rate or own))

    def fp32(self, operations: float) -> TimePhase:
        """Return the time of fp32 products, which reconstruction and the importance scores use."""
        return self.products(operations, self.profile.products[FP32])

    def projections(
        self, operations: float, inputs: float, outputs: float, arithmetic: str | None
    ) -> TimePhase:
        """Return the time of a product of activations and weights.

        Args:
            operations: Operations of the product.
            inputs: Elements of the activations.
            outputs: Elements of the result.
            arithmetic: ``"int8"`` multiplies both digits of each activation; None is the device's
                own arithmetic.
        """
        if arithmetic != INT8:
            return self.products(operations)
        digits = _DIGIT_BYTES * inputs + _JOIN_BYTES * outputs
        return self.products(2 * operations, self.profile.products[INT8]) + self.traffic(digits)

    def cholesky(self, columns: float, rows: float = 0.0) -> TimePhase:
        """Return the time of a Cholesky factor and of solves for this many right-hand sides.

        The factor takes C^3 / 3 operations, the two triangular solves 2 C^2 a right-hand side
        (Golub and Van Loan, Matrix Computations, 4.2).
        """
        operations = columns**3 / 3 + 2 * columns**2 * rows
        return TimePhase(compute=operations / self.profile.solve_flops_per_second)

    def gram(self, columns: float, others: float, tokens: float) -> TimePhase:
        """Return the time of X^T X and X^T Y over tokens, for C columns of X and others of Y."""
        return self.products(2 * columns * (columns + others) * tokens, self.profile.gram_rate)

    def traffic(self, size_bytes: float, fresh_bytes: float = 0.0) -> TimePhase:
        """Return the time of elementwise work.

        Args:
            size_bytes: Bytes read and written.
            fresh_bytes: Bytes of blocks that the system allocates anew.
        """
        fresh = self.profile.fresh_bytes_per_second
        return TimePhase(
            elementwise=size_bytes / self.profile.memory_bytes_per_second
            + (fresh_bytes / fresh if fresh else 0.0)
        )

    def copy(self, size_bytes: float) -> TimePhase:
        """Return the time of copies between host and device; none where both share memory."""
        rate = self.profile.copy_bytes_per_second
        return TimePhase(copy=size_bytes / rate if rate else 0.0)

    def read(self, size_bytes: float, *, cold: bool) -> TimePhase:
        """Return the time of sequential reads, from the disk itself or from the page cache."""
        profile = self.profile
        rate = profile.disk_cold_bytes_per_second if cold else profile.disk_warm_bytes_per_second
        return TimePhase(disk=size_bytes / rate)

    def write(self, size_bytes: float) -> TimePhase:
        """Return the time of sequential writes."""
        return TimePhase(disk=size_bytes / self.profile.disk_write_bytes_per_second)

    def forward(
        self,
        layer: LayerOperations,
        window: int,
        windows: float,
        micro_batch: int,
        arithmetic: str | None = None,
    ) -> TimePhase:
        """Return the time of one layer's forward pass.

        Args:
            layer: The layer.
            window: Tokens of a window.
            windows: Number of windows.
            micro_batch: Windows that are computed together.
            arithmetic: See :meth:`projections`.
        """
        tokens, at_once = window * windows, min(micro_batch, windows)
        attention = tokens * window * layer.attention / self.profile.attention_flops_per_second
        calls = windows / at_once * self.profile.call_seconds
        return (
            TimePhase(compute=attention + calls)
            + self.projections(
                tokens * layer.projections,
                tokens * layer.inputs,
                tokens * layer.outputs,
                arithmetic,
            )
            + self.traffic(
                tokens * layer.traffic_bytes, tokens * layer.fresh_bytes(at_once * window)
            )
        )


def int8_wins(layer: LayerOperations, profile: HardwareProfile) -> bool:
    """Return whether int8 products of a layer are faster than the device's own arithmetic."""
    if INT8 not in profile.products:
        return False
    own, int8 = (
        Rates(profile).projections(layer.projections, layer.inputs, layer.outputs, arithmetic)
        for arithmetic in (None, INT8)
    )
    return int8.seconds < own.seconds
