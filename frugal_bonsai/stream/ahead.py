"""Telling the system what a stream reads next, some time before it is read.

In: the sources of a visit in the order in which they are read. Out: hints to the system, given by
the thread that reads. The disk works while both buffers are in use, while a chunk is computed, and
from the last layer to the head; what it has read waits in the page cache. Holds nothing.
"""

from __future__ import annotations

from frugal_bonsai.stream.source import LayerSource

# Hinted at before it is read: the next layer at least, or this much of smaller ones. A disk that
# reads 1.5 GB/s needs 40 ms for it, longer than a small chunk is computed.
AHEAD_BYTES = 64 * 2**20


class ReadAhead:
    """What one visit of a stream reads.

    Args:
        source: the visit's layers.
        then: what is read behind them, if that is known.
        reverse: from the last layer to the first.
    """

    def __init__(
        self, source: LayerSource, then: LayerSource | None = None, *, reverse: bool = False
    ) -> None:
        layers = range(source.layers)
        self._coming = [(source, layer) for layer in (reversed(layers) if reverse else layers)]
        if then is not None:
            self._coming += [(then, layer) for layer in range(then.layers)]
        self._told = 0

    def reach(self, place: int) -> None:
        """The visit's layer at this place is about to be read: hint at it and at what follows."""
        ahead_bytes = sum(self._size(at) for at in range(place + 1, self._told))
        while self._told < len(self._coming) and (
            self._told < place + 2 or ahead_bytes < AHEAD_BYTES
        ):
            source, number = self._coming[self._told]
            source.announce(number)
            ahead_bytes += self._size(self._told) if self._told > place else 0
            self._told += 1

    def _size(self, at: int) -> int:
        source, layer = self._coming[at]
        return source.layer_bytes(layer)
