"""Write transformers' tokenizer from the metadata of a GGUF file.

In: a header with its vocabulary. Out: ``tokenizer.json``, ``tokenizer_config.json`` and the chat
template in a folder. transformers builds the vocabulary and its merges. The steps before and after
BPE are set here as llama.cpp has them, and so are special tokens that transformers leaves out: it
guesses the steps by the architecture of the model. Holds the vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from frugal_bonsai.checkpoint.commit import write_bytes, write_json
from frugal_bonsai.checkpoint.folder import read_json_object
from frugal_bonsai.checkpoint.gguf_header import TOKENS, GgufHeader
from frugal_bonsai.errors import UnsupportedModelError
from frugal_bonsai.export.tokenizer import LLAMA3, QWEN2

TOKEN_TYPES = "tokenizer.ggml.token_type"
_TEMPLATE = "tokenizer.chat_template"
_FILE, _OPTIONS = "tokenizer.json", "tokenizer_config.json"
_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "▁"
_BYTES, _DIGITS = "bytes", "digits"  # GPT-2's pattern; the same, with every digit apart
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = (
    rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"{_WORD}{_UPPER}*{_LOWER}+{_SUFFIX}|{_WORD}{_UPPER}+{_LOWER}*{_SUFFIX}|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's names of the rules that split a text before byte-level BPE (src/llama-vocab.cpp).
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral")
_RULES = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo"), _BYTES),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS),
    **dict.fromkeys((*_LLAMA3_NAMES, "dbrx", "smaug-bpe"), LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
    "tekken": _TEKKEN,
}
# With these, a piece that is a token is not split by merges, and a text begins with bos by default.
_WHOLE_PIECES = (*_LLAMA3_NAMES, "tekken")


def write_tokenizer(header: GgufHeader, positions: int, folder: Path) -> None:
    """Write the tokenizer's files into an existing folder.

    Args:
        header: of the file, with the whole arrays of tokens and their types.
        positions: the longest text that the model takes, in tokens.
        folder: see above.

    Raises:
        UnsupportedModelError: the tokenizer cannot be built as llama.cpp has it.
        OutputError: a file cannot be written.
    """
    kind, pre = _kind(header)
    tokenizer = _build(header, pre)
    if kind == "gpt2":
        _set_byte_level_steps(tokenizer.backend_tokenizer, pre)
    else:
        prefix = bool(header.metadata.get("tokenizer.ggml.add_space_prefix", True))
        _set_character_steps(tokenizer.backend_tokenizer, prefix=prefix)
    tokenizer.chat_template = _templates(header) or None
    tokenizer.model_max_length = positions
    tokenizer.save_pretrained(str(folder))
    options = read_json_object(folder / _OPTIONS)
    write_json(folder / _OPTIONS, {k: v for k, v in options.items() if "local" not in k})
    added, missing = set(tokenizer.added_tokens_decoder), []
    if kind == "gpt2":  # Gemma's runs of spaces need no entry: merges make them
        missing = [number for number in _special(header) if number not in added]
    if missing or any(number >= len(header.metadata[TOKENS]) for number in added):
        values = read_json_object(folder / _FILE)
        _set_special_tokens(header, values, missing)
        write_bytes(folder / _FILE, json.dumps(values, ensure_ascii=False).encode())


def _kind(header: GgufHeader) -> tuple[str, str]:
    """Return llama.cpp's names of the tokenizer and of its rules."""
    kind = str(header.metadata.get("tokenizer.ggml.model"))
    pre = str(header.metadata.get("tokenizer.ggml.pre", "default"))
    if kind not in ("llama", "gpt2"):
        raise UnsupportedModelError(
            f"{header.path}: its tokenizer is of the kind {kind!r}; known are 'llama' and 'gpt2'. "
            "Use the original checkpoint"
        )
    if kind == "gpt2" and pre not in _RULES:
        raise UnsupportedModelError(
            f"{header.path}: its tokenizer splits texts by the rules {pre!r}; known are "
            f"{', '.join(_RULES)}. Use the original checkpoint"
        )
    return kind, pre


