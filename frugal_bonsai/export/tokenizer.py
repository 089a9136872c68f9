"""Describe a Hugging Face tokenizer in llama.cpp's terms.

In: a model's folder. Out: keys of a GGUF file, or an error that names the feature that llama.cpp
lacks. transformers loads the tokenizer, so the result follows what transformers does with
the files of the folder. ``gguf.SpecialVocab``, which llama.cpp's own conversion uses, reads fewer
of them. Two kinds are supported: BPE over characters with byte fallback, as
SentencePiece makes it (llama.cpp's ``llama``), and BPE over bytes (llama.cpp's ``gpt2``). Holds the
vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugal_bonsai.checkpoint.folder import read_json_object
from frugal_bonsai.errors import UnsupportedModelError
from frugal_bonsai.text.windows import load_tokenizer

if TYPE_CHECKING:
    from gguf import TokenType

_SPACE = "▁"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# Score of a piece that no merge makes. llama.cpp merges the pair with the highest score first.
_NEVER = -1e9
# Token at which llama.cpp stops if the file names none.
_DEFAULT_END = {"llama": 2, "gpt2": 11}

_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")
# llama.cpp stops at these too. transformers allows any number of tokens to stop at.
_FURTHER_ENDS = ("eot", "eom")

# Regular expressions by which byte-level tokenizers split a text before BPE.
_DIGIT = r"\p{N}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
# Steps before BPE (see _step) -> llama.cpp's name for them (src/llama-vocab.cpp).
_BYTE_LEVEL = {
    (_GPT2,): "gpt-2",
    (LLAMA3, "ByteLevel"): "llama-bpe",
    (QWEN2, "ByteLevel"): "qwen2",
    (_DIGIT, _GPT2): "smollm",
}
# Steps before BPE -> whether a space is put in front of a text. Gemma's last step splits at spaces
# that the step before has replaced, so it does nothing.
_CHARACTERS = {
    ("Prepend ▁", "Replace ' ' ▁"): True,
    ("Replace ' ' ▁",): False,
    ("Replace ' ' ▁", "' '"): False,
    ("Metaspace always",): True,
    ("Metaspace first",): True,
    ("Metaspace never",): False,
}


def read_tokenizer(folder: Path, vocabulary: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return methods of ``gguf.GGUFWriter`` and their arguments, for a folder's tokenizer.

    Args:
        folder: With the files that ``AutoTokenizer`` needs.
        vocabulary: Rows of the token embedding. Ids without a token become unused tokens.
        config: ``config.json``, for special tokens that the tokenizer does not name.

    Raises:
        CheckpointError: A file is missing or cannot be read.
        UnsupportedModelError: llama.cpp has no equivalent tokenizer.
    """
    tokenizer = load_tokenizer(folder)
    values = _backend_values(tokenizer, vocabulary)
    model, added = values["model"], tokenizer.added_tokens_decoder
    texts = tokenizer.convert_ids_to_tokens(list(range(vocabulary)))
    tokens = [f"[PAD{at}]" if text is None else text for at, text in enumerate(texts)]
    pre, space_prefix = _splitting(values)
    special = _special_ids(folder, tokenizer, vocabulary, config)
    add_bos, add_eos = _surrounding_tokens(tokenizer, special)
    kind = "llama" if model["byte_fallback"] else "gpt2"
    keys: dict[str, Any] = {
        "add_tokenizer_model": kind,
        "add_tokenizer_pre": pre,
        "add_token_list": tokens,
        "add_token_types": [_token_type(t, added.get(at), model) for at, t in enumerate(texts)],
        "add_add_bos_token": add_bos,
        "add_add_eos_token": add_eos,
        "add_add_space_prefix": space_prefix,
    }
    if kind == "llama":
        keys["add_token_scores"] = _scores(tokens, model["merges"])
    else:
        keys["add_token_merges"] = [" ".join(pair) for pair in model["merges"]]
    keys |= {f"add_{name}_token_id": at for name, at in special.items()}
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template is not None:
        keys["add_chat_template"] = template
    return keys


def end_note(keys: Mapping[str, Any]) -> list[str]:
    """Return a note if no file names a token that ends a text; llama.cpp takes a default then."""
    end = _DEFAULT_END[keys["add_tokenizer_model"]]
    tokens = keys["add_token_list"]
    if "add_eos_token_id" in keys or end >= len(tokens):
        return []
    return [
        f"no file names a token that ends a text: llama.cpp stops at token {end} "
        f"({tokens[end]!r}); set eos_token_id in config.json"
    ]


def _unsupported(why: str) -> UnsupportedModelError:
    """Return the error for a tokenizer that llama.cpp does not have."""
    return UnsupportedModelError(
        f"llama.cpp has no tokenizer that is known to split text like this one: {why}; "
        "export knows BPE with byte fallback (SentencePiece's) and byte-level BPE with the "
        "patterns of GPT-2, Llama 3 and Qwen 2"
    )


