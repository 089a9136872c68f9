"""Calibration windows: split from a text, or sampled from the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama

from frugal_bonsai.bonsai.calibration import (
    RoundWindows,
    held_out_count,
    split_windows,
    window_count,
)
from frugal_bonsai.bonsai.settings import PruneSettings
from frugal_bonsai.bonsai.written_text import PROMPT_TOKENS, Texts, sample_windows
from frugal_bonsai.errors import CalibrationError
from frugal_bonsai.stream.engine import Engine


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
    tokens_nS = sample_windows(engine, 48, 12, seed=0)
    assert tokens_nS.shape == (48, 12) and (tokens_nS[:, 0] == 1).all()
    assert torch.equal(tokens_nS, sample_windows(engine, 48, 12, seed=0))
    assert not torch.equal(tokens_nS, sample_windows(engine, 48, 12, seed=1))
    model = tiny.hugging_face()
    with torch.inference_mode():
        chance_nSV = model(tokens_nS).logits[:, :-1].log_softmax(-1)
    entropy = -(chance_nSV.exp() * chance_nSV).sum(-1)
    seen = -chance_nSV.gather(-1, tokens_nS[:, 1:, None])[..., 0]
    spread = (chance_nSV.exp() * (chance_nSV + entropy[..., None]).square()).sum(-1)
    error = float(spread.sum().sqrt()) / seen.numel()
    assert abs(float(seen.mean() - entropy.mean())) < 4 * error


def write(engine: Engine, windows_NS: torch.Tensor, count: int, **options: int) -> torch.Tensor:
    with engine.native() as stream:
        texts = Texts.of(windows_NS, count, **options)
        parts = [texts.write(engine, stream, batch) for batch in texts.batches]
        return texts.windows([text for part in parts for text in part])


def test_written_text_continues_pieces_of_the_calibration_text(tmp_path: Path) -> None:
    engine = tiny_llama(tmp_path / "model", std=0.6).engine()
    windows_NS = torch.randint(0, engine.spec.vocabulary, (3, 40))
    written_nS = write(engine, windows_NS, 5, together=5, seed=0)
    assert written_nS.shape == (5, 40)
    assert torch.equal(written_nS[:3, :PROMPT_TOKENS], windows_NS[:, :PROMPT_TOKENS])
    # The fourth and fifth text begin with other pieces of the first windows: 64 % (40 - 16).
    assert torch.equal(written_nS[3:, :PROMPT_TOKENS], windows_NS[:2, 16:32])
    assert not torch.equal(written_nS[:3, PROMPT_TOKENS:], windows_NS[:, PROMPT_TOKENS:])
    assert torch.equal(written_nS, write(engine, windows_NS, 5, together=2, seed=0))
    assert not torch.equal(written_nS, write(engine, windows_NS, 5, together=5, seed=1))


def test_a_long_window_holds_several_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frugal_bonsai.memory.work._WRITTEN_TOKENS", 20)
    engine = tiny_llama(tmp_path / "model", std=0.6).engine()
    windows_NS = torch.randint(0, engine.spec.vocabulary, (2, 50))
    written_nS = write(engine, windows_NS, 1, together=8, seed=0)
    assert written_nS.shape == (1, 50)
    # Texts of 20 tokens, each with a prompt of 10: from both windows, then from further inside.
    assert torch.equal(written_nS[0, :10], windows_NS[0, :10])
    assert torch.equal(written_nS[0, 20:30], windows_NS[1, :10])
    assert torch.equal(written_nS[0, 40:50], windows_NS[0, 64 % 40 : 64 % 40 + 10])


def test_written_windows_are_mixed_into_the_last_round() -> None:
    windows_NS, written_NS = torch.arange(8).view(4, 2), torch.arange(100, 112).view(6, 2)
    settings = PruneSettings()
    rounds = RoundWindows(windows_NS, settings, 4)
    last_NS, places = rounds.of_last(written_NS)
    assert torch.equal(last_NS[places].sort(0).values, windows_NS)
    assert sorted(last_NS.flatten().tolist()) == [*range(8), *range(100, 112)]
    assert not torch.equal(last_NS[:4], windows_NS)
    alone_NS, everywhere = rounds.of_last(written_NS[:0])
    assert torch.equal(alone_NS, windows_NS) and everywhere.tolist() == [0, 1, 2, 3]
