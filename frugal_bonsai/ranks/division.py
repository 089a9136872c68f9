"""How a sweep over windows is divided among ranks.

In: numbers. Out: the parts that ranks take one after the other. Pure; imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

# A rank takes this part of its even share of what is left: large pieces first, because each takes
# the layers once, then small ones, so that all end together.
_PART_OF_SHARE = 2


def divide(waves: Sequence[slice], grid: int, ranks: int) -> Iterator[slice]:
    """Yield parts of waves, large ones first, that begin on the grid of their wave.

    Args:
        waves: What one rank would do together, one wave after the other.
        grid: Size of the smallest part.
        ranks: Number of ranks that take the parts.
    """
    cells_left = sum(-(-(wave.stop - wave.start) // grid) for wave in waves)
    for wave in waves:
        start = wave.start
        while start < wave.stop:
            cells = max(1, cells_left // (_PART_OF_SHARE * ranks))
            stop = min(start + cells * grid, wave.stop)
            yield slice(start, stop)
            cells_left -= -(-(stop - start) // grid)
            start = stop


def busiest(windows: int, grid: int, in_flight: int, ranks: int) -> tuple[int, int]:
    """Return the most windows that one of equally quick ranks takes, and in how many parts.

    Args:
        windows: Number of windows of the sweep.
        grid: Size of the smallest part.
        in_flight: Number of windows of a wave.
        ranks: Number of ranks.
    """
    starts = range(0, windows, in_flight)
    if ranks == 1:
        return windows, len(starts)
    waves = [slice(start, min(start + in_flight, windows)) for start in starts]
    parts = len(list(divide(waves, grid, ranks)))
    return min(windows, -(-windows // (grid * ranks)) * grid), -(-parts // ranks)