def _special_ids(
    folder: Path, tokenizer: Any, vocabulary: int, config: Mapping[str, Any]
) -> dict[str, int]:
    """Return the ids of special tokens that have a row.

    The tokenizer's own come first, then those of ``generation_config.json`` or else of
    ``config.json``. Further tokens that end a generation become ``eot`` and ``eom``.
    """
    path = Path(folder) / "generation_config.json"
    generation = read_json_object(path) if path.is_file() else {}
    found: dict[str, int] = {}
    for kind in _SPECIAL:
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


def _surrounding_tokens(tokenizer: Any, special: Mapping[str, int]) -> tuple[bool, bool]:
    """Return whether bos is put in front of a text, and eos behind it."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, added = encoded["input_ids"], encoded["special_tokens_mask"]
    if 0 not in added:
        raise _unsupported("it makes no token of the letter a")
    before, after = added.index(0), added[::-1].index(0)
    found = []
    for kind, tokens in (("bos", ids[:before]), ("eos", ids[len(ids) - after :])):
        if tokens and tokens != [special.get(kind)]:
            texts = tokenizer.convert_ids_to_tokens(tokens)
            raise _unsupported(f"it puts {texts} around texts, which is not {kind}")
        found.append(bool(tokens))
    return found[0], found[1]


def _backend_values(tokenizer: Any, vocabulary: int) -> dict[str, Any]:
    """Return the tokenizer as the values of a ``tokenizer.json``."""
    if not tokenizer.is_fast:
        raise _unsupported(f"{type(tokenizer).__name__} is written in Python")
    values: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = values["model"]
    if model["type"] != "BPE":
        raise _unsupported(f"its model is {model['type']!r}, expected BPE")
    if not model["byte_fallback"] and not model["merges"]:
        raise _unsupported("it has no merges, and llama.cpp loads no such tokenizer")
    # An added token may have no row: the placeholder of an image in Gemma 3's text models.
    last = max(model["vocab"].values(), default=-1)
    if last >= vocabulary:
        raise _unsupported(
            f"its tokens have ids up to {last}, for an embedding of {vocabulary} rows"
        )
    return values


def _splitting(values: Mapping[str, Any]) -> tuple[str, bool]:
    """Return llama.cpp's name for the steps before BPE, and whether they put a space in front."""
    steps = _steps(values["normalizer"], "normalizers")
    steps += _steps(values["pre_tokenizer"], "pretokenizers")
    if values["model"]["byte_fallback"]:
        if tuple(steps) in _CHARACTERS:
            return "default", _CHARACTERS[tuple(steps)]
    else:
        # Qwen and GPT-NeoX normalise to NFC first. llama.cpp does not, so it gives other tokens
        # for texts that are not in this form.
        pre = _BYTE_LEVEL.get(tuple(step for step in steps if step != "NFC"))
        if pre is not None:
            return pre, False
    raise _unsupported(f"before BPE it applies {steps}")


def _token_type(text: str | None, added: Any, model: Mapping[str, Any]) -> TokenType:
    """Return the ``gguf.TokenType`` of one token; ``added`` is None for tokens of the model."""
    from gguf import TokenType

    if text is None:
        return TokenType.UNUSED
    if text == model["unk_token"]:
        return TokenType.UNKNOWN
    if added is not None and added.special:
        return TokenType.CONTROL
    if added is not None:
        # Gemma adds runs of spaces that merges make like other pieces. As a user-defined token
        # llama.cpp would look for the text with "▁" in it.
        piece = model["byte_fallback"] and _SPACE in text
        return TokenType.NORMAL if piece else TokenType.USER_DEFINED
    if model["byte_fallback"] and _BYTE_TOKEN.fullmatch(text):
        return TokenType.BYTE
    return TokenType.NORMAL


def _scores(tokens: Sequence[str], merges: list[list[str]]) -> list[float]:
    """Return minus the rank of the first merge that makes each piece, 0 for single characters."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return [
        float(-ranks[text]) if text in ranks else 0.0 if len(text) == 1 else _NEVER
        for text in tokens
    ]


def _steps(value: Mapping[str, Any] | None, key: str) -> list[str]:
    """Return the steps of a normalizer or pre-tokenizer, sequences flattened."""
    if value is None:
        return []
    if value["type"] == "Sequence":
        return [name for step in value[key] for name in _steps(step, key)]
    return [_step(value)]


def _step(step: Mapping[str, Any]) -> str:
    """Return a name for one step: its regular expression, or its type and what distinguishes it."""
    kind, pattern = str(step["type"]), step.get("pattern", {})
    text = pattern["Regex"] if "Regex" in pattern else repr(pattern.get("String"))
    if kind == "Split":
        return str(text)
    if kind == "Replace":
        return f"Replace {text} {step['content']}"
    if kind == "Prepend":
        return f"Prepend {step['prepend']}"
    if kind == "Metaspace" and step["replacement"] == _SPACE:
        return f"Metaspace {step['prepend_scheme']}"
    if kind == "Digits" and step["individual_digits"]:
        return _DIGIT
    if kind == "ByteLevel" and step["add_prefix_space"]:
        return "ByteLevel with a space in front of texts"
    return _GPT2 if kind == "ByteLevel" and step["use_regex"] else kind
