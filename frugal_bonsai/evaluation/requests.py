"""Log-likelihoods of requests: token sequences whose last tokens are scored.

In: requests of different lengths. Out: batches of padded windows, and for each request the
log-likelihood of its scored tokens and whether greedy decoding would produce them. Requests are
sorted by length, and a batch ends where padding would cost more than another sweep over the layers.
Requests with equal inputs share a window. Holds the windows of one batch, and what its sweep holds.

Shape suffixes: N windows, S tokens, T scored tokens of all windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from frugal_bonsai.stream.forward import Sweep
from frugal_bonsai.stream.head import Head
from frugal_bonsai.stream.layers import LayerStream

# A batch with fewer tokens is not ended: reading the layers again would take longer than to compute
# the padding. On a GPU, computing is faster against reading.
ENOUGH_TOKENS, ENOUGH_GPU_TOKENS = 4096, 2**17
# The shortest window of a batch with enough tokens, as a share of the longest.
_LEAST_SHARE = 0.875


@dataclass(frozen=True, kw_only=True)
class Request:
    """A sequence whose last tokens are scored, given those before them.

    Attributes:
        tokens: Token ids, at least one more than ``scored``.
        scored: Number of tokens at the end that are scored, at least 1.
    """

    tokens: tuple[int, ...]
    scored: int

    @property
    def inputs(self) -> tuple[int, ...]:
        """Tokens that the model reads: all but the last."""
        return self.tokens[:-1]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Windows of similar lengths, and the requests of each.

    Attributes:
        inputs: Tokens of each window, the longest first.
        requests: Numbers of the requests that each window answers.
    """

    inputs: list[tuple[int, ...]]
    requests: list[list[int]]

    @property
    def window(self) -> int:
        """Tokens of the longest window (S)."""
        return len(self.inputs[0])

    def windows_NS(self) -> torch.Tensor:
        """Return the windows, padded on the right, int64 ``[N, S]``.

        Attention is causal, so padding on the right changes no token before it.
        """
        windows_NS = torch.zeros(len(self.inputs), self.window, dtype=torch.int64)
        for window, tokens in enumerate(self.inputs):
            windows_NS[window, : len(tokens)] = torch.tensor(tokens)
        return windows_NS


def make_batches(requests: Sequence[Request], enough_tokens: int) -> Iterator[Batch]:
    """Sort requests by length and yield batches of them, the longest first.

    Args:
        requests: The requests.
        enough_tokens: Number of padded tokens from which on a batch may end.
    """
    sharing: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(requests):
        sharing.setdefault(request.inputs, []).append(number)
    inputs = sorted(sharing, key=len, reverse=True)
    first = 0
    for place, tokens in enumerate(inputs):
        longest = len(inputs[first])
        enough = (place - first) * longest >= enough_tokens
        if enough and len(tokens) < _LEAST_SHARE * longest:
            yield _batch(inputs[first:place], sharing)
            first = place
    if inputs:
        yield _batch(inputs[first:], sharing)


def _batch(inputs: list[tuple[int, ...]], sharing: dict[tuple[int, ...], list[int]]) -> Batch:
    return Batch(inputs=inputs, requests=[sharing[tokens] for tokens in inputs])


def score_batch(
    sweep: Sweep,
    stream: LayerStream,
    head: Head,
    batch: Batch,
    requests: Sequence[Request],
    *,
    name: str,
) -> Iterator[tuple[int, tuple[float, bool]]]:
    """Run a batch through a streamed model; yield the score of each request.

    A score is the log-likelihood in nats, and whether greedy decoding produces the scored tokens.

    Args:
        sweep: Sweep within the limits of the memory plan.
        stream: Stream of the model's layers.
        head: Head of the model.
        batch: Windows.
        requests: All requests; the batch has their numbers.
        name: Name of the sweep for the progress.
    """
    windows_NS = batch.windows_NS()
    waves = sweep.hidden_waves(stream, windows_NS, masker=None, name=name, then=head.to_read)
    for wave, hidden in waves:
        numbers, counts = [], []
        windows: list[int] = []
        positions: list[int] = []
        following: list[int] = []
        for window, sharing in enumerate(batch.requests[wave]):
            for number in sharing:
                request = requests[number]
                numbers.append(number)
                counts.append(request.scored)
                windows += [window] * request.scored
                last = len(request.tokens) - 1
                positions += range(last - request.scored, last)
                following += request.tokens[-request.scored :]
        places = (torch.tensor(windows), torch.tensor(positions))
        with torch.inference_mode():
            likelihood_T, greedy_T = head.score(hidden, places, torch.tensor(following))
        del hidden  # not held while the next wave runs
        parts = zip(likelihood_T.double().split(counts), greedy_T.split(counts), strict=True)
        for number, (likelihood_t, greedy_t) in zip(numbers, parts, strict=True):
            yield number, (float(likelihood_t.sum()), bool(greedy_t.all()))
