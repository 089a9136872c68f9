"""Sweeps are divided on a grid, in parts that shrink."""

from __future__ import annotations

import pytest

from frugal_bonsai.ranks.division import busiest, divide


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("in_flight", [3, 104, 4000])
@pytest.mark.parametrize("first", [0, 100])
def test_parts_cover_waves_on_their_grid_and_shrink(first: int, in_flight: int, ranks: int) -> None:
    starts = range(first, 1001, in_flight)
    waves = [slice(start, min(start + in_flight, 1001)) for start in starts]
    parts = list(divide(waves, 4, ranks))
    for wave in waves:
        mine = [part for part in parts if wave.start <= part.start < wave.stop]
        ends = [part.stop for part in mine]
        assert [part.start for part in mine] == [wave.start, *ends[:-1]] and ends[-1] == wave.stop
        assert all((part.start - wave.start) % 4 == 0 for part in mine)
    sizes = [part.stop - part.start for part in parts]
    if in_flight == 4000:
        assert sizes == sorted(sizes, reverse=True)
    # No rank takes more than half of its even share at once.
    assert max(sizes) <= max(4, 1001 / ranks / 2 + 4)


def test_many_waves_are_divided_at_their_end_alone() -> None:
    """Each part takes the layers once."""
    waves = [slice(start, start + 256) for start in range(0, 6400, 256)]
    parts = list(divide(waves, 8, 8))
    assert parts[:9] == waves[:9] and len(parts) < 100


def test_the_busiest_of_equal_ranks() -> None:
    assert busiest(104, 4, 1000, 1) == (104, 1)
    assert busiest(104, 4, 50, 1) == (104, 3)
    windows, parts = busiest(104, 4, 1000, 2)
    assert (windows, parts) == (52, -(-len(list(divide([slice(0, 104)], 4, 2))) // 2))
    assert busiest(104, 4, 1000, 1024) == (4, 1), "a micro-batch is not divided"
