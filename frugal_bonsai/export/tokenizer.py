"""A Hugging Face tokenizer as GGUF metadata.

In: a folder with ``tokenizer.json``. Out: what llama.cpp needs to split text in the same way, or an
error that names what it has no equal for. Two kinds: BPE over characters with byte fallback, as
SentencePiece makes it (llama.cpp's ``llama``), and BPE over bytes (its ``gpt2``), whose pattern for
splitting text llama.cpp knows by names. Holds the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frugal_bonsai.checkpoint.folder import read_json_object
from frugal_bonsai.errors import UnsupportedModelError

TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
# llama.cpp's token types (gguf.TokenType).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "▁"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# Score of a piece that no merge makes: llama.cpp joins by score, this is tried last.
_NEVER = -1e9

# Patterns by which byte-level tokenizers split text first -> llama.cpp's name for it
# (src/llama-vocab.cpp). The first is what the ByteLevel pre-tokenizer does by itself.
_DIGIT = r"\p{N}"
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    (_GPT2_PATTERN,): "gpt-2",
    (_LLAMA3_PATTERN,): "llama-bpe",
    (_LLAMA3_PATTERN.replace("{1,3}", ""),): "qwen2",
    (_DIGIT, _GPT2_PATTERN): "smollm",
}


@dataclass(frozen=True, kw_only=True)
class GgufTokenizer:
    """A tokenizer in llama.cpp's words.

    Attributes:
        model: ``llama`` or ``gpt2``.
        pre: name of the pattern that splits text first.
        tokens: text of every token, by id.
        types: type of every token.
        scores: for ``llama``: the higher, the earlier a piece is made; None for ``gpt2``.
        merges: for ``gpt2``; None for ``llama``.
        special_ids: ``bos``, ``eos``, ``unk``, ``pad``, as far as they exist.
        add_bos: a text begins with bos.
        add_eos: it ends with eos.
        add_space_prefix: a text is read as if a space were in front.
        chat_template: Jinja, or None.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] | None
    merges: tuple[str, ...] | None
    special_ids: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None


