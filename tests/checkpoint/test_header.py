from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest
import safetensors
from hostile.files import FILES, GOOD, file_bytes, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from frugal_bonsai.checkpoint.file_layout import build_header
from frugal_bonsai.checkpoint.header import read_header
from frugal_bonsai.errors import CheckpointError


@pytest.mark.parametrize("name", FILES)
def test_each_way_to_be_wrong_has_its_own_text(tmp_path: Path, name: str) -> None:
    content, expected = FILES[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)

    with pytest.raises(CheckpointError) as caught:
        read_header(path)

    assert str(path) in str(caught.value)
    for piece in expected:
        assert piece in str(caught.value)


def test_texts_stay_readable(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(file_bytes({"a": tensor(shape="9" * 100_000)}))

    with pytest.raises(CheckpointError) as caught:
        read_header(path)

    assert len(str(caught.value)) < 300 + len(str(path))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone: cannot be read .*check the path"):
        read_header(tmp_path / "gone")


def test_tensors_come_in_the_order_of_the_data_with_absolute_ranges(tmp_path: Path) -> None:
    path = tmp_path / "x"
    header = {"b": tensor(8, 16), "empty": tensor(8, 8, [0, 5]), "a": tensor(0, 8)}
    content = file_bytes({"__metadata__": {"format": "pt"}, **header}, bytes(range(16)))
    path.write_bytes(content)

    entries, metadata = read_header(path)

    assert list(entries) == ["a", "empty", "b"]
    assert metadata == {"format": "pt"}
    entry = entries["b"]
    assert (entry.name, entry.dtype, entry.shape, entry.file) == ("b", "F32", (2,), path)
    assert content[entry.start : entry.end] == bytes(range(8, 16))
    assert entry.size_bytes == 8
    assert entries["empty"].size_bytes == 0


def test_built_header_is_byte_exact() -> None:
    header, ranges = build_header([("w", "BF16", (2, 3)), ("é", "F32", ())], {"format": "pt"})

    text = (
        '{"__metadata__":{"format":"pt"},'
        '"é":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'
        '"w":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]}}'
    ).encode()
    padded = text + b" " * (-len(text) % 8)
    assert header == len(padded).to_bytes(8, "little") + padded
    start = len(header)
    assert start % 8 == 0
    assert ranges == {"é": (start, start + 4), "w": (start + 4, start + 16)}


def test_built_header_needs_no_metadata_and_no_tensors() -> None:
    assert build_header([], {}) == ((8).to_bytes(8, "little") + b"{}      ", {})


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ([("a", "F32", (1,)), ("a", "F32", (1,))], "'a' is reserved or given twice"),
        ([("__metadata__", "F32", (1,))], "reserved"),
        ([("a", "Q4", (1,))], "dtype 'Q4' is not one of"),
    ],
)
def test_headers_that_cannot_be_built(
    tensors: list[tuple[str, str, tuple[int, ...]]], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        build_header(tensors, {})


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
_counts = st.integers(-1, 20)
_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "X"]),
        "shape": st.lists(_counts, max_size=3),
        "data_offsets": st.lists(_counts, min_size=1, max_size=3),
    }
)
_headers = st.dictionaries(st.text(max_size=4), _entries | _values, max_size=3).map(json.dumps)


def _outcome(content: bytes) -> str | None:
    """Return the error text, or None if the file is accepted."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(content)
        try:
            read_header(path)
        except CheckpointError as error:
            return str(error)
        return None


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=64)
    | st.builds(file_bytes, _headers, st.binary(max_size=32))
    | st.builds(file_bytes, st.binary(max_size=64), st.binary(max_size=32))
)
def test_random_bytes_give_nothing_but_checkpoint_errors(content: bytes) -> None:
    if _outcome(content) is None:
        safetensors.deserialize(content)  # what is accepted here, the package accepts too


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255), st.integers(0, 40))
def test_damaged_files_are_refused_as_the_package_refuses_them(
    place: int, value: int, cut: int
) -> None:
    content = bytearray(file_bytes({"__metadata__": {"k": "v"}, **GOOD}, bytes(16)))
    content[place % len(content)] = value
    damaged = bytes(content[: len(content) - cut])
    accepted = _outcome(damaged) is None
    try:
        safetensors.deserialize(damaged)
    except safetensors.SafetensorError:
        assert not accepted


def test_header_and_locate_do_not_import_torch() -> None:
    import subprocess

    code = (
        "import sys, frugal_bonsai.checkpoint.header, frugal_bonsai.checkpoint.locate, "
        "frugal_bonsai.checkpoint.reader, frugal_bonsai.checkpoint.writer; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
