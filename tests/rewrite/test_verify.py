"""Verification: differences that pass and differences that do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import open_tiny, tiny_llama

from frugal_bonsai.errors import VerifyError
from frugal_bonsai.rewrite.verify import compare_logits

WINDOWS_NS = torch.arange(2 * 16).view(2, 16) % 53


def compare_with_changed(tmp_path: Path, value: float) -> float:
    """Compare a model with a copy in which one weight is set to ``value``."""
    dense = tiny_llama(tmp_path / "dense")
    folder = tmp_path / "copy"
    tiny_llama(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][2, 3] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    changed = open_tiny(folder)
    return compare_logits(dense.engine(), dense.source(), changed.engine(), WINDOWS_NS)


def test_equal_models_pass(tmp_path: Path) -> None:
    dense = tiny_llama(tmp_path / "dense")
    assert compare_logits(dense.engine(), dense.source(), dense.engine(), WINDOWS_NS) == 0


@pytest.mark.parametrize("value", [3.0, float("inf"), float("nan")])
def test_one_wrong_weight_is_an_error(tmp_path: Path, value: float) -> None:
    with pytest.raises(VerifyError, match="differ from the masked parent"):
        compare_with_changed(tmp_path, value)


def test_logits_that_overflow_in_both_models_are_equal(tmp_path: Path) -> None:
    """A pruned model that overflows is not lost: it computes what the masked parent computes."""
    weights = {}
    for name in ("dense", "copy"):
        tiny_llama(tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        weights["lm_head.weight"][5] = 3e38
        save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    dense, copy = (open_tiny(tmp_path / name) for name in ("dense", "copy"))
    assert not dense.hugging_face()(WINDOWS_NS).logits.isfinite().all()
    assert compare_logits(dense.engine(), dense.source(), copy.engine(), WINDOWS_NS) == 0
    plain = tiny_llama(tmp_path / "plain")
    with pytest.raises(VerifyError, match="differ from the masked parent"):
        compare_logits(plain.engine(), plain.source(), copy.engine(), WINDOWS_NS)