def read_tokenizer(folder: Path, vocabulary: int) -> GgufTokenizer:
    """The tokenizer of a model's folder.

    Args:
        folder: with ``tokenizer.json`` and, best, ``tokenizer_config.json``.
        vocabulary: rows of the token embedding; ids without a token are filled up as unused.

    Raises:
        CheckpointError: a file that cannot be read.
        UnsupportedModelError: no tokenizer, or one that llama.cpp has no equal for.
    """
    path = Path(folder) / TOKENIZER_FILE
    if not path.is_file():
        raise UnsupportedModelError(
            f"{folder}: has no {TOKENIZER_FILE}, and a GGUF file needs its tokenizer; write one: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    values = read_json_object(path)
    config_path = Path(folder) / CONFIG_FILE
    config = read_json_object(config_path) if config_path.is_file() else {}
    model = values.get("model") or {}
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise _unsupported(path, f"its model is {model.get('type')!r}, expected BPE")
    tokens, added = _tokens(path, values, vocabulary)
    first, last = _ends(path, values.get("post_processor"))
    ids = {text: at for at, text in enumerate(tokens)}
    special = _special_ids(config, model, ids)
    for end, kind in ((first, "bos"), (last, "eos")):
        if end is not None and (kind not in special or tokens[special[kind]] != end):
            raise _unsupported(path, f"it puts {end!r} around texts, which is not {kind}")
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    characters = bool(model.get("byte_fallback"))
    if not characters and not merges:
        raise _unsupported(path, "it has no merges, and llama.cpp loads none without")
    return GgufTokenizer(
        model="llama" if characters else "gpt2",
        pre="default" if characters else _pattern(path, values),
        tokens=tokens,
        types=_types(tokens, added, model.get("unk_token"), bytes_of_their_own=characters),
        scores=_scores(tokens, merges) if characters else None,
        merges=None if characters else tuple(" ".join(pair) for pair in merges),
        special_ids=special,
        add_bos=first is not None,
        add_eos=last is not None,
        add_space_prefix=characters and _space_prefix(path, values),
        chat_template=_chat_template(Path(folder), config),
    )


def _unsupported(path: Path, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{path}: llama.cpp has no tokenizer that is known to split text like this one: {why}; "
        "export knows BPE with byte fallback (SentencePiece's) and byte-level BPE with the "
        "patterns of GPT-2, Llama 3 and Qwen 2"
    )


def _tokens(
    path: Path, values: Mapping[str, Any], vocabulary: int
) -> tuple[tuple[str, ...], Mapping[str, bool]]:
    """Text of every id, and the added tokens: whether they are special."""
    ids = dict(values["model"].get("vocab", {}))
    added = {}
    for token in values.get("added_tokens") or []:
        if token["id"] >= vocabulary and token["content"] not in ids:
            continue  # no row of the embedding: an image's place in Gemma 3, for models that see
        ids[token["content"]] = token["id"]
        added[token["content"]] = bool(token.get("special"))
    by_id = {at: text for text, at in ids.items()}
    if len(by_id) != len(ids) or not by_id or not 0 <= max(by_id) < vocabulary:
        raise _unsupported(
            path,
            f"{len(ids)} tokens with {len(by_id)} ids up to {max(by_id, default=None)}, for an "
            f"embedding of {vocabulary} rows",
        )
    return tuple(by_id.get(at, f"[PAD{at}]") for at in range(vocabulary)), added


def _types(
    tokens: tuple[str, ...],
    added: Mapping[str, bool],
    unknown: str | None,
    *,
    bytes_of_their_own: bool,
) -> tuple[int, ...]:
    types = []
    for at, text in enumerate(tokens):
        if text == unknown:
            types.append(UNKNOWN)
        elif text in added and bytes_of_their_own and _SPACE in text and not added[text]:
            # Gemma's runs of spaces, which merges make like other pieces. llama.cpp would look for
            # a user's token in the text as it stands, and write it as it stands.
            types.append(NORMAL)
        elif text in added:
            types.append(CONTROL if added[text] else USER_DEFINED)
        elif text == f"[PAD{at}]":
            types.append(UNUSED)
        elif bytes_of_their_own and _BYTE_TOKEN.fullmatch(text):
            types.append(BYTE)
        else:
            types.append(NORMAL)
    return tuple(types)


def _scores(tokens: tuple[str, ...], merges: list[tuple[str, ...]]) -> tuple[float, ...]:
    """Minus the rank of the first merge that makes the piece; single characters are not made."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return tuple(
        float(-ranks[text]) if text in ranks else 0.0 if len(text) == 1 else _NEVER
        for text in tokens
    )


def _space_prefix(path: Path, values: Mapping[str, Any]) -> bool:
    """Whether a space is put in front; what else is done to the text must be known."""
    steps = _steps(values.get("normalizer"), "normalizers")
    steps += _steps(values.get("pre_tokenizer"), "pretokenizers")
    prefix = replaced = False
    for step in steps:
        if step.get("type") == "Prepend" and step.get("prepend") == _SPACE:
            prefix = True
        elif (
            step.get("type") == "Replace"
            and step.get("pattern") == {"String": " "}
            and step.get("content") == _SPACE
        ):
            replaced = True
        elif step.get("type") == "Metaspace" and step.get("replacement") == _SPACE:
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space") else None)
            prefix, replaced = scheme in ("always", "first"), True
        elif step.get("type") == "Split" and step.get("pattern") == {"String": " "} and replaced:
            continue  # Gemma's: there are no spaces left to split at
        else:
            raise _unsupported(path, f"its normalizer or pre-tokenizer has {step.get('type')!r}")
    if not replaced:
        raise _unsupported(path, f"spaces do not become {_SPACE!r}")
    return prefix


def _pattern(path: Path, values: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text first."""
    normalizers = {str(step["type"]) for step in _steps(values.get("normalizer"), "normalizers")}
    steps = _steps(values.get("pre_tokenizer"), "pretokenizers")
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    if len(byte_level) != 1 or byte_level[0].get("add_prefix_space"):
        raise _unsupported(path, "it is not byte-level, or puts a space in front of texts")
    patterns = []
    for step in steps:
        if step.get("type") == "Split":
            patterns.append(step["pattern"].get("Regex"))
        elif step.get("type") == "Digits" and step.get("individual_digits"):
            patterns.append(_DIGIT)
        elif step.get("type") != "ByteLevel":
            raise _unsupported(path, f"its pre-tokenizer has {step.get('type')!r}")
    if byte_level[0].get("use_regex", True):
        patterns.append(_GPT2_PATTERN)
    name = _PATTERNS.get(tuple(patterns))
    # Qwen and GPT-NeoX normalise to NFC first, llama.cpp does not: text in another form differs.
    if name is None or normalizers - {"NFC"}:
        raise _unsupported(path, f"it splits text by {patterns}, normalizers {sorted(normalizers)}")
    return name


def _steps(value: Any, key: str) -> list[Mapping[str, Any]]:
    """The parts of a normalizer or pre-tokenizer, a sequence taken apart."""
    if value is None:
        return []
    if value.get("type") == "Sequence":
        return [part for step in value.get(key, []) for part in _steps(step, key)]
    return [value]


def _ends(path: Path, processor: Any) -> tuple[str | None, str | None]:
    """The special token that is put in front of a text, and the one behind it."""
    first = last = None
    for step in _steps(processor, "processors"):
        if step.get("type") == "ByteLevel":  # moves offsets alone
            continue
        if step.get("type") != "TemplateProcessing":
            raise _unsupported(path, f"its post-processor has {step.get('type')!r}")
        names = [
            part["SpecialToken"]["id"] if "SpecialToken" in part else None
            for part in step.get("single", [])
        ]
        at = names.index(None)
        if len(names[:at]) > 1 or len(names[at + 1 :]) > 1:
            raise _unsupported(path, f"it puts several tokens around texts: {names}")
        first = names[0] if at else None
        last = names[-1] if len(names) > at + 1 else None
    return first, last


def _special_ids(
    config: Mapping[str, Any], model: Mapping[str, Any], ids: Mapping[str, int]
) -> dict[str, int]:
    found = {}
    for kind in ("bos", "eos", "unk", "pad"):
        token = config.get(f"{kind}_token")
        if token is None and kind == "unk":
            token = model.get("unk_token")
        text = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(text, str) and text in ids:
            found[kind] = ids[text]
    return found


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, str):
        return template
    path = folder / TEMPLATE_FILE
    return path.read_text(encoding="utf-8") if path.is_file() else None
