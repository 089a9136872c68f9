"""Write the small files of a model from the metadata of its GGUF file.

In: a GGUF file. Out: a folder with the tokenizer's files, ``generation_config.json``,
``config.json`` and the head of a card. transformers builds the tokenizer. What it lacks is put
right in the ``tokenizer.json`` that it writes: the rules that split a text before BPE, and special
tokens of characters that a byte-level vocabulary does not spell. Holds the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frugal_bonsai.checkpoint.commit import write_bytes, write_json
from frugal_bonsai.checkpoint.folder import CONFIG_FILE, read_json_object
from frugal_bonsai.checkpoint.gguf_header import TOKENS, GgufHeader, read_gguf_header
from frugal_bonsai.errors import CheckpointError, UnsupportedModelError
from frugal_bonsai.export.tokenizer import LLAMA3, QWEN2
from frugal_bonsai.model.families import FAMILIES

_TYPES = "tokenizer.ggml.token_type"
_TEMPLATE = "tokenizer.chat_template"
_TOKENIZER, _OPTIONS = "tokenizer.json", "tokenizer_config.json"
_CONTROL, _USER_DEFINED = 3, 4
_FURTHER_ENDS = ("eot", "eom")
_LICENCE = {"general.license": "license", "general.license.name": "license_name"} | {
    "general.license.link": "license_link"
}


def _split(pattern: str) -> dict[str, Any]:
    """Return the steps of a byte-level tokenizer that splits texts by a regular expression."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return {
        "type": "Sequence",
        "pretokenizers": [{**split, "invert": False}, _bytes(use_regex=False)],
    }


def _bytes(*, use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


# llama.cpp's names of the rules that split a text before byte-level BPE (src/llama-vocab.cpp).
_GPT2 = _bytes(use_regex=True)
_DIGITS_APART = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, _GPT2],
}
_SPLITTING = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "jina-es", "jina-de", "mpt"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS_APART),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _split(LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan"), _split(QWEN2)),
}


def write_gguf_companions(header: GgufHeader, config: Mapping[str, Any], folder: Path) -> None:
    """Write the small files into an existing folder.

    Raises:
        UnsupportedModelError: the tokenizer cannot be built as llama.cpp has it.
        CheckpointError: the file has no tokenizer, or cannot be read.
        OutputError: a file cannot be written.
    """
    header = read_gguf_header(header.path, (TOKENS, _TYPES))
    if not isinstance(header.metadata.get(TOKENS), list):
        raise CheckpointError(
            f"{header.path}: has no tokens ({TOKENS}); use a file that has its tokenizer inside"
        )
    positions = config[FAMILIES[config["model_type"]].positions_key]
    _write_tokenizer(header, positions, folder)
    write_json(folder / CONFIG_FILE, config)
    write_json(folder / "generation_config.json", _generation(header, config))
    write_bytes(folder / "README.md", _card(header).encode())


def _write_tokenizer(header: GgufHeader, positions: int, folder: Path) -> None:
    """Have transformers build the tokenizer, and put right what it lacks."""
    from transformers import PreTrainedTokenizerFast

    path, pre = header.path, header.metadata.get("tokenizer.ggml.pre", "default")
    byte_level = header.metadata.get("tokenizer.ggml.model") == "gpt2"
    if byte_level and pre not in _SPLITTING:
        raise UnsupportedModelError(
            f"{path}: its tokenizer splits texts by the rules {pre!r}; known are "
            f"{', '.join(_SPLITTING)}. Use the original checkpoint"
        )
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            str(path.parent), gguf_file=path.name, local_files_only=True
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise UnsupportedModelError(
            f"{path}: transformers cannot build its tokenizer ({type(error).__name__}: {error}); "
            "use the original checkpoint"
        ) from error
    tokenizer.chat_template = _templates(header) or None
    tokenizer.model_max_length = positions
    tokenizer.save_pretrained(str(folder))
    options = read_json_object(folder / _OPTIONS)
    write_json(folder / _OPTIONS, {k: v for k, v in options.items() if "local" not in k})
    if byte_level:
        values = read_json_object(folder / _TOKENIZER)
        values["pre_tokenizer"], values["decoder"] = _SPLITTING[pre], _bytes(use_regex=True)
        _add_special_tokens(header, values)
        write_bytes(folder / _TOKENIZER, json.dumps(values, ensure_ascii=False).encode())


def _add_special_tokens(header: GgufHeader, values: dict[str, Any]) -> None:
    """Add the special tokens that transformers leaves out, by the names that the file has.

    It spells a token such as DeepSeek's ``<｜User｜>`` in the alphabet of bytes and does not look
    for it in texts.
    """
    tokens, types = header.metadata[TOKENS], header.metadata.get(_TYPES) or []
    vocab: dict[str, int] = values["model"]["vocab"]
    spelled = {number: text for text, number in vocab.items()}
    added = {entry["id"]: entry for entry in values["added_tokens"]}
    for number, (token, kind) in enumerate(zip(tokens, types, strict=False)):
        if kind not in (_CONTROL, _USER_DEFINED) or number in added:
            continue
        if spelled.get(number) != token:
            vocab.pop(spelled.get(number, ""), None)
            vocab[token] = number
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        special = kind == _CONTROL
        added[number] = {"id": number, "content": token, **plain, "special": special}
    values["added_tokens"] = [added[number] for number in sorted(added)]


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


def _generation(header: GgufHeader, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return generation settings: the tokens that begin, end and fill texts."""
    ids = {key: config[key] for key in ("bos_token_id", "pad_token_id") if config[key] is not None}
    further = (header.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in _FURTHER_ENDS)
    ends = [at for at in (config["eos_token_id"], *further) if isinstance(at, int)]
    ends = list(dict.fromkeys(ends))
    if ends:
        ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return ids


def _card(header: GgufHeader) -> str:
    """Return a card whose head has the base model and the licence that the file names."""
    metadata = header.metadata
    lines = [
        f"{key}: {json.dumps(metadata[name])}"
        for name, key in _LICENCE.items()
        if isinstance(metadata.get(name), str)
    ]
    base = _hub_id(str(metadata.get("general.base_model.0.repo_url", "")))
    lines += [f"base_model: {json.dumps(base)}"] if base else []
    return "\n".join(("---", *lines, "---", "")) if lines else ""


def _hub_id(url: str) -> str | None:
    """Return ``org/name`` of a repository's address on the Hugging Face Hub."""
    _, found, name = url.partition("huggingface.co/")
    parts = name.strip("/").split("/")
    return "/".join(parts) if found and len(parts) == 2 and all(parts) else None
