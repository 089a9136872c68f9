"""Tokenizers as keys of a GGUF file, and tokenizers that llama.cpp does not have."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from rewrite.models import tiny_parent
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AddedToken,
    AutoTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    GPTNeoXTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)
from transformers.convert_slow_tokenizer import generate_merges

from export.llama_cpp import needs_llama_cpp
from export.test_llama_cpp import assert_same_split, export, real_texts
from frugal_bonsai.errors import UnsupportedModelError
from frugal_bonsai.export.tokenizer import LLAMA3, QWEN2, end_note, read_tokenizer


def split_by(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


SPLITS: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": lambda: split_by(LLAMA3),
    "qwen2": lambda: split_by(QWEN2),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    ),
}


def save_byte_level(folder: Path, split: Any, texts: list[str], **options: Any) -> None:
    """Train a byte-level tokenizer of 600 tokens."""
    made = Tokenizer(models.BPE(**options))
    made.pre_tokenizer, made.decoder = split, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|end|>", bos_token="<|end|>"
    ).save_pretrained(folder)


@needs_llama_cpp
@pytest.mark.parametrize("split", SPLITS)
def test_byte_level_patterns_split_as_transformers_does(
    tmp_path: Path, shared: Path, split: str
) -> None:
    texts = real_texts(shared)
    with tiny_parent(tmp_path / "dense", vocab_size=600, max_position_embeddings=512):
        pass
    save_byte_level(tmp_path / "dense", SPLITS[split](), texts)
    summary = export(tmp_path / "dense", tmp_path / "m.gguf")
    assert summary.tokenizer == f"gpt2 ({split})"
    more = ["In 2024 it cost 12345678 dollars", "a\r\n\r\n  b", "we'Ll   see!!!  (ok)\t\tx"]
    assert_same_split(tmp_path / "dense", tmp_path / "m.gguf", [*texts, *more])


def gemma_tokenizer(texts: list[str]) -> GemmaTokenizer:
    """Return a GemmaTokenizer: runs of spaces and of line ends are added tokens, bytes follow."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(" ?[^ ]+| +"), "isolated")
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    pieces = sorted(trained.get_vocab(), key=lambda piece: trained.get_vocab()[piece])
    runs = [*("\u2581" * length for length in range(2, 9)), "\n\n", "\n\n\n"]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    content = [*runs, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    content += [piece.replace(" ", "\u2581") for piece in pieces]
    vocabulary = {piece: at for at, piece in enumerate(dict.fromkeys([*special, *content]))}
    # Runs come first, as SentencePiece's scores have it.
    merges = generate_merges(vocabulary, {piece: -at for piece, at in vocabulary.items()})
    made = GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    made.add_tokens([AddedToken(run, normalized=False) for run in runs])
    made.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    return made


@needs_llama_cpp
def test_gemmas_is_split_as_transformers_does(tmp_path: Path, shared: Path) -> None:
    texts = real_texts(shared)
    made = gemma_tokenizer(texts)
    rows = len(made) - 1  # the image's token has none, as in Gemma 3 1B
    with tiny_parent(tmp_path / "dense", vocab_size=rows, max_position_embeddings=512):
        pass
    made.save_pretrained(tmp_path / "dense")
    summary = export(tmp_path / "dense", tmp_path / "m.gguf")
    assert summary.tokenizer == "llama (default)"
    keys = read_tokenizer(tmp_path / "dense", rows, {})
    assert (keys["add_add_bos_token"], keys["add_add_space_prefix"]) == (True, False)
    kinds = dict(zip(keys["add_token_list"], keys["add_token_types"], strict=True))
    assert (kinds["\u2581\u2581"], kinds["\n\n"]) == (TokenType.NORMAL, TokenType.USER_DEFINED)
    more = ["def f():\n\n\n        return  1", "a   b    c         d\n\nq  end"]
    assert_same_split(tmp_path / "dense", tmp_path / "m.gguf", [*texts, *more])


def ids_of(keys: dict[str, Any]) -> dict[str, int]:
    """Return the ids of special tokens by kind."""
    found = {re.fullmatch("add_([a-z]+)_token_id", key): value for key, value in keys.items()}
    return {match[1]: value for match, value in found.items() if match is not None}


def test_sentencepiece_like(stories3m: Path) -> None:
    keys = read_tokenizer(stories3m, 4096 + 2, {})
    assert (keys["add_tokenizer_model"], keys["add_tokenizer_pre"]) == ("llama", "default")
    assert end_note(keys) == []
    assert "add_token_merges" not in keys
    assert ids_of(keys) == {"bos": 1, "eos": 2, "unk": 0}
    assert keys["add_add_bos_token"] and not keys["add_add_eos_token"]
    assert keys["add_add_space_prefix"]
    tokens, types = keys["add_token_list"], keys["add_token_types"]
    kind = TokenType
    assert types[:4] == [kind.UNKNOWN, kind.CONTROL, kind.CONTROL, kind.BYTE]
    assert types[258:260] == [kind.BYTE, kind.NORMAL]
    assert tokens[4096:] == ["[PAD4096]", "[PAD4097]"]
    assert types[4096:] == [kind.UNUSED, kind.UNUSED]
    values = json.loads((stories3m / "tokenizer.json").read_text(encoding="utf-8"))
    made = ["".join(pair) for pair in values["model"]["merges"]]
    for piece in made[:50]:  # by the first of the merges that make it
        assert keys["add_token_scores"][tokens.index(piece)] == -made.index(piece)


@pytest.fixture
def folder(tmp_path: Path, stories260k: Path) -> Path:
    """A tokenizer that may be changed."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((stories260k / name).read_bytes())
    return tmp_path


def change(folder: Path, name: str = "tokenizer.json", **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values))


def test_metaspace_is_the_same_as_prepending(folder: Path) -> None:
    plain = read_tokenizer(folder, 512, {})
    for scheme, prefix in (("first", True), ("always", True), ("never", False)):
        space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme}
        change(folder, normalizer=None, pre_tokenizer=space)
        assert read_tokenizer(folder, 512, {})["add_add_space_prefix"] == prefix
    assert plain["add_add_space_prefix"]


def test_added_tokens(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    extra = {**values["added_tokens"][0], "id": 512, "content": "<tool>", "special": False}
    change(folder, added_tokens=[*values["added_tokens"], extra])
    keys = read_tokenizer(folder, 513, {})
    found = keys["add_token_list"][512], keys["add_token_types"][512]
    assert found == ("<tool>", TokenType.USER_DEFINED)


def byte_level(**pre_tokenizer: Any) -> dict[str, Any]:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    step |= {"use_regex": True, **pre_tokenizer}
    values = {"model": model, "normalizer": None, "pre_tokenizer": step}
    return {**values, "post_processor": None, "added_tokens": []}


def surrounded_by(*tokens: str) -> dict[str, Any]:
    """Return a post-processor that puts tokens in front of a text."""
    before = [{"SpecialToken": {"id": token, "type_id": 0}} for token in tokens]
    ids = {
        token: {"id": token, "ids": [at + 5], "tokens": [token]} for at, token in enumerate(tokens)
    }
    template = [*before, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template,
            "pair": [*template, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": ids,
        }
    }


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {"model": {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 0}},
            "its model is 'Unigram', expected BPE",
        ),
        ({"normalizer": {"type": "Lowercase"}}, r"it applies \['Lowercase'\]"),
        ({"normalizer": None, "pre_tokenizer": None}, r"it applies \[\]"),
        (surrounded_by("<odd>"), "it puts .* around texts, which is not bos"),
        (surrounded_by("<s>", "<s>"), "it puts .* around texts, which is not bos"),
        (
            {"post_processor": {"type": "BertProcessing", "sep": ["b", 5], "cls": ["<s>", 1]}},
            "it puts .* around texts, which is not eos",
        ),
        (byte_level(add_prefix_space=True), "a space in front of texts"),
        (byte_level() | {"pre_tokenizer": {"type": "Whitespace"}}, "it applies .*Whitespace"),
        (byte_level(use_regex=False), r"it applies \['ByteLevel'\]"),
        (byte_level() | {"model": byte_level()["model"] | {"merges": []}}, "it has no merges"),
        (byte_level() | {"normalizer": {"type": "NFKC"}}, r"it applies \['NFKC', "),
    ],
)
def test_tokenizers_that_are_refused(folder: Path, values: dict[str, Any], text: str) -> None:
    change(folder, **values)
    with pytest.raises(
        UnsupportedModelError, match=rf"split text like this one: .*{text}"
    ) as error:
        read_tokenizer(folder, 512, {})
    assert "export knows BPE with byte fallback" in str(error.value)


def test_more_tokens_than_the_embedding_has_rows(folder: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"ids up to 511, for an embedding of 500 rows"):
        read_tokenizer(folder, 500, {})


@pytest.mark.parametrize(
    ("split", "name"),
    [(split_by(QWEN2), "qwen2"), (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2")],
)
def test_nfc_of_qwen_and_gpt_neox_is_known(tmp_path: Path, split: Any, name: str) -> None:
    made = Tokenizer(models.BPE(vocab={"a": 0, "aa": 1}, merges=[("a", "a")]))
    made.normalizer, made.pre_tokenizer = normalizers.NFC(), split
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path)
    keys = read_tokenizer(tmp_path, 2, {})
    assert (keys["add_tokenizer_model"], keys["add_tokenizer_pre"]) == ("gpt2", name)
    assert ids_of(keys) == {} and not keys["add_add_bos_token"]


@pytest.mark.parametrize(
    ("kind", "name", "space_prefix"),
    [
        (LlamaTokenizer, "default", True),
        (GemmaTokenizer, "default", False),
        (GPT2Tokenizer, "gpt-2", False),
        (GPTNeoXTokenizer, "gpt-2", False),
        (Qwen2Tokenizer, "qwen2", False),
    ],
)
def test_classes_of_transformers(tmp_path: Path, kind: Any, name: str, space_prefix: bool) -> None:
    """These classes choose the steps before BPE themselves, whatever tokenizer.json says."""
    texts = ["a", "aa", "<unk>", "<s>", "</s>", "<pad>", "<bos>", "<eos>", "<mask>", "<|padding|>"]
    vocabulary = {text: at for at, text in enumerate([*texts, "<|endoftext|>"])}
    kind(vocab=vocabulary, merges=[("a", "a")]).save_pretrained(tmp_path)
    keys = read_tokenizer(tmp_path, len(vocabulary), {})
    assert (keys["add_tokenizer_pre"], keys["add_add_space_prefix"]) == (name, space_prefix)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is kind
    assert keys["add_eos_token_id"] == tokenizer.eos_token_id