def _build(header: GgufHeader, pre: str) -> Any:
    """Have transformers build the tokenizer."""
    from transformers import PreTrainedTokenizerFast

    path, options = header.path, {"add_bos_token": True} if pre in _WHOLE_PIECES else {}
    expected = (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, ImportError)
    try:
        return PreTrainedTokenizerFast.from_pretrained(
            str(path.parent), gguf_file=path.name, local_files_only=True, **options
        )
    except Exception as error:
        # The tokenizers package raises the base class itself.
        if type(error) is not Exception and not isinstance(error, expected):
            raise
        raise UnsupportedModelError(
            f"{path}: transformers cannot build its tokenizer ({type(error).__name__}: {error}); "
            "use the original checkpoint"
        ) from error


def _set_byte_level_steps(backend: Any, pre: str) -> None:
    """Set how a byte-level tokenizer splits and joins texts."""
    from tokenizers import Regex, decoders, pre_tokenizers

    rule = _RULES[pre]
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule in (_BYTES, _DIGITS))
    if rule == _BYTES:
        backend.pre_tokenizer = whole
    else:
        split = pre_tokenizers.Split(Regex(rule), "isolated")
        digits = pre_tokenizers.Digits(individual_digits=True)
        first = digits if rule == _DIGITS else split
        backend.pre_tokenizer = pre_tokenizers.Sequence([first, whole])
    backend.decoder = decoders.ByteLevel()
    backend.model.ignore_merges = pre in _WHOLE_PIECES


def _set_character_steps(backend: Any, *, prefix: bool) -> None:
    """Set how a tokenizer over characters, SentencePiece's, replaces spaces and joins texts."""
    from tokenizers import decoders, normalizers

    replace = normalizers.Replace(" ", _SPACE)
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    )
    backend.pre_tokenizer = None
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])


def _special(header: GgufHeader) -> dict[int, bool]:
    """Return the tokens that are looked for in texts: id -> whether it controls the model."""
    types = header.metadata.get(TOKEN_TYPES) or []
    looked_for = (_CONTROL, _USER_DEFINED)
    return {at: kind == _CONTROL for at, kind in enumerate(types) if kind in looked_for}


def _set_special_tokens(header: GgufHeader, values: dict[str, Any], missing: list[int]) -> None:
    """Make the special tokens of a ``tokenizer.json`` those of the file.

    transformers spells tokens such as DeepSeek's, whose bars are no ASCII, in the alphabet of bytes
    and does not look for them in texts. And it adds its classes' own tokens (``<s>``) behind the
    vocabulary, where the model has no embedding.

    Args:
        header: of the file.
        values: of ``tokenizer.json``; they are changed.
        missing: ids of special tokens that are not in it.
    """
    tokens, special = header.metadata[TOKENS], _special(header)
    vocab: dict[str, int] = values["model"]["vocab"]
    spelled = {number: text for text, number in vocab.items()}
    added = {at["id"]: at for at in values["added_tokens"] if at["id"] < len(tokens)}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for number in missing:
        vocab.pop(spelled[number])
        vocab[tokens[number]] = number
        entry = {"id": number, "content": tokens[number], **plain, "special": special[number]}
        added[number] = entry
    values["added_tokens"] = [added[number] for number in sorted(added)]
    around = (values.get("post_processor") or {}).get("special_tokens") or {}
    for token, place in around.items():
        place["ids"] = [vocab.get(token, place["ids"][0])]


def _templates(header: GgufHeader) -> Any:
    """Return the chat template; by name if there are several."""
    metadata = header.metadata
    default = metadata.get(_TEMPLATE)
    named = {
        key.removeprefix(_TEMPLATE + "."): value
        for key, value in metadata.items()
        if key.startswith(_TEMPLATE + ".")
    }
    return {"default": default, **named} if named and default is not None else named or default
