"""Calibration windows: from text or sampled from the model, and the part that each round uses.

In: token windows or a model. Out: calibration windows, held-out windows, and the windows of a
round. Sampling uses a KV cache, batched over windows, and sweeps over all layers once per token;
that is slow from disk, and the plan says so before. Holds the KV cache of all windows while it
samples.

Shape suffixes: N calibration windows, n sampled windows, S tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from frugal_bonsai.bonsai.selection.schedule import round_windows, trial_windows
from frugal_bonsai.bonsai.settings import PruneSettings
from frugal_bonsai.errors import CalibrationError
from frugal_bonsai.memory.work import text_tokens
from frugal_bonsai.stream.call import call_layer
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.layers import LayerStream

# Calibration tokens when the user names no number of windows: 32 windows of 2,048.
DEFAULT_TOKENS = 65_536
MOST_HELD_OUT = 16
# Tokens of the prompt of a text that the model writes; distance of two prompts of one window.
PROMPT_TOKENS, _PROMPT_STEP = 16, 64


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Windows to search on and windows to report on.

    Attributes:
        windows_NS: Windows of the search, int64 ``[N, S]``.
        held_out_NS: Windows that the search never sees, int64 ``[K, S]``.
    """

    windows_NS: torch.Tensor
    held_out_NS: torch.Tensor


