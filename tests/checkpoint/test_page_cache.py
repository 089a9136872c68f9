"""Decisions about the page cache, and the hints to the system."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from frugal_bonsai.checkpoint import files
from frugal_bonsai.checkpoint.files import ReadFile
from frugal_bonsai.checkpoint.page_cache import fits_page_cache, free_memory_bytes

GIB = 2**30


@pytest.mark.parametrize(
    ("size", "free", "fits"),
    [(8 * GIB, 10 * GIB, True), (8 * GIB + 1, 10 * GIB, False), (0, 0, True), (1, 0, False)],
)
def test_a_model_fits_into_four_fifths_of_free_memory(size: int, free: int, fits: bool) -> None:
    assert fits_page_cache(size, free) is fits


def test_free_memory_is_some_of_this_machines() -> None:
    import psutil

    assert 0 < free_memory_bytes() <= psutil.virtual_memory().total


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(files, "_FADVISE", lambda _, *given: calls.append(given))
    for number, name in enumerate(("SEQUENTIAL", "WILLNEED", "DONTNEED")):
        monkeypatch.setattr(os, f"POSIX_FADV_{name}", number, raising=False)
    return calls


@pytest.mark.parametrize("drop", [True, False])
def test_what_the_system_is_told(
    drop: bool, tmp_path: Path, told: list[tuple[int, int, int]]
) -> None:
    (tmp_path / "x").write_bytes(bytes(range(100)))
    file, buffer = ReadFile(tmp_path / "x", drop_behind=drop), bytearray(20)
    file.advise_sequential(10, 20)
    file.advise_soon(30, 5)
    file.read_into(memoryview(buffer), 10, "x")
    file.close()
    assert bytes(buffer) == bytes(range(10, 30))
    assert told == [(10, 20, 0), (30, 5, 1), *([(10, 20, 2)] if drop else [])]


def test_read_ahead_is_asked_for_in_pieces_that_the_system_grants(
    tmp_path: Path, told: list[tuple[int, int, int]]
) -> None:
    (tmp_path / "x").touch()
    file = ReadFile(tmp_path / "x")
    file.advise_soon(5, 2 * 2**20 + 7)
    file.close()
    assert told == [(5, 2**20, 1), (5 + 2**20, 2**20, 1), (5 + 2 * 2**20, 7, 1)]


def test_a_system_that_cannot_be_told_reads_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_FADVISE", None)
    (tmp_path / "x").write_bytes(b"abc")
    file, buffer = ReadFile(tmp_path / "x", drop_behind=True), bytearray(3)
    file.advise_soon(0, 3)
    file.read_into(memoryview(buffer), 0, "x")
    file.close()
    assert buffer == b"abc"
