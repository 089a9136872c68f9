"""Headers of GGUF files: what is read, and one error for each way in which a file can be wrong."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from frugal_bonsai.checkpoint.gguf_header import TOKENS, read_gguf_header
from frugal_bonsai.errors import CheckpointError


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str = "t", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    place = struct.pack("<IQ", kind, offset)
    return text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1]) + place


def header(keys: list[bytes] = [], tensors: list[bytes] = [], version: int = 3) -> bytes:  # noqa: B006
    start = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys))
    return b"".join((start, *keys, *tensors))


def test_what_the_writer_of_the_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_block_count(3)
    writer.add_add_bos_token(True)
    writer.add_token_list(["a", "ß", "c"])
    writer.add_token_types([1, 2, 3])
    writer.add_array("llama.counts", [1, 2])
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    writer.add_tensor("one", values)
    blocks = gguf.quantize(np.ones((2, 64), np.float32), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("two", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_gguf_header(path)
    assert found.metadata["llama.attention.layer_norm_rms_epsilon"] == 1e-5  # not 9.99999975e-06
    assert found.metadata["llama.block_count"] == 3 and found.metadata["llama.counts"] == [1, 2]
    assert found.metadata["tokenizer.ggml.add_bos_token"] is True
    assert found.metadata[TOKENS] == 3
    assert read_gguf_header(path, (TOKENS,)).metadata[TOKENS] == ["a", "ß", "c"]
    one, two = found.tensors["one"], found.tensors["two"]
    assert (one.kind, one.shape, one.size_bytes, one.rows) == ("F32", (3, 4), 48, 3)
    assert (two.kind, two.shape, two.size_bytes) == ("Q4_0", (2, 64), 2 * 36)
    for reader, mine in zip(gguf.GGUFReader(path).tensors, (one, two), strict=True):
        assert reader.data_offset == mine.start
    assert np.array_equal(np.fromfile(path, np.float32, 12, offset=one.start), values.ravel())


WRONG: dict[str, tuple[bytes, str]] = {
    "another file": (b"{}", "does not begin with GGUF"),
    "ends after the magic": (b"GGUF", r"truncated inside its header \(the file has 4 bytes\)"),
    "version 1": (header(version=1), "is GGUF of version 1, expected one of 2, 3; convert"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is big-endian"),
    "a key twice": (
        header([key("a", 4, b"\0" * 4)] * 2),
        "its metadata name 'a' twice",
    ),
    "a key without value": (header([key("a", 4, b"")]), "truncated inside its header"),
    "a text that ends behind": (
        header([key("a", 8, struct.pack("<Q", 2**60))]),
        "truncated inside its header",
    ),
    "an array that ends behind": (
        header([key("a", 9, struct.pack("<IQ", 4, 2**40))], [tensor()]),
        "truncated inside its header",
    ),
    "an array of texts": (
        header([key("a", 9, struct.pack("<IQ", 8, 2**60))]),
        "truncated inside its header",
    ),
    "an array of arrays": (
        header([key("a", 9, struct.pack("<IQ", 9, 1))]),
        "a is an array of the type 9",
    ),
    "a type": (header([key("a", 99, b"")]), "a has a value of the unknown type 99"),
    "a name": (header([struct.pack("<Q", 1) + b"\xff"]), "the name of a key is not UTF-8"),
    "alignment": (
        header([key("general.alignment", 4, struct.pack("<I", 24))]),
        "general.alignment is 24, expected a power of two",
    ),
    "dimensions": (header([], [tensor(shape=(1,) * 5)]), "tensor 't' has 5 dimensions"),
    "a tensor twice": (header([], [tensor(), tensor()]) + b"\0" * 99, "names tensor 't' twice"),
    "a number format": (header([], [tensor(kind=77)]), "the number format 77, .*pip install -U"),
    "a row": (header([], [tensor(shape=(2, 33), kind=2)]), "rows of 33 values in blocks of 32"),
    "data": (
        header([], [tensor(shape=(64, 64))]),
        "truncated: tensor 't' ends at byte 164[0-9]*, the file at",
    ),
    "a huge tensor": (header([], [tensor(shape=(2**40, 2**40))]), "truncated: tensor 't' ends"),
}


@pytest.mark.parametrize("case", WRONG)
def test_damaged_files(tmp_path: Path, case: str) -> None:
    data, said = WRONG[case]
    path: Any = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=said) as refused:
        read_gguf_header(path)
    assert str(path) in str(refused.value)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_gguf_header(tmp_path / "m.gguf")


def test_every_truncated_header_is_refused(tmp_path: Path) -> None:
    whole = header([key("a", 8, text("b")), key("c", 9, struct.pack("<IQ", 8, 1) + text("d"))])
    path = tmp_path / "m.gguf"
    for length in range(4, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="truncated inside"):
            read_gguf_header(path)
    path.write_bytes(whole)
    assert read_gguf_header(path).metadata == {"a": "b", "c": 1}
