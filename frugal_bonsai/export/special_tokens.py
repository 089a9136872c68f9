"""Resolve special tokens as transformers does.

In: a tokenizer loaded by transformers, which reads ``tokenizer_config.json`` and
``special_tokens_map.json``; ``generation_config.json`` and ``config.json`` for what the tokenizer
does not name. Out: ids. ``gguf.SpecialVocab`` does this for llama.cpp's own conversion, but reads
two of these files only. Holds small values only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frugal_bonsai.checkpoint.folder import read_json_object

GENERATION_FILE = "generation_config.json"
_KINDS = ("bos", "eos", "unk", "sep", "pad", "mask")
# llama.cpp stops at these too. transformers allows any number of tokens to stop at.
_FURTHER_ENDS = ("eot", "eom")


def special_ids(
    folder: Path, tokenizer: Any, vocabulary: int, config: Mapping[str, Any]
) -> dict[str, int]:
    """Return the ids of special tokens.

    The tokenizer's own come first, then those of ``generation_config.json`` or else the model's
    configuration. Further tokens that end a generation become ``eot`` and ``eom``.

    Args:
        folder: Of the model.
        tokenizer: A transformers tokenizer.
        vocabulary: Rows of the token embedding; an id beyond it does not count.
        config: ``config.json``.

    Raises:
        CheckpointError: ``generation_config.json`` cannot be read.
    """
    path = Path(folder) / GENERATION_FILE
    generation = read_json_object(path) if path.is_file() else {}
    found: dict[str, int] = {}
    for kind in _KINDS:
        key = f"{kind}_token_id"
        named = config.get(key) if generation.get(key) is None else generation[key]
        ids = [*_ids(getattr(tokenizer, key, None)), *_ids(named)]
        ids = list(dict.fromkeys(at for at in ids if 0 <= at < vocabulary))
        if ids:
            found[kind] = ids[0]
        if kind == "eos":
            found |= zip(_FURTHER_ENDS, ids[1:], strict=False)
    return found


def _ids(value: Any) -> list[int]:
    """Return an id, or a list of ids, as a list."""
    values = value if isinstance(value, list) else [value]
    return [at for at in values if isinstance(at, int)]
