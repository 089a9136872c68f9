"""The head in chunks of tokens and of vocabulary."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CPU, TIED, Tiny, random_windows, relative, tiny_llama

from frugal_bonsai.stream.head import Head
from frugal_bonsai.stream.hidden import HiddenStates
from frugal_bonsai.stream.layers import LayerStream
from frugal_bonsai.stream.skeleton import Skeleton
from frugal_bonsai.stream.source import HeadSource

CHUNKS = [(1000, 1000), (53, 10), (52, 1), (7, 1000), (1, 20), (27, 9)]


def _hidden(windows: int, window: int, *, scale: float = 1.0) -> HiddenStates:
    states = HiddenStates(windows, window, 24, device=CPU, dtype=torch.float32, resident=0)
    generator = torch.Generator().manual_seed(0)
    values = scale * torch.randn(windows, window, 24, generator=generator)
    states.write(slice(0, windows), values)
    return states


def _head(tiny: Tiny, rows: int, tokens: int) -> Head:
    skeleton = Skeleton(tiny.checkpoint, tiny.spec, device=CPU, dtype=torch.float32)
    source = HeadSource(tiny.checkpoint, tiny.spec, rows)
    return Head(
        skeleton, source, partial(LayerStream, device=CPU, dtype=torch.float32), tokens=tokens
    )


@pytest.mark.parametrize("changes", [{}, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize(("rows", "tokens"), CHUNKS)
@torch.no_grad()
def test_losses_and_logits_do_not_depend_on_chunks(
    changes: dict[str, Any], rows: int, tokens: int, tmp_path: Path
) -> None:
    tiny = tiny_llama(tmp_path / "m", **changes)
    model, hidden, windows = tiny.hugging_face(), _hidden(5, 9), random_windows(5, 9)
    windows[0, 1], windows[1, 2] = 0, 52  # first and last row of the vocabulary
    logits = model.lm_head(model.model.norm(hidden.read(slice(0, 5))))
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten(), reduction="none"
    ).view(5, 8)
    head = _head(tiny, rows, tokens)
    assert relative(head.logits(hidden.read(slice(0, 5))), logits) < 1e-5
    found = head.nll(hidden, windows)
    assert found.shape == (5, 8) and found.dtype == torch.float32
    assert relative(found, expected) < 1e-5


@torch.no_grad()
def test_large_logits_do_not_overflow(tmp_path: Path) -> None:
    tiny = tiny_llama(tmp_path / "m", std=40.0)
    model, hidden, windows = tiny.hugging_face(), _hidden(2, 6), random_windows(2, 6)
    logits = model.lm_head(model.model.norm(hidden.read(slice(0, 2)))).double()
    assert logits.abs().max() > 1000, "exp() of these overflows"
    chances = logits.log_softmax(-1)[:, :-1]
    expected = -chances.gather(-1, windows[:, 1:, None])[..., 0]
    found = _head(tiny, 11, 6).nll(hidden, windows)
    assert found.isfinite().all()
    assert relative(found.double(), expected) < 1e-5


@torch.no_grad()
def test_head_in_one_chunk_is_read_once_and_else_once_a_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tiny_llama(tmp_path / "m")
    reads: list[tuple[int, int]] = []
    read_rows_into = tiny.checkpoint.read_rows_into

    def counted(name: str, start: int, stop: int, buffer: torch.Tensor) -> None:
        assert name == "lm_head.weight"
        reads.append((start, stop))
        read_rows_into(name, start, stop, buffer)

    monkeypatch.setattr(tiny.checkpoint, "read_rows_into", counted)
    whole, chunked = _head(tiny, 53, 10), _head(tiny, 20, 10)
    for _ in range(2):
        whole.nll(_hidden(6, 5), random_windows(6, 5))
    assert reads == [(0, 53)]
    reads.clear()
    for _ in range(2):
        chunked.nll(_hidden(6, 5), random_windows(6, 5))
    assert reads == 2 * [(0, 20), (20, 40), (40, 53)]


@pytest.mark.parametrize(("rows", "tokens"), CHUNKS)
@torch.no_grad()
def test_scores_of_chosen_tokens(rows: int, tokens: int, tmp_path: Path) -> None:
    tiny = tiny_llama(tmp_path / "m")
    model, hidden = tiny.hugging_face(), _hidden(5, 9)
    logits = model.lm_head(model.model.norm(hidden.read(slice(0, 5))))
    # The last position counts too, a place may occur twice, and windows 0 and 3 have none.
    places = torch.tensor([1, 1, 2, 2, 4]), torch.tensor([8, 8, 0, 5, 3])
    best = logits[places].argmax(-1)
    following = torch.where(torch.tensor([True, False, True, False, True]), best, best - 1) % 53
    expected = logits.log_softmax(-1)[(*places, following)]
    found, greedy = _head(tiny, rows, tokens).score(hidden, places, following)
    assert relative(found, expected) < 1e-5
    assert greedy.tolist() == [True, False, True, False, True]
