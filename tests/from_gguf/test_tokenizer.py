"""Tokenizers that are read back from GGUF files split texts as their sources do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
from export.llama_cpp import needs_llama_cpp
from export.test_llama_cpp import assert_same_split, export, real_texts
from export.test_tokenizer import SPLITS, gemma_tokenizer, save_byte_level
from rewrite.models import tiny_parent

from frugal_bonsai.errors import CheckpointError, UnsupportedModelError
from frugal_bonsai.from_gguf.open import open_gguf
from frugal_bonsai.text.windows import load_tokenizer

from .files import exported, rewritten

MORE = [
    "In 2024 it cost 12345678 dollars",
    "a\r\n\r\n  b",
    "we'Ll   see!!!  (ok)\t\tx",
    "  two spaces, été, 東京 and \U0001f600",
    "def f():\n\n\n        return  1",
]


def dense(folder: Path, rows: int) -> Path:
    with tiny_parent(folder, vocab_size=rows, max_position_embeddings=512):
        pass
    return folder


def assert_comes_back(folder: Path, texts: list[str]) -> dict[str, Any]:
    """Export a model, read its tokenizer from the file, and compare; return generation settings."""
    path = folder.with_suffix(".gguf")
    export(folder, path)
    source = load_tokenizer(folder)
    with open_gguf(path) as read:
        found = load_tokenizer(read.companions)
        settings = json.loads((read.companions / "generation_config.json").read_text())
        kept = read.companions
    assert not kept.exists()
    assert max(found.get_vocab().values()) < read.tensors["model.embed_tokens.weight"].shape[0]
    for text in texts:
        assert found(text).input_ids == source(text).input_ids, text
        assert found.decode(found(text).input_ids) == source.decode(source(text).input_ids)
    for name in ("bos_token", "eos_token", "unk_token"):
        if getattr(source, name) is not None:
            assert getattr(found, name) == getattr(source, name)
    assert found.chat_template == source.chat_template
    return dict(settings)


@pytest.mark.parametrize("split", SPLITS)
def test_byte_level(tmp_path: Path, shared: Path, split: str) -> None:
    texts = real_texts(shared)
    save_byte_level(dense(tmp_path / "dense", 600), SPLITS[split](), texts)
    assert_comes_back(tmp_path / "dense", [*texts, *MORE, "a<|end|> b"])


def test_gemmas(tmp_path: Path, shared: Path) -> None:
    texts = real_texts(shared)
    made = gemma_tokenizer(texts)
    made.save_pretrained(dense(tmp_path / "dense", len(made) - 1))
    assert_comes_back(tmp_path / "dense", [*texts, *MORE])


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(tmp_path: Path, shared: Path, stories260k: Path, prefix: bool) -> None:
    folder = dense(tmp_path / "dense", 512)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(stories260k / name, folder)
    if not prefix:
        path = folder / "tokenizer.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
        path.write_text(json.dumps(values | {"normalizer": replace}))
    assert_comes_back(folder, [*real_texts(shared), *MORE])


def test_several_ends_and_templates(tmp_path: Path) -> None:
    source = exported(tmp_path / "m")
    path = rewritten(
        source,
        tmp_path / "n.gguf",
        metadata={
            "tokenizer.ggml.eot_token_id": 5,
            "tokenizer.chat_template": "{{ messages }}",
            "tokenizer.chat_template.tool_use": "{{ tools }}",
            "general.license": "apache-2.0",
            "general.base_model.0.repo_url": "https://huggingface.co/org/base",
        },
    )
    with open_gguf(path) as read:
        settings = json.loads((read.companions / "generation_config.json").read_text())
        assert settings == {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": [2, 5]}
        found = load_tokenizer(read.companions).chat_template
        assert found == {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
        card = (read.companions / "README.md").read_text()
        assert card == '---\nlicense: "apache-2.0"\nbase_model: "org/base"\n---\n'


def test_special_tokens_outside_the_alphabet_of_bytes(tmp_path: Path) -> None:
    """DeepSeek's are spelled with characters that no byte has."""
    source = exported(tmp_path / "m")
    fields = gguf.GGUFReader(source).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    user, begin = "<\uff5cUser\uff5c>", "<\uff5cbegin\u2581of\u2581text\uff5c>"
    tokens[0], tokens[1], types[0] = user, begin, int(gguf.TokenType.USER_DEFINED)
    path = rewritten(
        source,
        tmp_path / "n.gguf",
        metadata={
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.add_bos_token": True,
        },
    )
    with open_gguf(path) as read:
        found = load_tokenizer(read.companions)
    assert len(found) == 512 and found.bos_token == begin and found.bos_token_id == 1
    parts = [found(text, add_special_tokens=False).input_ids for text in ("a", "b")]
    assert found(f"a{user}b{begin}").input_ids == [1, *parts[0], 0, *parts[1], 1]


@pytest.mark.parametrize(
    ("metadata", "drop", "text"),
    [
        (
            {"tokenizer.ggml.pre": "klingon"},
            (),
            "splits texts by the rules 'klingon'; known are gpt",
        ),
        ({"tokenizer.ggml.model": "rwkv"}, (), "is of the kind 'rwkv'; known are 'llama' and"),
        (
            {"tokenizer.ggml.merges": ["\u00df z"]},
            (),
            r"its tokenizer cannot be read \(.*out of vocabulary",
        ),
        ({}, ("tokenizer.ggml.tokens",), "has no tokenizer.ggml.tokens"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, metadata: dict[str, Any], drop: tuple[str, ...], text: str
) -> None:
    source = exported(tmp_path / "m")
    path = rewritten(source, tmp_path / "n.gguf", metadata=metadata, drop=drop)
    with (
        open_gguf(path) as read,
        pytest.raises((UnsupportedModelError, CheckpointError), match=text) as refused,
    ):
        _ = read.companions
    assert str(path) in str(refused.value)


@needs_llama_cpp
@pytest.mark.parametrize("rules", ["tekken", "gpt-4o", "llama-bpe"])
def test_llama_cpp_splits_alike(tmp_path: Path, shared: Path, rules: str) -> None:
    """Rules that ``export`` does not write; without a flag, some begin texts with bos."""
    texts = real_texts(shared)
    save_byte_level(dense(tmp_path / "dense", 600), SPLITS["gpt-2"](), texts)
    export(tmp_path / "dense", tmp_path / "m.gguf")
    path = rewritten(
        tmp_path / "m.gguf",
        tmp_path / "n.gguf",
        metadata={"tokenizer.ggml.pre": rules},
        drop=("tokenizer.ggml.add_bos_token",),
    )
    with open_gguf(path) as read:
        found = load_tokenizer(read.companions)
        assert (found("a").input_ids[0] == found.bos_token_id) == (rules != "gpt-4o")
        assert_same_split(read.companions, path, [*texts[:20], *MORE, "camelCase I'LL HTTPServer"])
