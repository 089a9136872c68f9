"""Calibration windows: from text, or sampled from the model itself.

In: token windows or a model. Out: calibration windows and held-out windows. ``self`` samples with a
KV cache, batched over windows, one sweep over the layers a token: slow from disk, and the plan says
so first. Holds the KV cache of all windows while it samples.

Shape suffixes: n windows, S tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from frugal_bonsai.errors import CalibrationError
from frugal_bonsai.stream.call import call_layer
from frugal_bonsai.stream.engine import Engine

# Calibration tokens when the user names no number of windows: 32 windows of 2,048.
DEFAULT_TOKENS = 65_536
MOST_HELD_OUT = 16


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Windows to search on and windows to report on.

    Attributes:
        windows_NS: int64 ``[N, S]``.
        held_out_NS: int64 ``[K, S]``, never searched on.
    """

    windows_NS: torch.Tensor
    held_out_NS: torch.Tensor


def window_count(window: int, windows: int | None) -> int:
    """Calibration windows to use: the user's number, else enough for :data:`DEFAULT_TOKENS`."""
    return windows if windows is not None else max(32, DEFAULT_TOKENS // window)


def held_out_count(windows: int) -> int:
    """Held-out windows beside this many calibration windows."""
    return max(1, min(MOST_HELD_OUT, windows // 8))


def split_windows(windows_nS: torch.Tensor, windows: int, what: str) -> Calibration:
    """Calibration windows from the start, held-out windows from the end.

    Raises:
        CalibrationError: fewer than two windows.
    """
    if len(windows_nS) < 2:
        raise CalibrationError(
            f"{what}: gives {len(windows_nS)} window of {windows_nS.shape[1]} tokens, at least two "
            f"are needed (one to search on, one held out); use a longer text or a shorter --window"
        )
    held_out = held_out_count(min(windows, len(windows_nS) - 1))
    most = min(windows, len(windows_nS) - held_out)
    return Calibration(windows_NS=windows_nS[:most], held_out_NS=windows_nS[-held_out:])


def sample_windows(
    engine: Engine, count: int, window: int, *, first_token: int | None, seed: int
) -> torch.Tensor:
    """Sample windows from the model at temperature 1, int64 ``[n, S]``.

    Args:
        engine: the model; its checkpoint is streamed in its own precision.
        count: n.
        window: S.
        first_token: the token that every window begins with (BOS); None draws one at random.
        seed: of the draws.
    """
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(seed)
    vocabulary = engine.spec.vocabulary
    tokens_nS = torch.zeros(count, window, dtype=torch.int64)
    tokens_nS[:, 0] = (
        torch.randint(vocabulary, (count,), generator=generator)
        if first_token is None
        else first_token
    )
    cache = DynamicCache()
    engine.progress.sweep("sampling calibration text", window - 1, count * (window - 1))
    with torch.inference_mode(), engine.native() as stream:
        for position in range(window - 1):
            hidden_nSH, kwargs = engine.skeleton.step(
                tokens_nS[:, position : position + 1], position, cache
            )
            for layer, parameters in stream.visit():
                module = engine.skeleton.layers[layer]
                hidden_nSH = call_layer(module, parameters, hidden_nSH, kwargs[layer])
            logits_nV = engine.head.logits(hidden_nSH)[:, -1].cpu()
            drawn_n = torch.multinomial(logits_nV.softmax(-1), 1, generator=generator)
            tokens_nS[:, position + 1] = drawn_n[:, 0]
            engine.progress.step(f"token {position + 1}")
    return tokens_nS
