"""Write the small files of a model from the metadata of its GGUF file.

In: a GGUF file. Out: a folder with the tokenizer's files, ``generation_config.json``,
``config.json`` and the head of a card. Holds the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frugal_bonsai.checkpoint.commit import write_bytes, write_json
from frugal_bonsai.checkpoint.folder import CONFIG_FILE
from frugal_bonsai.checkpoint.gguf_header import GgufHeader, read_gguf_header
from frugal_bonsai.from_gguf.tokenizer import ARRAYS, write_tokenizer
from frugal_bonsai.memory.budget import return_freed_memory
from frugal_bonsai.model.families import FAMILIES

_FURTHER_ENDS = ("eot", "eom")
_LICENCE = {"general.license": "license", "general.license.name": "license_name"} | {
    "general.license.link": "license_link"
}


def write_gguf_companions(header: GgufHeader, config: Mapping[str, Any], folder: Path) -> None:
    """Write the small files into an existing folder.

    Raises:
        UnsupportedModelError: the tokenizer cannot be built as llama.cpp has it.
        CheckpointError: the file has no tokenizer, or cannot be read.
        OutputError: a file cannot be written.
    """
    _write_vocabulary(header, config, folder)
    return_freed_memory()  # building Gemma's vocabulary takes 400 MB
    write_json(folder / CONFIG_FILE, config)
    write_json(folder / "generation_config.json", _generation(header, config))
    write_bytes(folder / "README.md", _card(header).encode())


def _write_vocabulary(header: GgufHeader, config: Mapping[str, Any], folder: Path) -> None:
    """Write the tokenizer's files. The vocabulary is freed at the end."""
    positions = config[FAMILIES[config["model_type"]].positions_key]
    write_tokenizer(read_gguf_header(header.path, ARRAYS), positions, folder)


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
