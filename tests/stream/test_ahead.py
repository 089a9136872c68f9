"""What is hinted at before it is read."""

from __future__ import annotations

import pytest
import torch

from frugal_bonsai.stream.ahead import AHEAD_BYTES, ReadAhead
from frugal_bonsai.stream.source import Record

SMALL, LARGE = AHEAD_BYTES // 2, 2 * AHEAD_BYTES


class Told:
    """A source that remembers what was announced."""

    def __init__(self, name: str, sizes: list[int], log: list[str]) -> None:
        self._name, self._sizes, self._log = name, sizes, log

    @property
    def layers(self) -> int:
        return len(self._sizes)

    def layer_bytes(self, layer: int) -> int:
        return self._sizes[layer]

    def records(self, layer: int) -> tuple[Record, ...]:
        return ()

    def announce(self, layer: int) -> None:
        self._log.append(f"{self._name}{layer}")

    def read(self, layer: int, buffer: torch.Tensor) -> None:
        raise AssertionError("hints read nothing")


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # The next layer always, however large.
        ([LARGE] * 3, [["a0", "a1"], ["a2"], ["h0", "h1"]]),
        # Of smaller ones as many as make up the bytes, beyond the last layer too.
        ([SMALL] * 3, [["a0", "a1", "a2"], ["h0"], ["h1"]]),
        ([1, 1, 1], [["a0", "a1", "a2", "h0", "h1"], [], []]),
    ],
)
def test_the_next_layer_and_so_many_bytes_are_hinted_at(
    sizes: list[int], expected: list[list[str]]
) -> None:
    log: list[str] = []
    ahead = ReadAhead(Told("a", sizes, log), Told("h", [SMALL] * 3, log))
    found = []
    for layer in range(3):
        before = len(log)
        ahead.reach(layer)
        found.append(log[before:])
    assert found == expected


def test_without_anything_behind_it_the_last_layer_is_the_end() -> None:
    log: list[str] = []
    ahead = ReadAhead(Told("a", [1, 1], log))
    ahead.reach(0)
    ahead.reach(1)
    assert log == ["a0", "a1"]
