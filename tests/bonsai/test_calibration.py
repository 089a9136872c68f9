"""Calibration windows: split from a text, or sampled from the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama

from frugal_bonsai.bonsai.calibration import (
    held_out_count,
    sample_windows,
    split_windows,
    window_count,
)
from frugal_bonsai.errors import CalibrationError


def test_default_counts() -> None:
    assert window_count(2048, None) == 32
    assert window_count(256, None) == 256
    assert window_count(256, 7) == 7
    assert held_out_count(4) == 1 and held_out_count(1000) == 16


def test_held_out_windows_are_not_searched_on() -> None:
    windows_nS = torch.arange(40).view(20, 2)
    split = split_windows(windows_nS, 100, "text")
    assert len(split.windows_NS) + len(split.held_out_NS) == 20
    used = set(split.windows_NS.flatten().tolist())
    assert not used & set(split.held_out_NS.flatten().tolist())
    assert len(split_windows(windows_nS, 5, "text").windows_NS) == 5


def test_one_window_is_too_few() -> None:
    with pytest.raises(CalibrationError, match="at least two"):
        split_windows(torch.zeros(1, 8, dtype=torch.int64), 1, "text")


def test_sampling_follows_the_model(tmp_path: Path) -> None:
    """Sampled with the cache, windows are as likely as the model without a cache says."""
    tiny = tiny_llama(tmp_path / "model", std=0.6)
    engine = tiny.engine()
    tokens_nS = sample_windows(engine, 48, 12, first_token=1, seed=0)
    assert tokens_nS.shape == (48, 12) and (tokens_nS[:, 0] == 1).all()
    assert torch.equal(tokens_nS, sample_windows(engine, 48, 12, first_token=1, seed=0))
    assert not torch.equal(tokens_nS, sample_windows(engine, 48, 12, first_token=1, seed=1))
    model = tiny.hugging_face()
    with torch.inference_mode():
        chance_nSV = model(tokens_nS).logits[:, :-1].log_softmax(-1)
    entropy = -(chance_nSV.exp() * chance_nSV).sum(-1)
    seen = -chance_nSV.gather(-1, tokens_nS[:, 1:, None])[..., 0]
    spread = (chance_nSV.exp() * (chance_nSV + entropy[..., None]).square()).sum(-1)
    error = float(spread.sum().sqrt()) / seen.numel()
    assert abs(float(seen.mean() - entropy.mean())) < 4 * error
