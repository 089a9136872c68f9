"""Sizes: what people type, what people read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frugal_bonsai.dtypes import DTYPE_BYTES, TORCH_NAMES, torch_dtype
from frugal_bonsai.errors import OptionError
from frugal_bonsai.sizes import GIB, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GB", 24 * 10**9),
        ("24 gib", 24 * 2**30),
        ("1.5GiB", 3 * 2**29),
        ("800 MiB", 800 * 2**20),
        (" .5k ", 500),
        ("2TiB", 2 * 2**40),
        ("2TB", 2 * 10**12),
        ("4096000", 4_096_000),
        (4096, 4096),
        ("1b", 1),
    ],
)
def test_parse(text: str | int, expected: int) -> None:
    found = parse_bytes(text)
    assert found == expected and isinstance(found, int)


@pytest.mark.parametrize("text", ["", "GB", "24 XB", "-3GB", "1e3", "24GB extra", "1,5GB"])
def test_no_size_names_option_and_example(text: str) -> None:
    with pytest.raises(OptionError, match="is not a size; write for example 24GB") as caught:
        parse_bytes(text, option="--max-gpu-mem")
    assert str(caught.value).startswith(f"--max-gpu-mem: {text!r}")


@pytest.mark.parametrize(
    ("text", "meant"), [("24", "24GB"), (" 7.5 ", "7.5GB"), ("16384", "16384MB")]
)
def test_a_forgotten_unit_is_named(text: str, meant: str) -> None:
    with pytest.raises(OptionError, match=f"has no unit; did you mean {meant}"):
        parse_bytes(text, option="--max-gpu-mem")


@pytest.mark.parametrize("text", ["0", "0GB", "0.4", 0, -5])
def test_size_below_one_byte(text: str | int) -> None:
    with pytest.raises(OptionError, match="not a positive size"):
        parse_bytes(text, option="--max-cpu-mem")


@pytest.mark.parametrize(
    ("size_bytes", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (8 * GIB - GIB // 2, "7.50 GiB"),
        (3 * 2**40, "3.00 TiB"),
        (-2 * 2**20, "-2.00 MiB"),
    ],
)
def test_format(size_bytes: int, expected: str) -> None:
    assert format_bytes(size_bytes) == expected


@given(st.integers(min_value=1, max_value=2**50))
def test_what_is_printed_can_be_read_back(size_bytes: int) -> None:
    assert parse_bytes(format_bytes(size_bytes)) == pytest.approx(size_bytes, rel=0.006)


def test_dtype_bytes_are_those_of_torch() -> None:
    assert set(DTYPE_BYTES) == set(TORCH_NAMES)
    for name, size in DTYPE_BYTES.items():
        assert torch_dtype(name).itemsize == size
