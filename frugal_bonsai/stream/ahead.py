"""Tell the operating system in advance what a stream will read.

In: the sources of a visit in the order in which they are read. Out: hints to the system, given by
the reading thread. So the disk also works while both buffers are in use, while a chunk is computed,
and between the last layer and the head; the data waits in the page cache. Holds nothing.
"""

from __future__ import annotations

from frugal_bonsai.stream.source import LayerSource

# Bytes of the layers that are announced before they are read; at least the next layer is. A disk
# that reads 1.5 GB/s needs 40 ms for them, longer than the computation of a small chunk.
AHEAD_BYTES = 64 * 2**20


class ReadAhead:
    """Announces the layers of one visit.

    Args:
        source: the visit's layers.
        then: source that is read after them, if it is known.
        reverse: visit from the last layer to the first.
    """

    def __init__(
        self, source: LayerSource, then: LayerSource | None = None, *, reverse: bool = False
    ) -> None:
        layers = range(source.layers)
        self._coming = [(source, layer) for layer in (reversed(layers) if reverse else layers)]
        if then is not None:
            self._coming += [(then, layer) for layer in range(then.layers)]
        self._announced = 0

    def reach(self, place: int) -> None:
        """Announce the layer at this place of the visit, which is read next, and its successors."""
        ahead_bytes = sum(self._size(at) for at in range(place + 1, self._announced))
        while self._announced < len(self._coming) and (
            self._announced < place + 2 or ahead_bytes < AHEAD_BYTES
        ):
            source, layer = self._coming[self._announced]
            source.announce(layer)
            ahead_bytes += self._size(self._announced) if self._announced > place else 0
            self._announced += 1

    def _size(self, at: int) -> int:
        source, layer = self._coming[at]
        return source.layer_bytes(layer)
