"""Read and check the header of a safetensors file.

In: a path. Out: one :class:`TensorEntry` per tensor with its absolute byte range. Reads the header,
never tensor data, and holds the header's JSON (at most 100 MB, the format's limit). The checks are
those of the safetensors package (``Metadata::validate`` and ``SafeTensors::read_metadata``); each
way in which a file can be wrong has its own error text.

Layout of a file: 8 bytes with the little-endian length of the header, the header as JSON, the data.
Offsets in the JSON count from the start of the data, offsets in a :class:`TensorEntry` from the
start of the file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from frugal_bonsai.dtypes import DTYPE_BYTES
from frugal_bonsai.errors import CheckpointError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
METADATA_KEY = "__metadata__"
_MAX_COUNT = 2**63 - 1  # torch counts in signed 64-bit integers
_MAX_DIMENSIONS = 64  # numpy's limit

DOWNLOAD_AGAIN = "download it again or restore it from a copy"
SAVE_AGAIN = "save it again with the safetensors package or save_pretrained"


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """The place of one tensor in a file.

    Attributes:
        name: name in the file.
        dtype: safetensors name of the dtype (``"BF16"``, ``"F32"``, ...).
        shape: dimensions, ``[out, in]`` for a weight.
        file: the file that holds the tensor.
        start: first byte, counted from the start of the file.
        end: one past the last byte.
        transposed: the file stores the weight as ``[in, out]``. Reading the whole tensor
            transposes it.
        gguf_kind: number format in a GGUF file (``Q4_K``), whose offsets here are virtual; None in
            a safetensors file.
        stacked: the tensor ``name`` of the file holds a part of all experts; this entry is one of
            so many that hold its rows of one expert. 0 for a tensor that stands alone.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int
    transposed: bool = False
    gguf_kind: str | None = None
    stacked: int = 0

    @property
    def size_bytes(self) -> int:
        """Bytes in the dtype: those in the file, except in a GGUF file."""
        return self.end - self.start

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Dimensions in the file."""
        return self.shape[::-1] if self.transposed else self.shape


class _DuplicateKeyError(Exception):
    """A JSON object has the same key twice."""


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read and check the header of one safetensors file.

    Args:
        path: the file.

    Returns:
        The tensors by name, in the order of their data, and the metadata.

    Raises:
        CheckpointError: the file is missing, truncated or damaged. The text names the tensor.
    """
    raw, file_bytes = _read_header_bytes(path)
    header = _parse_json(path, raw)
    metadata = _check_metadata(path, header.pop(METADATA_KEY, None))
    data_start = LENGTH_BYTES + len(raw)
    entries = [_check_tensor(path, name, info, data_start) for name, info in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.end))
    _check_ranges(path, entries, data_start, file_bytes)
    return {entry.name: entry for entry in entries}, metadata


def _read_header_bytes(path: Path) -> tuple[bytes, int]:
    """Return the bytes of the header and the length of the file."""
    try:
        with path.open("rb") as file:
            file_bytes = path.stat().st_size
            prefix = file.read(LENGTH_BYTES)
            if len(prefix) < LENGTH_BYTES:
                _fail(
                    path,
                    f"{file_bytes} bytes long, too short for a safetensors file "
                    f"(it begins with {LENGTH_BYTES} bytes that give the header's length)",
                )
            header_bytes = int.from_bytes(prefix, "little")
            if header_bytes > MAX_HEADER_BYTES:
                _fail(
                    path,
                    f"claims a header of {header_bytes} bytes, the format allows "
                    f"{MAX_HEADER_BYTES}; this is no safetensors file or its start is damaged",
                )
            if header_bytes > file_bytes - LENGTH_BYTES:
                _fail(
                    path,
                    f"truncated inside its header: {header_bytes} bytes of header announced, "
                    f"{file_bytes - LENGTH_BYTES} present",
                )
            raw = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error}); check the path and its "
            "permissions"
        ) from error
    if len(raw) < header_bytes:
        _fail(path, f"ended after {len(raw)} of {header_bytes} header bytes while it was read")
    return raw, file_bytes


