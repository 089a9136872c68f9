"""Copies of a range of one file into another."""

from __future__ import annotations

import errno
from io import FileIO
from pathlib import Path

import pytest

from frugal_bonsai.checkpoint import files
from frugal_bonsai.checkpoint.files import copy_range

CONTENT = bytes(range(251)) * 1200  # 300 kB: some buffers, of which no two are equal

pytestmark = pytest.mark.skipif(files._COPY is None, reason="Linux alone copies inside the system")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(CONTENT)
    return path


def _copy(source: Path, start: int, to: int, size_bytes: int) -> bytes:
    """Copy into a target of dots and return its content."""
    path = source.parent / "target"
    path.write_bytes(b"." * 400_000)
    with FileIO(str(path), "r+b") as target:
        assert copy_range(source, start, target, to, size_bytes)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("start", "to"), [(0, 0), (100, 4196), (8, 0), (0, 8), (4095, 65_537), (72, 90_001)]
)
@pytest.mark.parametrize("size_bytes", [1, 4096, 2**16, 200_000])
def test_a_range_is_copied_and_nothing_beside_it(
    start: int, to: int, size_bytes: int, source: Path
) -> None:
    found = _copy(source, start, to, size_bytes)
    assert found[to : to + size_bytes] == CONTENT[start : start + size_bytes]
    assert found[:to] == b"." * to
    assert found[to + size_bytes :] == b"." * (400_000 - to - size_bytes)


def test_the_system_copies_where_pages_lie_alike(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, ...]] = []

    def refuse(*given: int) -> int:
        calls.append(given[2:])
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(files, "_COPY", refuse)
    with FileIO(str(source.parent / "target"), "xb") as target:
        assert not copy_range(source, 100, target, 4196, 50)
        assert calls == [(50, 100, 4196)]
        assert copy_range(source, 100, target, 4197, 50)
        assert len(calls) == 1, "through a buffer"


@pytest.mark.parametrize("to", [0, 1])
def test_a_source_that_is_too_short_is_not_copied(to: int, source: Path) -> None:
    with FileIO(str(source.parent / "target"), "xb") as target:
        assert not copy_range(source, 4096, target, to, len(CONTENT))
