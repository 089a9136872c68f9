"""Write transformers' tokenizer from the metadata of a GGUF file.

In: a header with its vocabulary. Out: ``tokenizer.json``, ``tokenizer_config.json`` and the chat
template in a folder. The tokenizer is built as llama.cpp has it, with the ``tokenizers`` package.
transformers' own reader guesses the steps before BPE by the architecture of the model, spells some
special tokens in bytes, adds tokens behind the vocabulary, and differs between its versions. The
reverse of :mod:`frugal_bonsai.export.tokenizer`. Holds the vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugal_bonsai.checkpoint.commit import output_errors
from frugal_bonsai.checkpoint.gguf_header import TOKENS, GgufHeader
from frugal_bonsai.errors import CheckpointError, UnsupportedModelError
from frugal_bonsai.export.tokenizer import LLAMA3, QWEN2
from frugal_bonsai.text.windows import tokenizer_errors

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_TYPES, _SCORES = "tokenizer.ggml.token_type", "tokenizer.ggml.scores"
_MERGES = "tokenizer.ggml.merges"
ARRAYS = (TOKENS, _TYPES, _SCORES, _MERGES)
_TEMPLATE = "tokenizer.chat_template"
_NAMED = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "sep_token": "seperator",  # llama.cpp spells the key so
    "mask_token": "mask",
}
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
        header: of the file, with the whole arrays in :data:`ARRAYS`.
        positions: the longest text that the model takes, in tokens.
        folder: see above.

    Raises:
        UnsupportedModelError: the tokenizer is of an unknown kind.
        CheckpointError: an array is missing, or the tokenizer cannot be built of them.
        OutputError: a file cannot be written.
    """
    from transformers import PreTrainedTokenizerFast

    kind, pre = _kind(header)
    with tokenizer_errors(str(header.path), "use the original checkpoint"):
        backend = _byte_level(header, pre) if kind == "gpt2" else _characters(header)
        _add_special_tokens(backend, header)
        _surround(backend, header, begins=kind == "llama" or pre in _WHOLE_PIECES)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, model_max_length=positions, **_named_tokens(header)
        )
        tokenizer.chat_template = _templates(header) or None
    with output_errors(folder):
        tokenizer.save_pretrained(str(folder))


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


def _array(header: GgufHeader, key: str) -> list[Any]:
    """Return an array that was read whole."""
    found = header.metadata.get(key)
    if not isinstance(found, list):
        raise CheckpointError(
            f"{header.path}: has no {key}; use a file that has its tokenizer inside"
        )
    return found


def _byte_level(header: GgufHeader, pre: str) -> Tokenizer:
    """Build a tokenizer over bytes, and the steps by which it splits and joins texts."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: at for at, token in enumerate(_array(header, TOKENS))}
    pairs = [tuple(merge.split(" ", 1)) for merge in _array(header, _MERGES)]
    backend = Tokenizer(models.BPE(vocab, pairs, ignore_merges=pre in _WHOLE_PIECES))
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
    return backend


def _characters(header: GgufHeader) -> Tokenizer:
    """Build a tokenizer over characters, SentencePiece's, and how it replaces spaces."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import generate_merges

    tokens = _array(header, TOKENS)
    vocab = {token: at for at, token in enumerate(tokens)}
    scores = dict(zip(tokens, _array(header, _SCORES), strict=False))
    unknown = header.metadata.get("tokenizer.ggml.unknown_token_id")
    model = models.BPE(
        vocab,
        generate_merges(vocab, scores),
        unk_token=tokens[unknown] if isinstance(unknown, int) else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    backend, replace = Tokenizer(model), normalizers.Replace(" ", _SPACE)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if header.metadata.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = replace
    backend.decoder = decoders.Sequence(steps)
    return backend


def _add_special_tokens(backend: Tokenizer, header: GgufHeader) -> None:
    """Add the tokens that are looked for in texts before they are split."""
    from tokenizers import AddedToken

    kinds = {_CONTROL: backend.add_special_tokens, _USER_DEFINED: backend.add_tokens}
    types = header.metadata.get(_TYPES)
    pairs = list(
        zip(_array(header, TOKENS), types if isinstance(types, list) else [], strict=False)
    )
    for wanted, add in kinds.items():
        found = [token for token, kind in pairs if kind == wanted]
        add([AddedToken(token, normalized=False, special=wanted == _CONTROL) for token in found])


def _surround(backend: Tokenizer, header: GgufHeader, *, begins: bool) -> None:
    """Put bos in front of texts and eos behind them, as the file says.

    Args:
        backend: the tokenizer.
        header: of the file.
        begins: a file that says nothing puts bos in front of texts.
    """
    from tokenizers.processors import TemplateProcessing

    named, metadata = _named_tokens(header), header.metadata
    bos = named.get("bos_token") if metadata.get("tokenizer.ggml.add_bos_token", begins) else None
    eos = named.get("eos_token") if metadata.get("tokenizer.ggml.add_eos_token") else None
    if bos is None and eos is None:
        return
    texts = [[*([bos] if bos else []), f"${name}", *([eos] if eos else [])] for name in "AB"]
    ids = {token: backend.token_to_id(token) for token in (bos, eos) if token is not None}
    second = [f"{part}:1" for part in texts[1]]
    backend.post_processor = TemplateProcessing(
        single=texts[0], pair=[*texts[0], *second], special_tokens=list(ids.items())
    )


def _named_tokens(header: GgufHeader) -> dict[str, str]:
    """Return the texts of bos, eos and others, by transformers' names."""
    tokens, named = _array(header, TOKENS), {}
    for name, key in _NAMED.items():
        number = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(number, int) and number < len(tokens):
            named[name] = tokens[number]
    return named


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
