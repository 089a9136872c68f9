"""The log of a round: numbers come back to the bit, and what a kill has cut short is dropped."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from frugal_bonsai.bonsai.round_log import RoundLog
from frugal_bonsai.errors import OutputError

NUMBERS = [1 / 3, -math.pi, 5e-324, 1.7976931348623157e308]


def test_numbers_come_back_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "round.jsonl"
    log = RoundLog(path)
    assert log.find("a").values == [] and not path.exists()
    log.append("a", NUMBERS[:2], 10)
    log.append("b", [1.0], 1)
    log.append("a", NUMBERS[2:], 20)
    for found in (log.find("a"), RoundLog(path).find("a")):
        assert found.values == NUMBERS and found.tokens == 30
    found.values.append(0.0)  # a copy
    assert RoundLog(path).find("a").values == NUMBERS
    assert RoundLog(path).find("c").values == []


@pytest.mark.parametrize(
    "torn",
    [b'{"key": "a", "values": [2.0', b'{"key": "a", "values": [2.0], "tokens": 1}', b"\x00\x00\n"],
)
def test_a_line_that_a_kill_cut_short_is_dropped(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "round.jsonl"
    RoundLog(path).append("a", [1.0], 4)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    log = RoundLog(path)
    assert log.find("a").values == [1.0]
    assert path.read_bytes() == whole
    log.append("a", [3.0], 4)
    assert RoundLog(path).find("a").values == [1.0, 3.0]


def test_a_cleared_log_is_empty(tmp_path: Path) -> None:
    log = RoundLog(tmp_path / "round.jsonl")
    log.append("a", [1.0], 4)
    log.clear()
    assert log.find("a").values == [] and list(tmp_path.iterdir()) == []
    log.clear()


def test_without_a_file_numbers_stay_in_memory() -> None:
    log = RoundLog()
    log.append("a", [1.0], 4)
    assert log.find("a").values == [1.0]
    log.clear()
    assert log.find("a").values == []


def test_a_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"gone.*round\.jsonl"):
        RoundLog(tmp_path / "gone" / "round.jsonl").append("a", [1.0], 4)
