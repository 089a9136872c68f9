"""Tokenise text and cut it into windows.

In: text and a local tokenizer. Out: int64 tokens in windows, which overlap if asked. No special
tokens are added and nothing is downloaded. A text is tokenised in one call, because some tokenizers
merge across any boundary (SentencePiece). That call holds about 400 bytes per token, so callers
limit the length of the text. Windows spread over a long text are tokenised one by one.

Shape suffixes: T tokens, n windows, S tokens of a window.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugal_bonsai.errors import (
    WRONG_VALUES,
    CalibrationError,
    CheckpointError,
    FrugalBonsaiError,
)
from frugal_bonsai.plain_json import read_json

if TYPE_CHECKING:
    import torch

# Characters to read for a token: generous for text (about four), enough for byte vocabularies too.
CHARACTERS_PER_TOKEN = 8
_AGAIN = (
    "download tokenizer.json and tokenizer_config.json again, or save the tokenizer again with "
    "save_pretrained"
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has the files of a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(folder: str | Path) -> Any:
    """Load the tokenizer of a checkpoint folder from local files, without running its code.

    ``AutoTokenizer`` loads the model's config first. In transformers 5.23, Llama's config class
    refuses head counts that differ between layers, and a config that names custom code asks for
    permission to run it. For such folders the architecture's default config is passed instead; a
    tokenizer depends on the architecture only.

    Args:
        folder: a dense model, or a pruned model of any layout.

    Returns:
        A tokenizer of transformers.

    Raises:
        CheckpointError: the folder has no tokenizer, or transformers cannot read it.
    """
    folder = Path(folder)
    if not has_tokenizer(folder):
        raise CheckpointError(
            f"{folder}: has no tokenizer (looked for {', '.join(TOKENIZER_FILES)}); copy the "
            "tokenizer's files from the model's source"
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        _require_json(folder / name)
    from transformers import AutoConfig, AutoTokenizer

    with tokenizer_errors(str(folder)):
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        config = _read_config(folder)
        if config.get("per_layer_config") or config.get("auto_map"):
            options["config"] = AutoConfig.for_model(config["model_type"])
        return AutoTokenizer.from_pretrained(str(folder), **options)


@contextmanager
def tokenizer_errors(source: str, advice: str = _AGAIN) -> Iterator[None]:
    """Turn errors of the tokenizer packages in the block into a :class:`CheckpointError`.

    Args:
        source: folder or file of the tokenizer, for the error text.
        advice: what to try, as the end of a sentence.
    """
    try:
        yield
    except FrugalBonsaiError:
        raise
    except BaseException as error:
        if not _is_of_tokenizer(error):
            raise
        raise CheckpointError(_unreadable(source, error, advice)) from error


def _is_of_tokenizer(error: BaseException) -> bool:
    """Return whether a tokenizer's file causes this error.

    The tokenizers package raises ``Exception`` itself, and a class derived from ``BaseException``
    where its code fails an assertion.
    """
    from huggingface_hub.errors import StrictDataclassError

    known = (OSError, ImportError, StrictDataclassError, *WRONG_VALUES)
    return (
        isinstance(error, known)
        or type(error) is Exception
        or type(error).__name__ == "PanicException"
    )


def tokenise(text: str, tokenizer: Any) -> torch.Tensor:
    """Tokenise a text without special tokens.

    Args:
        text: a text of any length; it may be longer than the model's window.
        tokenizer: a tokenizer of transformers.

    Returns:
        int64 [T] on the CPU.

    Raises:
        CheckpointError: the tokenizer's files are damaged.
    """
    import torch

    # verbose=False: transformers warns of texts that are longer than the model's window.
    options = {"return_attention_mask": False, "verbose": False, "truncation": False}
    with tokenizer_errors(str(getattr(tokenizer, "name_or_path", "tokenizer"))):
        encoded = tokenizer(text, add_special_tokens=False, **options)
        return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def cut_windows(
    tokens_T: torch.Tensor,
    window: int,
    *,
    limit: int | None = None,
    what: str,
    stride: int | None = None,
) -> torch.Tensor:
    """Cut tokens into windows. Tokens after the last whole window are dropped.

    Args:
        tokens_T: int64 [T].
        window: S, tokens of a window.
        limit: largest number of windows; None for all.
        what: name of the text, for the error text.
        stride: tokens between the starts of two windows; None is ``window``, without overlap.

    Returns:
        int64 [n, S], a view of the tokens. n is at least 1.

    Raises:
        CalibrationError: there are fewer tokens than in one window.
    """
    if window < 1 or (limit is not None and limit < 1):
        raise ValueError(f"window and limit must be positive, got {window} and {limit}")
    found_tokens = len(tokens_T)
    if found_tokens < window:
        raise CalibrationError(
            f"{what}: {found_tokens} tokens, shorter than one window of {window}; use a longer "
            f"text or a --window of at most {max(found_tokens, 1)} tokens"
        )
    return tokens_T.unfold(0, window, stride or window)[:limit]


def spread_windows(
    text: str, tokenizer: Any, window: int, *, limit: int, what: str
) -> torch.Tensor:
    """Take windows at equal distances from all over a text.

    Neighbouring windows come from the same document and are alike. The same number of windows from
    more documents says more about the language.

    Args:
        text: a text of any length.
        tokenizer: a tokenizer of transformers.
        window: S, tokens of a window.
        limit: largest number of windows.
        what: name of the text, for the error text.

    Returns:
        int64 [n, S] in the order of the text. n is at least 1.

    Raises:
        CalibrationError: there are fewer tokens than in one window.
    """
    import torch

    piece = window * CHARACTERS_PER_TOKEN
    if limit == 1 or len(text) <= limit * piece:
        windows_nS = cut_windows(tokenise(text, tokenizer), window, what=what)
        if len(windows_nS) <= limit:
            return windows_nS
        return windows_nS[torch.arange(limit) * len(windows_nS) // limit]
    found = []
    for number in range(limit):
        start = number * (len(text) - piece) // (limit - 1)
        # A piece begins with a whole word.
        space = re.compile(r"\s").search(text, start, start + piece)
        start = start if space is None else space.start()
        found.append(tokenise(text[start : start + piece], tokenizer)[:window])
    whole = [tokens_S for tokens_S in found if len(tokens_S) == window]
    return torch.stack(whole) if whole else cut_windows(found[0], window, what=what)


def require_embedded(
    windows_nS: torch.Tensor, tokenizer: Any, vocabulary: int, *, what: str
) -> None:
    """Check that the model has an embedding row for every token.

    A tokenizer may have tokens that were added without resizing the model's embedding. Such a
    tokenizer works as long as no text contains them.

    Args:
        windows_nS: int64 [n, S], the tokens.
        tokenizer: the tokenizer that made them.
        vocabulary: rows of the model's embedding.
        what: name of the text, for the error text.

    Raises:
        CheckpointError: a token has no row. The text names token, id, vocabulary and text.
    """
    unknown = windows_nS[windows_nS >= vocabulary]
    if not len(unknown):
        return
    number = int(unknown[0])
    raise CheckpointError(
        f"{what}: contains the token {tokenizer.convert_ids_to_tokens(number)!r}, whose id "
        f"{number} is outside the model's vocabulary of {vocabulary} (rows of its embedding); take "
        "the tokenizer that belongs to this model, or remove the token from the text"
    )


def _require_json(path: Path) -> None:
    """Check that a file is JSON, so that the error names the file."""
    if not path.is_file():
        return
    _read_json(path)


def _read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json``, or an empty dict if there is none."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    config: dict[str, Any] = _read_json(path)
    return config


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path}: holds {type(found).__name__}, expected a JSON object; download it again"
        )
    return found


def _unreadable(source: str, error: BaseException, advice: str) -> str:
    """Return the error text for a tokenizer that transformers refuses."""
    lines = str(error).strip().splitlines() or ["no details"]
    what = f"{type(error).__name__}: {lines[0][:200]}"
    return f"{source}: its tokenizer cannot be read ({what}); {advice}"