def window_count(window: int, windows: int | None) -> int:
    """Return the user's number of windows, else enough for :data:`DEFAULT_TOKENS`."""
    return windows if windows is not None else max(32, DEFAULT_TOKENS // window)


def held_out_count(windows: int) -> int:
    """Return the number of held-out windows beside this many calibration windows."""
    return max(1, min(MOST_HELD_OUT, windows // 8))


def split_windows(windows_nS: torch.Tensor, windows: int, what: str) -> Calibration:
    """Take calibration windows from the start and held-out windows from the end.

    Args:
        windows_nS: All windows of the text.
        windows: Calibration windows at most.
        what: Name of the text, for the error.

    Raises:
        CalibrationError: The text gives fewer than two windows.
    """
    if len(windows_nS) < 2:
        raise CalibrationError(
            f"{what}: gives {len(windows_nS)} window of {windows_nS.shape[1]} tokens, expected at "
            f"least two (one to search on, one held out); use a longer text or a shorter --window"
        )
    held_out = held_out_count(min(windows, len(windows_nS) - 1))
    most = min(windows, len(windows_nS) - held_out)
    return Calibration(windows_NS=windows_nS[:most], held_out_NS=windows_nS[-held_out:])


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


def write_windows(
    engine: Engine,
    stream: LayerStream,
    windows_NS: torch.Tensor,
    count: int,
    *,
    together: int,
    seed: int,
) -> torch.Tensor:
    """Let the model continue pieces of the calibration text at temperature 1, int64 ``[n, S]``.

    Each text begins with a prompt of :data:`PROMPT_TOKENS` tokens. A window that is longer than
    :func:`~frugal_bonsai.memory.work.text_tokens` holds several texts.

    Args:
        engine: The model.
        stream: Brings its layers, once for each token of a text.
        windows_NS: Calibration windows, which prompts are taken from.
        count: Number of windows to write.
        together: Number of texts that are written at a time, which does not change them.
        seed: Seed of the draws.
    """
    window = windows_NS.shape[1]
    tokens = text_tokens(window)
    texts = count * -(-window // tokens)
    prompts_tP = _prompts(windows_NS, texts, min(PROMPT_TOKENS, tokens // 2))
    draws_tS = torch.rand(texts, tokens, generator=torch.Generator().manual_seed(seed))
    batches = [(start, start + together) for start in range(0, texts, together)]
    engine.progress.sweep("writing text", (tokens - 1) * len(batches), texts * (tokens - 1))
    written = [
        _continue(engine, stream, prompts_tP[start:stop], draws_tS[start:stop])
        for start, stop in batches
    ]
    return torch.cat(written).view(count, -1)[:, :window]


def _prompts(windows_NS: torch.Tensor, count: int, tokens: int) -> torch.Tensor:
    """Return the beginnings of all windows, then pieces from further inside, ``[count, P]``."""
    windows, window = windows_NS.shape
    places = torch.arange(count)
    starts = (places // windows * _PROMPT_STEP) % max(1, window - tokens)
    columns = starts[:, None] + torch.arange(tokens)
    return windows_NS[(places % windows)[:, None], columns]


def _continue(
    engine: Engine, stream: LayerStream, prompts_nP: torch.Tensor, draws_nS: torch.Tensor
) -> torch.Tensor:
    """Continue prompts to the length of the draws, int64 ``[n, S]``.

    A token is drawn by inverting the cumulative distribution at a number of its own in [0, 1). So
    a text does not depend on those that are written beside it.
    """
    count, window = draws_nS.shape
    given = prompts_nP.shape[1]
    tokens_nS = torch.zeros(count, window, dtype=torch.int64)
    tokens_nS[:, :given] = prompts_nP
    cache = engine.skeleton.new_cache()
    with torch.inference_mode():
        for position in range(window - 1):
            hidden_nSH, kwargs = engine.skeleton.step(
                tokens_nS[:, position : position + 1], position, cache
            )
            for layer, parameters in stream.visit():
                module = engine.skeleton.layers[layer]
                hidden_nSH = call_layer(module, parameters, hidden_nSH, kwargs[layer])
            if position + 1 >= given:
                share_nV = engine.head.logits(hidden_nSH)[:, -1].cpu().softmax(-1).cumsum_(-1)
                drawn_n1 = draws_nS[:, position + 1, None] * share_nV[:, -1:]
                found_n1 = torch.searchsorted(share_nV, drawn_n1, right=True)
                tokens_nS[:, position + 1] = found_n1[:, 0].clamp_max(share_nV.shape[1] - 1)
            engine.progress.step(f"token {position + 1}")
    return tokens_nS


def round_generator(seed: int, number: int) -> torch.Generator:
    """Return a generator that depends on seed and number alone, so that a resume repeats it."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


class RoundWindows:
    """The calibration windows that each round uses, drawn by seed and round.

    Args:
        windows_NS: All calibration windows.
        settings: Settings of the prune.
        columns: Columns of the widest output projection.
    """

    def __init__(self, windows_NS: torch.Tensor, settings: PruneSettings, columns: int) -> None:
        self.all_NS, self._settings, self._columns = windows_NS, settings, columns

    def of_last(self, written_nS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the windows of the last round, and the places of the calibration windows.

        They are mixed, because channel updates take the windows in parts.

        Args:
            written_nS: Windows that the dense model wrote, int64; none are allowed.
        """
        windows_NS = torch.cat([self.all_NS, written_nS])
        if not len(written_nS):
            return windows_NS, torch.arange(len(windows_NS))
        order = torch.randperm(len(windows_NS), generator=self._generator(40_000))
        return windows_NS[order], (order < len(self.all_NS)).nonzero().flatten()

    def of_round(self, number: int) -> torch.Tensor:
        """Return the windows of a round before the last, in the order of the text."""
        windows, window = self.all_NS.shape
        count = round_windows(self._settings, self._columns, window, windows)
        drawn = torch.randperm(windows, generator=self._generator(20_000 + number))[:count]
        return self.all_NS[drawn.sort().values]

    def of_trial(self, number: int) -> tuple[torch.Tensor, int]:
        """Return the windows of a round's candidates, and how many at the end judge them."""
        windows, window = self.all_NS.shape
        fitted, held_out = trial_windows(self._columns, window, windows)
        # Both come from all over the text, because neighbouring windows are alike.
        order = torch.randperm(windows, generator=self._generator(30_000 + number))
        return self.all_NS[order[: fitted + held_out]], held_out

    def _generator(self, number: int) -> torch.Generator:
        return round_generator(self._settings.seed, number)
