"""Safetensors files with one error each.

``FILES`` maps a name to the file's bytes and the pieces that the error text must have.
"""

from __future__ import annotations

import json
from typing import Any


def file_bytes(header: Any, data: bytes = b"") -> bytes:
    """Return a file made of a header (JSON value, text or bytes) and data."""
    if not isinstance(header, str | bytes):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    return len(raw).to_bytes(8, "little") + raw + data


def tensor(start: int = 0, end: int = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    """Return one tensor's entry."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


EIGHT = bytes(8)
GOOD = {"a": tensor(0, 8), "b": tensor(8, 16)}

FILES: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["0 bytes long, too short for a safetensors file", "download it again"]),
    "seven bytes": (b"1234567", ["7 bytes long, too short"]),
    "header too long for the format": (
        (100_000_001).to_bytes(8, "little") + b"{}",
        ["header of 100000001 bytes, the format allows 100000000", "no safetensors file"],
    ),
    "header of 2**64 - 1": (b"\xff" * 8 + b"{}", [f"header of {2**64 - 1} bytes"]),
    "a pickle": (b"PK\x03\x04" + bytes(200), ["truncated inside its header"]),
    "header beyond the file": (
        (500).to_bytes(8, "little") + b"{}",
        ["truncated inside its header: 500 bytes of header announced, 2 present"],
    ),
    "no header": (bytes(8), ["header must begin with '{', found ''"]),
    "header not UTF-8": (file_bytes(b'{"\xff": 1}'), ["header is not UTF-8 (byte 10 of the file)"]),
    "header an array": (file_bytes([1]), ["header must begin with '{', found '['"]),
    "header begins with blanks": (file_bytes(" {}"), ["must begin with '{', found ' '"]),
    "header not JSON": (file_bytes("{'a': 1}"), ["header is not JSON (Expecting property name"]),
    "header cut": (file_bytes('{"a": {"dtype": "F3'), ["header is not JSON (Unterminated string"]),
    "header with more behind": (file_bytes("{} {}"), ["header is not JSON (Extra data"]),
    "header with NaN": (file_bytes('{"a": NaN}'), ["header is not JSON (NaN is not a JSON value"]),
    "nested too deeply": (file_bytes('{"a":' * 100_000), ["header is not JSON"]),
    "a count of 5000 digits": (
        file_bytes('{"a": {"shape": [' + "9" * 5000 + "]}}"),
        ["header is not JSON"],
    ),
    "duplicate tensor": (
        file_bytes(f'{{"a": {json.dumps(tensor())}, "a": {json.dumps(tensor())}}}', EIGHT),
        ["header names 'a' twice", "save it again"],
    ),
    "duplicate key inside a tensor": (
        file_bytes('{"a": {"dtype": "F32", "dtype": "F16", "shape": [], "data_offsets": [0, 4]}}'),
        ["header names 'dtype' twice"],
    ),
    "metadata no object": (
        file_bytes({"__metadata__": 3}),
        ["__metadata__ must be an object of texts, found 3"],
    ),
    "metadata value no text": (
        file_bytes({"__metadata__": {"format": 1}}),
        ["__metadata__ entry 'format' must be a text, found 1"],
    ),
    "name no Unicode": (
        file_bytes('{"\\ud800": ' + json.dumps(tensor()) + "}", EIGHT),
        ["tensor '\\ud800': its name is not valid Unicode"],
    ),
    "entry no object": (file_bytes({"a": [1]}), ["tensor 'a': expected an object, found [1]"]),
    "dtype missing": (
        file_bytes({"a": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT),
        ["tensor 'a': dtype is missing"],
    ),
    "shape missing": (
        file_bytes({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT),
        ["tensor 'a': shape is missing"],
    ),
    "offsets missing": (
        file_bytes({"a": {"dtype": "F32", "shape": [2]}}, EIGHT),
        ["tensor 'a': data_offsets is missing"],
    ),
    "unknown dtype": (
        file_bytes({"a": tensor(dtype="Q4_K")}, EIGHT),
        ["tensor 'a': unknown dtype 'Q4_K', expected one of BOOL, ", "save it as BF16"],
    ),
    "dtype no text": (file_bytes({"a": tensor(dtype=["F32"])}, EIGHT), ["unknown dtype ['F32']"]),
    "negative dimension": (
        file_bytes({"a": tensor(shape=[-2])}, EIGHT),
        ["tensor 'a': shape must be a list of counts, found [-2]"],
    ),
    "fractional dimension": (
        file_bytes({"a": tensor(shape=[2.0])}, EIGHT),
        ["shape must be a list of counts, found [2.0]"],
    ),
    "boolean dimension": (
        file_bytes({"a": tensor(shape=[True])}, EIGHT),
        ["shape must be a list of counts, found [True]"],
    ),
    "shape no list": (
        file_bytes({"a": tensor(shape="2")}, EIGHT),
        ["shape must be a list of counts, found '2'"],
    ),
    "too many dimensions": (
        file_bytes({"a": tensor(shape=[1] * 65)}, EIGHT),
        ["tensor 'a': 65 dimensions, at most 64 are possible"],
    ),
    "shape beyond any file": (
        file_bytes({"a": tensor(shape=[2**62, 2**62, 0], end=0)}),
        ["tensor 'a': shape [4611686018427387904, ", "is too large for any file"],
    ),
    "offsets no pair": (
        file_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, EIGHT),
        ["tensor 'a': data_offsets must be two counts, found [0]"],
    ),
    "offset negative": (
        file_bytes({"a": tensor(-8, 0)}, EIGHT),
        ["data_offsets must be two counts, found [-8, 0]"],
    ),
    "offset beyond 64 bits": (
        file_bytes({"a": tensor(0, 2**64)}, EIGHT),
        ["data_offsets must be two counts"],
    ),
    "ends before it starts": (
        file_bytes({"a": tensor(8, 0)}, EIGHT),
        ["tensor 'a': its data ends before it starts (8 to 0)"],
    ),
    "size not shape times dtype": (
        file_bytes({"a": tensor(0, 8, [3])}, EIGHT),
        ["tensor 'a': 8 bytes of data, expected 12 for shape [3] of F32"],
    ),
    "overlap": (
        file_bytes({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)),
        ["tensor 'b': its data overlaps tensor 'a'"],
    ),
    "same range twice": (
        file_bytes({"a": tensor(0, 8), "b": tensor(0, 8)}, EIGHT),
        ["tensor 'b': its data overlaps tensor 'a'"],
    ),
    "hole": (
        file_bytes({"a": tensor(0, 8), "b": tensor(12, 20)}, bytes(20)),
        ["tensor 'b': 4 bytes between tensor 'a' and it belong to no tensor"],
    ),
    "hole behind the header": (
        file_bytes({"a": tensor(4, 12)}, bytes(12)),
        ["tensor 'a': 4 bytes between the header and it belong to no tensor"],
    ),
    "truncated": (
        file_bytes(GOOD, bytes(13)),
        ["truncated: tensor 'b' ends at byte ", "(3 bytes are missing from this tensor)"],
    ),
    "longer than the data": (
        file_bytes(GOOD, bytes(21)),
        ["5 bytes behind the last tensor belong to no tensor"],
    ),
}
