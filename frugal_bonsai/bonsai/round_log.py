"""The log of the round that runs: results that a killed run would have to compute again.

In: the utilities of masks and the losses of candidates, as they come. Out: the same numbers after a
restart, to the bit. One JSON object a line, appended and synced; a line that a kill has cut short
is dropped. The key of a line is a hash of what was evaluated, so that a line of another round or of
another draw is never used. Holds the numbers of one round.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from frugal_bonsai.checkpoint.checksum import CHECKSUM, is_whole, with_checksum
from frugal_bonsai.checkpoint.commit import output_errors
from frugal_bonsai.errors import WRONG_VALUES
from frugal_bonsai.plain_json import parse_json

ROUND_LOG = "round.jsonl"


@dataclass
class Logged:
    """The numbers of one key.

    Attributes:
        values: In the order in which they were appended.
        tokens: Forward tokens that they cost.
    """

    values: list[float] = field(default_factory=list)
    tokens: int = 0


class RoundLog:
    """Appends numbers to a file and finds them again.

    Args:
        path: The file, which need not exist. None keeps the numbers in memory alone.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._logged: dict[str, Logged] | None = None

    def find(self, key: str) -> Logged:
        """Return a copy of the numbers of a key; empty if there are none."""
        found = self._all().get(key, Logged())
        return Logged(list(found.values), found.tokens)

    def append(self, key: str, values: Sequence[float], tokens: int) -> None:
        """Append numbers to those of a key.

        Raises:
            OutputError: The disk is full, or the file cannot be written.
        """
        logged = self._all()[key]
        logged.values += values
        logged.tokens += tokens
        if self._path is None:
            return
        entry = with_checksum({"key": key, "values": list(values), "tokens": tokens})
        line = json.dumps(entry)
        with output_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def clear(self) -> None:
        """Remove all numbers: the round is finished, or another run begins."""
        self._logged = None
        if self._path is not None:
            with output_errors(self._path):
                self._path.unlink(missing_ok=True)

    def _all(self) -> dict[str, Logged]:
        if self._logged is None:
            self._logged = defaultdict(Logged)
            if self._path is not None and self._path.exists():
                _read(self._path, self._logged)
        return self._logged


def _read(path: Path, logged: dict[str, Logged]) -> None:
    """Read a log up to the first line that is not whole, and cut the rest off."""
    with output_errors(path), path.open("r+b") as file:
        data, whole = file.read(), 0
        for line in data.splitlines(keepends=True):
            entry = _parse(line)
            if entry is None:
                break
            key, values, tokens = entry
            logged[key].values += values
            logged[key].tokens += tokens
            whole += len(line)
        if whole < len(data):
            file.truncate(whole)


def _parse(line: bytes) -> tuple[str, list[float], int] | None:
    """Return a line's key, numbers and tokens; None if the line is not one that was written."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = parse_json(line)
        if not is_whole(entry) or len(entry.keys() - {CHECKSUM}) != 3:
            return None
        return str(entry["key"]), [float(value) for value in entry["values"]], int(entry["tokens"])
    except WRONG_VALUES:
        return None
