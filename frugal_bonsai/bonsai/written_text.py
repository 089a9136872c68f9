"""Text that the model writes: calibration windows, and windows for the last reconstruction.

In: a model, streamed, and windows for prompts. Out: windows of tokens. A text is drawn with numbers
of its own, so that it does not depend on those that are written beside it. A KV cache serves all
texts of a batch, and each token takes one sweep over all layers; that is slow from disk, and the
plan says so before. On a CPU, texts are computed in groups of a fixed size, so that ranks may share
a batch and write the same bits. Holds the KV cache of a batch.

Shape suffixes: N calibration windows, n sampled windows, t texts, P prompt tokens, S tokens, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from frugal_bonsai.memory.work import text_tokens, texts_at_once
from frugal_bonsai.stream.call import call_layer
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.layers import LayerStream

# Tokens of the prompt of a text that the model writes; distance of two prompts of one window.
PROMPT_TOKENS, _PROMPT_STEP = 16, 64


class ShareTexts(Protocol):
    """Shares texts to write among ranks."""

    def __call__(
        self, texts: Texts, work: Callable[[slice], list[list[int]]]
    ) -> Iterator[list[list[int]]]:
        """Yield the tokens of all texts in order; ``work`` writes some of them on this rank."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts that the model writes from prompts.

    Attributes:
        prompts_tP: Beginning of each text, int64.
        draws_tS: A number in [0, 1) for each token.
        together: Number of texts in a batch (from the plan).
        window: Tokens of a window, which may hold several texts.
    """

    prompts_tP: torch.Tensor
    draws_tS: torch.Tensor
    together: int
    window: int

    @classmethod
    def of(cls, windows_NS: torch.Tensor, count: int, *, together: int, seed: int) -> Texts:
        """Let texts continue pieces of the calibration text.

        Each begins with a prompt of :data:`PROMPT_TOKENS` tokens. A window that is longer than
        :func:`~frugal_bonsai.memory.work.text_tokens` holds several texts.

        Args:
            windows_NS: Calibration windows, which prompts are taken from.
            count: Number of windows to write.
            together: Number of texts in a batch.
            seed: Seed of the draws.
        """
        window = windows_NS.shape[1]
        tokens = text_tokens(window)
        texts = count * -(-window // tokens)
        return cls(
            prompts_tP=_prompts(windows_NS, texts, min(PROMPT_TOKENS, tokens // 2)),
            draws_tS=torch.rand(texts, tokens, generator=torch.Generator().manual_seed(seed)),
            together=together,
            window=window,
        )

    @property
    def batches(self) -> list[slice]:
        """Texts that are written together."""
        count, step = len(self.draws_tS), self.together
        return [slice(start, min(start + step, count)) for start in range(0, count, step)]

    def write(self, engine: Engine, stream: LayerStream, items: slice) -> list[list[int]]:
        """Write some texts at temperature 1 and return their tokens.

        Args:
            engine: The model.
            stream: Brings its layers, once for each token of a text.
            items: The texts, of one batch, from the beginning of a group on.
        """
        prompts_tP, draws_tS = self.prompts_tP[items], self.draws_tS[items]
        steps = draws_tS.shape[1] - 1
        engine.progress.sweep("writing text", steps, len(draws_tS))
        written: list[list[int]] = _continue(engine, stream, prompts_tP, draws_tS).tolist()
        return written

    def windows(self, tokens: list[list[int]]) -> torch.Tensor:
        """Return the windows of all texts' tokens, int64 ``[n, S]``."""
        texts = -(-self.window // self.draws_tS.shape[1])
        return torch.tensor(tokens).view(len(tokens) // texts, -1)[:, : self.window]


def _prompts(windows_NS: torch.Tensor, count: int, tokens: int) -> torch.Tensor:
    """Return the beginnings of all windows, then pieces from further inside, ``[count, P]``."""
    windows, window = windows_NS.shape
    places = torch.arange(count)
    starts = (places // windows * _PROMPT_STEP) % max(1, window - tokens)
    columns = starts[:, None] + torch.arange(tokens)
    return windows_NS[(places % windows)[:, None], columns]


def sample_windows(engine: Engine, count: int, window: int, *, seed: int) -> torch.Tensor:
    """Sample windows from the model at temperature 1, int64 ``[n, S]``.

    Every window begins with the BOS token of the model's config. Without one, or if it has no
    embedding row, the first token is drawn at random.

    Args:
        engine: The model; its checkpoint is streamed in its own precision.
        count: Number of windows.
        window: Tokens of a window.
        seed: Seed of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary, first_token = engine.spec.vocabulary, engine.spec.config.get("bos_token_id")
    if not isinstance(first_token, int) or first_token >= vocabulary:
        first_n = torch.randint(vocabulary, (count,), generator=generator)
    else:
        first_n = torch.full((count,), first_token)
    draws_nS = torch.rand(count, window, generator=generator)
    engine.progress.sweep("sampling calibration text", window - 1, count * (window - 1))
    with engine.native() as stream:
        return _continue(engine, stream, first_n[:, None], draws_nS)


def _continue(
    engine: Engine, stream: LayerStream, prompts_nP: torch.Tensor, draws_nS: torch.Tensor
) -> torch.Tensor:
    """Continue prompts to the length of the draws, int64 ``[n, S]``."""
    count, window = draws_nS.shape
    given = prompts_nP.shape[1]
    tokens_nS = torch.zeros(count, window, dtype=torch.int64)
    tokens_nS[:, :given] = prompts_nP
    step = texts_at_once(engine.device.type, count)
    groups = [slice(start, min(start + step, count)) for start in range(0, count, step)]
    caches = [engine.skeleton.new_cache() for _ in groups]
    with torch.inference_mode():
        for position in range(window - 1):
            states = [
                engine.skeleton.step(tokens_nS[group, position : position + 1], position, cache)
                for group, cache in zip(groups, caches, strict=True)
            ]
            for layer, parameters in stream.visit():
                module = engine.skeleton.layers[layer]
                states = [
                    (call_layer(module, parameters, hidden_tSH, kwargs[layer]), kwargs)
                    for hidden_tSH, kwargs in states
                ]
            if position + 1 >= given:
                for group, (hidden_tSH, _) in zip(groups, states, strict=True):
                    draws_t = draws_nS[group, position + 1]
                    tokens_nS[group, position + 1] = _draw(engine, hidden_tSH, draws_t)
            engine.progress.step(f"token {position + 1}")
    return tokens_nS


def _draw(engine: Engine, hidden_tSH: torch.Tensor, draws_t: torch.Tensor) -> torch.Tensor:
    """Draw a token for each text by inverting the cumulative distribution, int64 ``[t]``."""
    share_tV = engine.head.logits(hidden_tSH)[:, -1].cpu().softmax(-1).cumsum_(-1)
    found_t1 = torch.searchsorted(share_tV, draws_t[:, None] * share_tV[:, -1:], right=True)
    return found_t1[:, 0].clamp_max(share_tV.shape[1] - 1)