def _parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    """Parse the header, and refuse the JSON that serde_json refuses and Python accepts."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        _fail(path, f"its header is not UTF-8 (byte {LENGTH_BYTES + error.start} of the file)")
    if not text.startswith("{"):
        _fail(path, f"its header must begin with '{{', found {text[:1]!r}")
    try:
        header = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except _DuplicateKeyError as error:
        _fail(path, f"its header names {error.args[0]!r} twice", SAVE_AGAIN)
    except RecursionError:
        _fail(path, "its header is not JSON of this format (nested too deeply)")
    except ValueError as error:  # JSONDecodeError, and integers of thousands of digits
        _fail(path, f"its header is not JSON ({error})")
    if not isinstance(header, dict):
        _fail(path, f"its header is not a JSON object but {type(header).__name__}")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict, and refuse a key that occurs twice."""
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return made


def _no_constant(text: str) -> NoReturn:
    """Refuse NaN and Infinity, which are not JSON."""
    raise ValueError(f"{text} is not a JSON value")


def _check_metadata(path: Path, metadata: Any) -> dict[str, str]:
    """Check that the metadata map text to text."""
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        _fail(path, f"{METADATA_KEY} must be an object of texts, found {_show(metadata)}")
    for key, value in metadata.items():
        if not isinstance(value, str):
            _fail(path, f"{METADATA_KEY} entry {key!r} must be a text, found {_show(value)}")
    return dict(metadata)


def _check_tensor(path: Path, name: str, info: Any, data_start: int) -> TensorEntry:
    """Check one tensor's dtype, shape and byte range."""
    where = f"tensor {name!r}"
    if not _is_text(name):
        _fail(path, f"{where}: its name is not valid Unicode")
    if not isinstance(info, dict):
        _fail(path, f"{where}: expected an object, found {_show(info)}")
    for key in ("dtype", "shape", "data_offsets"):
        if key not in info:
            _fail(path, f"{where}: {key} is missing", SAVE_AGAIN)
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        _fail(
            path,
            f"{where}: unknown dtype {_show(dtype)}, expected one of {', '.join(DTYPE_BYTES)}",
            "save it as BF16, F16 or F32",
        )
    if not isinstance(shape, list) or not all(_is_count(length) for length in shape):
        _fail(path, f"{where}: shape must be a list of counts, found {_show(shape)}")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(_is_count(offset) for offset in offsets)
    ):
        _fail(path, f"{where}: data_offsets must be two counts, found {_show(offsets)}")
    if len(shape) > _MAX_DIMENSIONS:
        _fail(path, f"{where}: {len(shape)} dimensions, at most {_MAX_DIMENSIONS} are possible")
    start, end = offsets
    if end < start:
        _fail(path, f"{where}: its data ends before it starts ({start} to {end})")
    needed = DTYPE_BYTES[dtype]
    for length in shape:
        needed *= length
        if needed > _MAX_COUNT:
            _fail(path, f"{where}: shape {_show(shape)} of {dtype} is too large for any file")
    if end - start != needed:
        _fail(
            path,
            f"{where}: {end - start} bytes of data, expected {needed} for shape {_show(shape)} "
            f"of {dtype}",
        )
    return TensorEntry(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        file=path,
        start=data_start + start,
        end=data_start + end,
    )


def _check_ranges(
    path: Path, entries: Sequence[TensorEntry], data_start: int, file_bytes: int
) -> None:
    """Check that the tensors fill the file without gap or overlap."""
    position, previous = data_start, "the header"
    for entry in entries:
        where = f"tensor {entry.name!r}"
        if entry.start < position:
            _fail(
                path,
                f"{where}: its data overlaps {previous} (starts at byte {entry.start}, expected "
                f"{position})",
            )
        if entry.start > position:
            _fail(
                path,
                f"{where}: {entry.start - position} bytes between {previous} and it belong to no "
                "tensor",
            )
        if entry.end > file_bytes:
            _fail(
                path,
                f"truncated: {where} ends at byte {entry.end}, the file at {file_bytes} "
                f"({entry.end - file_bytes} bytes are missing from this tensor)",
            )
        position, previous = entry.end, where
    if position != file_bytes:
        _fail(
            path,
            f"{file_bytes - position} bytes behind the last tensor belong to no tensor (file of "
            f"{file_bytes} bytes, expected {position})",
        )


def _is_count(value: Any) -> bool:
    """Return whether a value is an integer from 0 to 2**63 - 1; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_COUNT


def _is_text(value: str) -> bool:
    """Return whether a text is valid Unicode: JSON escapes can spell lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _show(value: Any) -> str:
    """Return a value as text for an error, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _fail(path: Path, what: str, advice: str = DOWNLOAD_AGAIN) -> NoReturn:
    """Raise the error of one file."""
    raise CheckpointError(f"{path}: {what}; {advice}")
