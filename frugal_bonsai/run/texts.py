"""The texts of a command: read, tokenised and cut into windows.

In: an open model, sources as the user names them. Out: token windows. Holds the tokens; does not
read weights.

Shape suffixes: n and N windows, S tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.run.open import Model
from frugal_bonsai.text.chat import ChatTemplate
from frugal_bonsai.text.sources import Text as SourceText
from frugal_bonsai.text.sources import load_text
from frugal_bonsai.text.windows import (
    CHARACTERS_PER_TOKEN,
    cut_windows,
    load_tokenizer,
    require_embedded,
    spread_windows,
    tokenise,
)

if TYPE_CHECKING:
    import torch

DEFAULT_WINDOW = 2048
# A text that windows are spread over is read up to this many times the length that they need.
_SPREAD = 8


def choose_window(spec: ModelSpec, window: int | None) -> int:
    """Return the length of a window in tokens.

    The default is 2,048 tokens, less where the model has fewer positions or where a slightly
    shorter window needs no explicit attention mask: Phi-3-mini's sliding window has 2,047 tokens,
    and fused attention is slower with a mask and copies the keys for it.

    Args:
        spec: The model.
        window: Length that the user asks for. None takes the default.

    Raises:
        OptionError: ``window`` is less than two tokens or more than the model's positions.
    """
    if window is None:
        return min(DEFAULT_WINDOW, spec.positions, _sliding_window(spec))
    require_window(window, spec.positions)
    return window


def require_window(window: int, positions: int) -> None:
    """Check that a window has at least two tokens, and at most as many as the model's positions.

    Raises:
        OptionError: It has not.
    """
    if not 2 <= window <= positions:
        raise OptionError(
            f"--window: {window} tokens is outside 2..{positions} (the model's positions)"
        )


def require_stride(stride: int | None, window: int) -> None:
    """Check that overlapping windows begin at least one token apart, and leave no token out.

    Raises:
        OptionError: They do not.
    """
    if stride is not None and not 1 <= stride < window:
        raise OptionError(
            f"--stride: {stride} tokens is outside 1..{window - 1} (less than the window of "
            f"{window}); omit it for windows without overlap"
        )


def _sliding_window(spec: ModelSpec) -> int:
    """Return the longest window, a multiple of 64, that a sliding window does not truncate.

    A sliding window below half of the default is ignored: its layers get explicit masks.
    """
    sliding = spec.config.get("sliding_window")
    layer_types = spec.config.get("layer_types") or ["sliding_attention"]
    everywhere = set(layer_types) == {"sliding_attention"}
    used = everywhere and spec.config.get("use_sliding_window", True)
    if not isinstance(sliding, int) or not used or sliding <= DEFAULT_WINDOW // 2:
        return DEFAULT_WINDOW
    return (sliding - 1) // 64 * 64


class Text(NamedTuple):
    """A text as token windows, int64 ``[n, S]``, with its name in reports."""

    name: str
    windows_nS: torch.Tensor

    def describe(self) -> dict[str, Any]:
        """Return name and size as plain values."""
        windows, window = self.windows_nS.shape
        return {"name": self.name, "window": window, "windows": windows}


def read_eval_text(model: Model, source: str | None, window: int) -> Text | None:
    """Read all windows of the text that ``--eval-text`` names, if it names one."""
    if source is None:
        return None
    return read_windows(model, source, window, windows=None, option="--eval-text")


def read_windows(
    model: Model,
    source: str,
    window: int,
    *,
    windows: int | None,
    option: str,
    stride: int | None = None,
) -> Text:
    """Read a text and cut it into windows, from its beginning.

    Args:
        model: Model whose tokenizer is used.
        source: File, JSON lines, hub data set or ``stdlib``.
        window: Tokens of a window (S).
        windows: Largest number of windows. None takes all.
        option: Option that names the source, for error texts.
        stride: Tokens between the starts of two windows. None is ``window``.

    Returns:
        The first windows of the text.

    Raises:
        CalibrationError: The text cannot be read, or is shorter than a window.
        CheckpointError: The tokenizer cannot be read, or makes a token without an embedding row.
    """
    characters = None if windows is None else windows * window * CHARACTERS_PER_TOKEN
    text, tokenizer = _load(model, source, characters)
    what = f"{option} {text.name}"
    tokens_T = tokenise(text.text, tokenizer)
    windows_nS = cut_windows(tokens_T, window, limit=windows, what=what, stride=stride)
    require_embedded(windows_nS, tokenizer, model.spec.vocabulary, what=what)
    return Text(text.name, windows_nS)


def read_spread_windows(
    model: Model, source: str, window: int, *, windows: int, option: str
) -> Text:
    """Read a text and take windows from all over it.

    The same as :func:`read_windows`, but for the places of the windows. At most eight times the
    text that the windows need is read.
    """
    characters = _SPREAD * windows * window * CHARACTERS_PER_TOKEN
    text, tokenizer = _load(model, source, characters)
    what = f"{option} {text.name}"
    windows_nS = spread_windows(text.text, tokenizer, window, limit=windows, what=what)
    require_embedded(windows_nS, tokenizer, model.spec.vocabulary, what=what)
    return Text(text.name, windows_nS)


def _load(model: Model, source: str, characters: int | None) -> tuple[SourceText, Any]:
    """Return a text and the model's tokenizer, whose chat template renders conversations."""
    tokenizer = load_tokenizer(model.folder)
    chat = ChatTemplate(tokenizer, model.name)
    return load_text(source, characters=characters, chat=chat), tokenizer


def bytes_per_token(model: Model, windows_nS: torch.Tensor, stride: int | None) -> float:
    """Return the mean number of UTF-8 bytes of a token in windows of text.

    Args:
        model: Model whose tokenizer made them.
        windows_nS: The windows, int64 ``[n, S]``.
        stride: Tokens between the starts of two windows. None is S.
    """
    new = windows_nS.shape[1] if stride is None else stride
    tokens = [*windows_nS[0].tolist(), *windows_nS[1:, -new:].flatten().tolist()]
    text = load_tokenizer(model.folder).decode(tokens, clean_up_tokenization_spaces=False)
    return len(text.encode("utf-8", "replace")) / len(tokens)
