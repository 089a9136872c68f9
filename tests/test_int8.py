"""Row-wise int8: both paths give the same bits, and bitsandbytes is the oracle of the way back."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from frugal_bonsai import int8
from frugal_bonsai.int8 import dequantise_into, has_bitsandbytes, quantise_rows

needs_bitsandbytes = pytest.mark.skipif(not has_bitsandbytes(), reason="needs bitsandbytes")


def _weight(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    scales = torch.logspace(-3, 1, rows)[:, None]
    return (torch.randn(rows, columns, generator=generator) * scales).to(dtype)


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (64, 192), (33, 512)])
def test_torch_path_equals_bitsandbytes_bit_for_bit(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight_OI = _weight(*shape, dtype)
    theirs, ours = (quantise_rows(weight_OI, use_bitsandbytes=b) for b in (True, False))
    assert torch.equal(theirs[0], ours[0])
    assert torch.equal(theirs[1], ours[1])
    assert ours[0].dtype == torch.int8 and ours[1].dtype == torch.float32


@needs_bitsandbytes
def test_rows_of_zeros_are_the_same_on_both_paths() -> None:
    weight_OI = _weight(6, 16)
    weight_OI[[0, 3]] = 0.0
    before = weight_OI.clone()
    theirs, ours = (quantise_rows(weight_OI, use_bitsandbytes=b) for b in (True, False))
    assert torch.equal(theirs[0], ours[0]) and torch.equal(theirs[1], ours[1])
    assert ours[1][[0, 3]].tolist() == [0.0, 0.0]
    assert not ours[0][[0, 3]].any() and ours[0][[1, 2, 4, 5]].any(dim=1).all()
    assert torch.equal(weight_OI, before), "the caller's weight was changed"


@pytest.mark.parametrize("use_bitsandbytes", [False, pytest.param(True, marks=needs_bitsandbytes)])
def test_row_blocks_do_not_change_the_result(
    use_bitsandbytes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_OI = _weight(29, 40)
    whole = quantise_rows(weight_OI, use_bitsandbytes=use_bitsandbytes)
    monkeypatch.setattr(int8, "_BLOCK_BYTES", 4 * 40 * 3)  # three rows a block, the last has two
    blocks = quantise_rows(weight_OI, use_bitsandbytes=use_bitsandbytes)
    assert torch.equal(whole[0], blocks[0]) and torch.equal(whole[1], blocks[1])


def test_codes_use_the_whole_range_and_the_error_is_half_a_step() -> None:
    weight_OI = _weight(32, 100).half().float()
    codes_OI, scales_O = quantise_rows(weight_OI, use_bitsandbytes=False)
    assert torch.equal(scales_O, weight_OI.abs().amax(1))
    assert codes_OI.abs().amax(1).eq(127).all()
    back_OI = dequantise_into(torch.empty(32, 100), codes_OI, scales_O)
    step_O = scales_O / 127
    # fp16 products of the quantiser may sit a hair beyond the half.
    assert ((back_OI - weight_OI).abs() <= 0.501 * step_O[:, None]).all()


@needs_bitsandbytes
def test_dequantise_equals_bitsandbytes_in_fp32() -> None:
    from bitsandbytes.functional import int8_vectorwise_dequant

    codes_OI, scales_O = quantise_rows(_weight(20, 30), use_bitsandbytes=False)
    expected_OI = int8_vectorwise_dequant(codes_OI, scales_O)
    out_OI = torch.full((20, 30), float("nan"))
    result_OI = dequantise_into(out_OI, codes_OI, scales_O)
    assert result_OI.data_ptr() == out_OI.data_ptr()
    # Theirs multiplies by a rounded 1/127: one unit in the last place apart.
    torch.testing.assert_close(out_OI, expected_OI, rtol=3e-7, atol=0)


@needs_bitsandbytes
def test_dequantise_into_bf16_rounds_like_bf16() -> None:
    from bitsandbytes.functional import int8_vectorwise_dequant

    codes_OI, scales_O = quantise_rows(_weight(20, 30), use_bitsandbytes=False)
    expected_OI = int8_vectorwise_dequant(codes_OI, scales_O)
    out_OI = torch.empty(20, 30, dtype=torch.bfloat16)
    dequantise_into(out_OI, codes_OI, scales_O)
    assert out_OI.dtype == torch.bfloat16
    torch.testing.assert_close(out_OI.float(), expected_OI, rtol=2**-8, atol=0)
    assert not torch.equal(out_OI.float(), expected_OI)


def test_a_missing_package_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # makes the import fail
    assert not has_bitsandbytes()


def test_on_a_cpu_bitsandbytes_is_not_even_imported() -> None:
    code = (
        "import sys, torch; from frugal_bonsai.int8 import quantise_rows\n"
        "quantise_rows(torch.ones(5, 8)); assert 'bitsandbytes' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_asking_for_bitsandbytes_says_nothing() -> None:
    """It warns of missing 4-bit kernels on some processors, in the middle of our progress."""
    code = "from frugal_bonsai.int8 import has_bitsandbytes; has_bitsandbytes()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout + done.stderr == ""
