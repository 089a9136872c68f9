"""Row-wise int8: bitsandbytes is the oracle, there and back."""

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
def test_codes_and_scales_equal_bitsandbytes_bit_for_bit(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    from bitsandbytes.functional import int8_vectorwise_quant

    weight_OI = _weight(*shape, dtype)
    codes_OI, scales_O = quantise_rows(weight_OI)
    theirs_OI, their_scales_O, _ = int8_vectorwise_quant(weight_OI.half(), threshold=0.0)
    assert torch.equal(theirs_OI, codes_OI)
    assert torch.equal(their_scales_O, scales_O)
    assert codes_OI.dtype == torch.int8 and scales_O.dtype == torch.float32


def test_rows_of_zeros_come_out_as_zeros() -> None:
    """bitsandbytes divides by their scale."""
    weight_OI = _weight(6, 16)
    weight_OI[[0, 3]] = 0.0
    before = weight_OI.clone()
    codes_OI, scales_O = quantise_rows(weight_OI)
    assert scales_O[[0, 3]].tolist() == [0.0, 0.0]
    assert not codes_OI[[0, 3]].any() and codes_OI[[1, 2, 4, 5]].any(dim=1).all()
    assert torch.equal(weight_OI, before), "the caller's weight was changed"


def test_row_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI = _weight(29, 40)
    whole = quantise_rows(weight_OI)
    monkeypatch.setattr(
        int8, "QUANTISED_BLOCK_BYTES", 4 * 40 * 3
    )  # three rows a block, the last has two
    blocks = quantise_rows(weight_OI)
    assert torch.equal(whole[0], blocks[0]) and torch.equal(whole[1], blocks[1])


def test_codes_use_the_whole_range_and_the_error_is_half_a_step() -> None:
    weight_OI = _weight(32, 100).half().float()
    codes_OI, scales_O = quantise_rows(weight_OI)
    assert torch.equal(scales_O, weight_OI.abs().amax(1))
    assert codes_OI.abs().amax(1).eq(127).all()
    back_OI = dequantise_into(torch.empty(32, 100), codes_OI, scales_O)
    step_O = scales_O / 127
    # fp16 products of the quantiser may sit a hair beyond the half.
    assert ((back_OI - weight_OI).abs() <= 0.501 * step_O[:, None]).all()


@needs_bitsandbytes
def test_dequantise_equals_bitsandbytes_in_fp32() -> None:
    from bitsandbytes.functional import int8_vectorwise_dequant

    codes_OI, scales_O = quantise_rows(_weight(20, 30))
    expected_OI = int8_vectorwise_dequant(codes_OI, scales_O)
    out_OI = torch.full((20, 30), float("nan"))
    result_OI = dequantise_into(out_OI, codes_OI, scales_O)
    assert result_OI.data_ptr() == out_OI.data_ptr()
    # Theirs multiplies by a rounded 1/127: one unit in the last place apart.
    torch.testing.assert_close(out_OI, expected_OI, rtol=3e-7, atol=0)


@needs_bitsandbytes
def test_dequantise_into_bf16_rounds_like_bf16() -> None:
    from bitsandbytes.functional import int8_vectorwise_dequant

    codes_OI, scales_O = quantise_rows(_weight(20, 30))
    expected_OI = int8_vectorwise_dequant(codes_OI, scales_O)
    out_OI = torch.empty(20, 30, dtype=torch.bfloat16)
    dequantise_into(out_OI, codes_OI, scales_O)
    assert out_OI.dtype == torch.bfloat16
    torch.testing.assert_close(out_OI.float(), expected_OI, rtol=2**-8, atol=0)
    assert not torch.equal(out_OI.float(), expected_OI)


def test_a_missing_package_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # makes the import fail
    assert not has_bitsandbytes()


def test_bitsandbytes_is_not_imported() -> None:
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
