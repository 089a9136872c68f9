"""Read and check the header of a GGUF file.

In: a path. Out: the metadata and one :class:`GgufTensor` per tensor. Reads the header, never tensor
data. Long arrays, such as a vocabulary of 262,144 tokens, are skipped unless the caller names them:
the ``gguf`` package's reader holds 700 MB for such a header. Holds what it returns; the header is
mapped while it is read.

Layout of a file: magic, version, number of tensors, number of keys; the keys with typed values; the
names, shapes, number formats and offsets of the tensors; their data, aligned. All numbers are
little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from frugal_bonsai.errors import CheckpointError

GGUF_START = b"GGUF"
TOKENS = "tokenizer.ggml.tokens"
_DOWNLOAD_AGAIN = "download it again or restore it from a copy"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_SHORT_ARRAY = 4096  # longer arrays hold vocabularies
# Types of values in the metadata -> how struct reads them.
_FLOAT32, _TEXT, _ARRAY = 6, 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"} | {
    12: "d"
}


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """The place of one tensor in a GGUF file.

    Attributes:
        name: llama.cpp's name (``blk.0.attn_q.weight``).
        kind: number format (``Q4_K``, ``F32``).
        shape: dimensions, the outermost first.
        start: first byte, counted from the start of the file.
        size_bytes: bytes in the file.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int

    @property
    def rows(self) -> int:
        """Number of rows of all outer dimensions together; 1 for a vector."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """Contents of a GGUF file without the tensors' values.

    Attributes:
        path: the file.
        metadata: values by key. A text array, or an array of more than 4,096 numbers, that the
            caller did not name is its length.
        tensors: the tensors by llama.cpp's names, in the file's order.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf_header(path: Path, whole: Collection[str] = ()) -> GgufHeader:
    """Read and check the header of one GGUF file.

    Args:
        path: the file.
        whole: keys whose arrays are read, whatever their length.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, or of another version.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(GGUF_START)) != GGUF_START:
                _fail(path, "does not begin with GGUF; this is no GGUF file, or its start is lost")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Header(path, data).read(whole)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error}); check the path and its "
            "permissions"
        ) from error
    except (struct.error, OverflowError) as error:  # a length that ends behind the file
        raise CheckpointError(
            f"{path}: truncated inside its header (the file has {path.stat().st_size} bytes); "
            f"{_DOWNLOAD_AGAIN}"
        ) from error


def read_vocabulary(path: Path) -> int:
    """Return the number of tokens of a GGUF file.

    Raises:
        CheckpointError: It is no GGUF file, or has no tokens.
    """
    count = read_gguf_header(path).metadata.get(TOKENS)
    if not isinstance(count, int):
        raise CheckpointError(f"{path}: has no tokens ({TOKENS})")
    return count


class _Header:
    """A header that is being read.

    Args:
        path: the file, for error texts.
        data: its bytes.
    """

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, len(GGUF_START)

    def read(self, whole: Collection[str]) -> GgufHeader:
        """Read everything."""
        self._read_version()
        tensors, keys = self._numbers("QQ")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._name("a key")
            if key in metadata:
                _fail(self._path, f"its metadata name {key!r} twice")
            metadata[key] = self._value(key, whole)
        infos = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            _fail(self._path, f"general.alignment is {alignment!r}, expected a power of two")
        start = -(-self._at // alignment) * alignment
        return GgufHeader(path=self._path, metadata=metadata, tensors=self._place(infos, start))

    def _read_version(self) -> None:
        (version,) = self._numbers("I")
        if version in _VERSIONS:
            return
        if version & 0xFFFF == 0:
            _fail(self._path, "is big-endian", "use the usual, little-endian file")
        _fail(
            self._path,
            f"is GGUF of version {version}, expected one of {', '.join(map(str, _VERSIONS))}",
            "convert the model again with a current llama.cpp",
        )

    def _numbers(self, formats: str) -> tuple[Any, ...]:
        """Read numbers. Raises ``struct.error`` at the end of the file."""
        values = struct.unpack_from("<" + formats, self._data, self._at)
        self._at += struct.calcsize("<" + formats)
        return values

    def _text(self) -> bytes:
        (length,) = self._numbers("Q")
        text = self._data[self._at : self._at + length]
        if len(text) < length:
            raise struct.error("a text ends behind the file")
        self._at += length
        return text

    def _name(self, what: str) -> str:
        """Read the name of a key or a tensor."""
        try:
            return self._text().decode("utf-8")
        except UnicodeDecodeError:
            _fail(self._path, f"the name of {what} is not UTF-8 (byte {self._at} of the file)")

    def _value(self, key: str, whole: Collection[str]) -> Any:
        (kind,) = self._numbers("I")
        if kind == _ARRAY:
            return self._array(key, whole)
        if kind == _TEXT:
            return self._text().decode("utf-8", "replace")
        if kind not in _SCALARS:
            _fail(self._path, f"{key} has a value of the unknown type {kind}")
        (value,) = self._numbers(_SCALARS[kind])
        return _shortest(value) if kind == _FLOAT32 else value

    def _array(self, key: str, whole: Collection[str]) -> Any:
        """Read an array, or skip it and return its length."""
        found = self._array_or_length(key, whole)
        if self._at > len(self._data):
            raise struct.error("an array ends behind the file")
        return found

    def _array_or_length(self, key: str, whole: Collection[str]) -> Any:
        kind, length = self._numbers("IQ")
        if kind == _TEXT:
            if key in whole:
                return [self._text().decode("utf-8", "replace") for _ in range(length)]
            for _ in range(length):
                (size,) = struct.unpack_from("<Q", self._data, self._at)
                self._at += 8 + size
            return length
        if kind not in _SCALARS:
            _fail(self._path, f"{key} is an array of the type {kind}, which this program lacks")
        if key not in whole and length > _SHORT_ARRAY:
            self._at += length * struct.calcsize("<" + _SCALARS[kind])
            return length
        if length > len(self._data):
            raise struct.error("an array ends behind the file")
        return list(self._numbers(f"{length}{_SCALARS[kind]}"))

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Read name, shape, number format and offset of one tensor."""
        name = self._name("a tensor")
        (dimensions,) = self._numbers("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            _fail(self._path, f"tensor {name!r} has {dimensions} dimensions, expected 1 to 4")
        shape = self._numbers(f"{dimensions}Q")
        kind, offset = self._numbers("IQ")
        return name, shape[::-1], kind, offset

    def _place(
        self, infos: list[tuple[str, tuple[int, ...], int, int]], data_start: int
    ) -> dict[str, GgufTensor]:
        """Check the tensors' places, and return them by name."""
        import gguf

        tensors: dict[str, GgufTensor] = {}
        for name, shape, number, offset in infos:
            where = f"tensor {name!r}"
            if name in tensors:
                _fail(self._path, f"names {where} twice")
            try:
                kind = gguf.GGMLQuantizationType(number)
            except ValueError:
                _fail(
                    self._path,
                    f"{where} has the number format {number}, which this gguf package lacks",
                    "update it with `pip install -U gguf`",
                )
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            if shape[-1] % block:
                _fail(self._path, f"{where}: rows of {shape[-1]} values in blocks of {block}")
            size_bytes = math.prod(shape) // block * block_bytes
            end = data_start + offset + size_bytes
            if end > len(self._data):
                _fail(
                    self._path,
                    f"truncated: {where} ends at byte {end}, the file at {len(self._data)}",
                )
            tensors[name] = GgufTensor(
                name=name,
                kind=kind.name,
                shape=shape,
                start=data_start + offset,
                size_bytes=size_bytes,
            )
        return tensors


def _shortest(value: float) -> float:
    """Return the shortest decimal number that has this value in fp32: 1e-05 for 9.99999975e-06."""
    import numpy

    return float(str(numpy.float32(value)))


def _fail(path: Path, what: str, advice: str = _DOWNLOAD_AGAIN) -> NoReturn:
    """Raise the error of one file."""
    raise CheckpointError(f"{path}: {what}; {advice}")
