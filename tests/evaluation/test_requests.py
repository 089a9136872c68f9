"""Requests of different lengths become batches of windows of similar lengths."""

from __future__ import annotations

import torch

from frugal_bonsai.evaluation.requests import Request, make_batches


def _requests(*lengths: int) -> list[Request]:
    return [
        Request(tokens=tuple(range(number, number + length + 1)), scored=1)
        for number, length in enumerate(lengths)
    ]


def test_a_batch_ends_where_requests_are_shorter_and_it_has_enough_tokens() -> None:
    requests = _requests(4, 16, 15, 16, 8, 3)
    batches = list(make_batches(requests, enough_tokens=48))
    assert [batch.window for batch in batches] == [16, 8]
    assert [batch.requests for batch in batches] == [[[1], [3], [2]], [[4], [0], [5]]]
    assert [len(tokens) for tokens in batches[1].inputs] == [8, 4, 3]
    windows_NS = batches[1].windows_NS()
    assert windows_NS.shape == (3, 8) and windows_NS.dtype == torch.int64
    assert windows_NS[2].tolist() == [5, 6, 7, 0, 0, 0, 0, 0]
    assert len(list(make_batches(requests, enough_tokens=1000))) == 1
    assert list(make_batches([], enough_tokens=48)) == []


def test_requests_with_equal_inputs_share_a_window() -> None:
    endings = [Request(tokens=(5, 6, 7, ending), scored=1) for ending in (1, 2, 3)]
    longer = Request(tokens=(5, 6, 7, 1), scored=2)
    (batch,) = make_batches([*endings, longer], enough_tokens=1)
    assert batch.inputs == [(5, 6, 7)] and batch.requests == [[0, 1, 2, 3]]
