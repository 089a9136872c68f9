"""Seeded mutations of valid bytes, JSON values and GGUF headers.

In: something valid and a random generator. Out: something that may be wrong in any way: types,
sizes, lengths, names, paths, nesting, encoding. The same generator gives the same mutation.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

_POWERS = (2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30)
_SMALL = (0, 1, 2, 3, 7, 8, 32, 255, 4096, 65535)
_EDGES: tuple[int, ...] = (*_SMALL, *_POWERS, -1, -8, -(2**31), -(2**63))
_NUMBERS = (0.5, -0.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"))
_TEXTS = (
    *("", " ", ".", "..", "/", "0", "-1", "\x00", "\ud800", "\n", "'; rm -rf .", "{}", "é" * 3),
    *("x" * 5000, "<script>alert(1)</script>", "{{ 7 * 7 }}", "%s%n", "${HOME}", "None"),
)


class Mutator:
    """Draws mutations.

    Args:
        draws: random generator.
        outside: texts that name files outside of the folder of a case.
    """

    def __init__(self, draws: random.Random, outside: Sequence[str] = ()) -> None:
        self.draws, self._outside = draws, tuple(outside)

    # -- bytes ----------------------------------------------------------------------------------
    def data(self, data: bytes, edits: int = 3) -> bytes:
        """Return bytes with some edits, most of them at the start, where headers lie."""
        for _ in range(self.draws.randint(1, edits)):
            edit = self.draws.choice(_BYTE_EDITS)
            data = edit(self, data)
        return data

    def place(self, data: bytes) -> int:
        """Return an offset; every second one is among the first 64."""
        most = len(data) if self.draws.random() < 0.5 else min(64, len(data))
        return self.draws.randint(0, most)

    def _flip(self, data: bytes) -> bytes:
        if not data:
            return b"\x00"
        changed, at = bytearray(data), min(self.place(data), len(data) - 1)
        changed[at] ^= 1 << self.draws.randrange(8)
        return bytes(changed)

    def _number(self, data: bytes) -> bytes:
        at, size = self.place(data), self.draws.choice((1, 2, 4, 8))
        value = self.draws.choice(_EDGES) % (1 << 8 * size)
        return data[:at] + value.to_bytes(size, "little") + data[at + size :]

    def _cut(self, data: bytes) -> bytes:
        return data[: self.place(data)]

    def _remove(self, data: bytes) -> bytes:
        at = self.place(data)
        return data[:at] + data[at + self.draws.choice((1, 8, 100)) :]

    def _insert(self, data: bytes) -> bytes:
        at, size = self.place(data), self.draws.choice((1, 8, 100))
        return data[:at] + self.draws.randbytes(size) + data[at:]

    def _repeat(self, data: bytes) -> bytes:
        at = self.place(data)
        piece = data[at : at + self.draws.choice((1, 16, 300))]
        return data[:at] + piece * self.draws.choice((2, 50)) + data[at:]

    def hostile_count(self) -> int:
        """Return a count of 64 bits."""
        return self.draws.choice(_EDGES) % 2**64

    # -- values ---------------------------------------------------------------------------------
    def hostile(self) -> Any:
        """Return a value that a reader may not expect."""
        kind = self.draws.randrange(8)
        if kind <= 1:
            return self.draws.choice(_EDGES)
        if kind == 2:
            return self.draws.choice(_NUMBERS)
        if kind == 3 and self._outside:
            return self.draws.choice(self._outside)
        if kind <= 4:
            return self.draws.choice(_TEXTS)
        if kind == 5:
            return self.draws.choice((None, True, False))
        if kind == 6:
            return copy.deepcopy(self.draws.choice(([], {}, [[]], [None], {"": {}}, [0] * 100)))
        return [self.draws.choice(_EDGES) for _ in range(self.draws.randint(1, 4))]

    def value(self, value: Any, edits: int = 3) -> Any:
        """Return a copy of a JSON value with some edits anywhere inside."""
        value = copy.deepcopy(value)
        for _ in range(self.draws.randint(1, edits)):
            value = self._edit(value)
        return value

    def _edit(self, value: Any) -> Any:
        places = [place for place in _places(value) if self.draws.random() < 0.9] or [()]
        place = self.draws.choice(places)
        if not place:
            return self.hostile() if self.draws.random() < 0.3 else value
        parent = value
        for key in place[:-1]:
            parent = parent[key]
        self._change(parent, place[-1])
        return value

    def _change(self, parent: Any, key: Any) -> None:
        """Change one entry of a list or of an object."""
        old, kind = parent[key], self.draws.randrange(10)
        if kind <= 4:
            parent[key] = self.hostile()
        elif kind == 5:
            del parent[key]
        elif kind == 6 and isinstance(parent, dict):
            parent[str(self.draws.choice((*_TEXTS, *self._outside)))] = old
        elif kind == 6:
            parent.insert(key, copy.deepcopy(old))
        elif kind == 7 and isinstance(old, int | float) and not isinstance(old, bool):
            parent[key] = self.draws.choice((old + 1, old - 1, -old, old * 2, str(old), [old]))
        elif kind == 8:
            parent[key] = self.draws.choice(([old], {"a": old}, str(old), [old, old]))
        else:
            others = list(parent) if isinstance(parent, dict) else range(len(parent))
            parent[key] = copy.deepcopy(parent[self.draws.choice(list(others))])

    def json(self, value: Any, edits: int = 3) -> bytes:
        """Return a mutated value as JSON; now and then the JSON itself is damaged."""
        text = json.dumps(self.value(value, edits)).encode("utf-8", "surrogatepass")
        kind = self.draws.randrange(20)
        if kind == 0:
            return self.data(text)
        if kind == 1:
            at = self.place(text)
            long = (b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b"NaN", b"\xff", b"/**/")
            return text[:at] + self.draws.choice(long) + text[at:]
        return text

    # -- fields of binary headers ---------------------------------------------------------------
    def fields(self, fields: Sequence[bytes], edits: int = 3) -> bytes:
        """Return the bytes of a header whose fields are numbers and texts, with some edits."""
        changed = list(fields)
        for _ in range(self.draws.randint(1, edits)):
            at, kind = self.draws.randrange(len(changed)), self.draws.randrange(8)
            field = changed[at]
            if kind <= 3 and len(field) in (4, 8):
                value = self.draws.choice((*_EDGES, *range(16)))
                changed[at] = (value % (1 << 8 * len(field))).to_bytes(len(field), "little")
            elif kind == 4:
                changed[at] = self.data(field, 1)
            elif kind == 5:
                del changed[at]
            elif kind == 6:
                changed.insert(at, field)
            else:
                changed[at] = changed[self.draws.randrange(len(changed))]
            if not changed:
                break
        return b"".join(changed)


_BYTE_EDITS: tuple[Callable[[Mutator, bytes], bytes], ...] = (
    *(Mutator._flip, Mutator._number, Mutator._cut),
    *(Mutator._remove, Mutator._insert, Mutator._repeat),
)


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside a JSON value; of long lists only some."""
    found = [place]
    if isinstance(value, dict):
        for key in value:
            found += _places(value[key], (*place, key))
    elif isinstance(value, list):
        for at in range(0, len(value), max(1, len(value) // 20)):
            found += _places(value[at], (*place, at))
    return found


def gguf_fields(data: bytes) -> list[bytes]:
    """Return the header of a valid GGUF file as its numbers and texts, and its data as the last."""
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    fields, at = list[bytes](), 0

    def take(size: int) -> int:
        nonlocal at
        fields.append(data[at : at + size])
        at += size
        return int.from_bytes(fields[-1], "little")

    def take_value(kind: int) -> None:
        if kind == 8:
            take(take(8))
        elif kind == 9:
            inner, count = take(4), take(8)
            if inner == 8:
                for _ in range(count):
                    take_value(inner)
            else:
                take(count * sizes[inner])
        else:
            take(sizes[kind])

    take(4), take(4)
    tensors, keys = take(8), take(8)
    for _ in range(keys):
        take(take(8))
        take_value(take(4))
    for _ in range(tensors):
        take(take(8))
        for _ in range(take(4)):
            take(8)
        take(4), take(8)
    return [*fields, data[at:]]


def safetensors_bytes(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """Return a safetensors file; ``length`` may lie."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data
