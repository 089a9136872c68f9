"""Perplexity over windows, without overlap or with a stride.

In: a stream of a model's layers, and token windows. Out: exp(mean NLL of tokens 2..S of each
window), without special tokens; of windows that overlap, each token counts in the first window that
predicts it. A perplexity can only be compared with others of the same window length and stride, so
reports name them. Holds what the sweep holds.

Shape suffixes: N windows, S tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from frugal_bonsai.checkpoint.finite import require_finite
from frugal_bonsai.errors import CheckpointError
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.layers import LayerStream

# Standard errors on both sides of a mean within which it lies with 95% of a normal distribution.
_INTERVAL_ERRORS = 1.96


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """A measured perplexity.

    Attributes:
        nll: mean negative log-likelihood of a token, in nats.
        tokens: number of predicted tokens.
        nll_error: standard error of ``nll``: of the sums of windows, or of the tokens of one.
    """

    nll: float
    tokens: int
    nll_error: float

    @classmethod
    def of(cls, losses_NS: torch.Tensor, stride: int | None = None) -> Perplexity:
        """Return the perplexity of tokens' losses in nats; a mean of NaN counts as infinite.

        Args:
            losses_NS: one row per window.
            stride: tokens between the starts of two windows; the first window counts whole, of the
                others the last ``stride`` tokens. None counts all.
        """
        samples = losses_NS.to(torch.float64, copy=True)
        counts = torch.full((len(samples),), samples.shape[1])
        if stride is not None:
            samples[1:, :-stride], counts[1:] = 0.0, stride
        tokens = int(counts.sum())
        nll = float(samples.sum() / tokens)
        nll = math.inf if math.isnan(nll) else nll
        sums, size = (samples.sum(1), counts) if len(samples) > 1 else (samples.flatten(), 1)
        spread, many = float((sums - nll * size).square().sum()), len(sums)
        error = math.sqrt(spread * many / (many - 1)) / tokens if many > 1 else math.inf
        return cls(nll=nll, tokens=tokens, nll_error=error)

    @property
    def error(self) -> float:
        """Standard error of the perplexity, to first order."""
        return self.value * self.nll_error

    @property
    def value(self) -> float:
        """exp(nll); infinite beyond 709 nats."""
        return perplexity_of(self.nll)

    def describe(self, bytes_per_token: float) -> dict[str, float]:
        """Return plain values, by the names that ``--json`` prints.

        Args:
            bytes_per_token: mean number of UTF-8 bytes of a token of the text.
        """
        reach = _INTERVAL_ERRORS * self.nll_error
        return {
            "tokens": self.tokens,
            "perplexity": self.value,
            "perplexity_error": self.error,
            "perplexity_low": perplexity_of(self.nll - reach),
            "perplexity_high": perplexity_of(self.nll + reach),
            "nll": self.nll,
            "bits_per_byte": self.nll / math.log(2) / bytes_per_token,
        }


def perplexity_of(nll: float) -> float:
    """Return exp(nll); infinity where a float has no such number."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def measure_texts(
    engine: Engine,
    held_out_NS: torch.Tensor | None,
    text: tuple[str, torch.Tensor] | None,
    what: str,
    *,
    written: bool = False,
) -> dict[str, float | None]:
    """Measure a model's perplexities on held-out windows and on the user's text.

    Args:
        engine: the model's.
        held_out_NS: held-out windows, or None.
        text: name and windows of the text of ``--eval-text``, or None.
        what: name of the model for the progress.
        written: the model is a command's result, which a loss that is not finite must not lose: its
            perplexity is infinite then.

    Returns:
        ``"perplexity"`` and ``"eval_perplexity"``, as in the summaries, and the standard error of
        each (``"perplexity_error"``); None for missing windows.
    """
    texts = {"perplexity": (f"{what}: held-out perplexity", held_out_NS)}
    texts["eval_perplexity"] = ("", None)
    if text is not None:
        texts["eval_perplexity"] = (f"{what}: perplexity on {text[0]}", text[1])
    found: dict[str, float | None] = {}
    with engine.native() as stream:
        for key, (name, windows_NS) in texts.items():
            found |= {key: None, f"{key}_error": None}
            if windows_NS is not None:
                measured = measure_perplexity(
                    engine, stream, windows_NS, name=name, finite=not written
                )
                found |= {key: measured.value, f"{key}_error": measured.error}
    return found


def measure_perplexity(
    engine: Engine,
    stream: LayerStream,
    windows_NS: torch.Tensor,
    *,
    name: str = "perplexity",
    finite: bool = True,
    stride: int | None = None,
) -> Perplexity:
    """Measure the perplexity of a streamed model on token windows.

    Args:
        engine: the model's.
        stream: a stream of its layers.
        windows_NS: the windows.
        name: name of the sweep for the progress.
        finite: refuse a mean loss that is not finite.
        stride: tokens between the starts of two windows; None without overlap.

    Raises:
        CheckpointError: the mean loss is not finite; names the weights that cause it.
    """
    measured = Perplexity.of(engine.losses(stream, windows_NS, name), stride)
    if finite and not math.isfinite(measured.nll):
        require_finite(engine.checkpoint, engine.checkpoint.tensors)
        raise CheckpointError(
            f"{engine.checkpoint.folder}: {name}: the mean loss is {measured.nll}, although all "
            f"weights are finite: the model overflows in {engine.dtype}; use another checkpoint"
        )
    return measured
