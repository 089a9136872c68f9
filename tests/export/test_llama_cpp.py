"""Exported models of every layout give transformers' tokens in a real llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rewrite.models import greedy, keep_counts, open_parent, random_mask, tiny_parent
from tiny_models import open_tiny
from transformers import AutoTokenizer

from export.llama_cpp import assert_same_next_tokens, complete, needs_llama_cpp
from frugal_bonsai import load_pruned
from frugal_bonsai.export.gguf_file import write_gguf
from frugal_bonsai.model.layout import LAYOUTS, PADDED, PER_LAYER, UNIFORM
from frugal_bonsai.rewrite.companions import write_companions

NEW_TOKENS = 40
WORDS = ("Once upon a time, there was", "Lily and Tom went to the park. They", "The big dog")


def export(folder: Path, out: Path, dtype: str = "f32") -> Any:
    opened = open_tiny(folder)
    return write_gguf(opened.checkpoint, opened.spec, out, name="test", dtype=dtype)


@torch.no_grad()
def expected_tokens(folder: Path, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """Return transformers' greedy tokens and their log-probabilities."""
    model = load_pruned(folder, dtype=torch.float32)
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = greedy(model, ids, new_tokens=NEW_TOKENS)
        scores = model(made[:, :-1]).logits[0, len(prompt) - 1 :].log_softmax(-1)
        new = made[0, len(prompt) :]
        found.append((new.tolist(), scores.gather(1, new[:, None])[:, 0].tolist()))
    return found


def assert_same_tokens(
    folder: Path, gguf: Path, prompts: list[list[int]], *, within: float = 1e-4
) -> None:
    answers = complete(gguf, [(prompt, NEW_TOKENS) for prompt in prompts])
    for answer, (ids, logprobs) in zip(answers, expected_tokens(folder, prompts), strict=True):
        assert answer.ids == ids
        assert answer.logprobs == pytest.approx(logprobs, abs=within)


def ids_of(folder: Path, texts: tuple[str, ...] = WORDS) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text).input_ids for text in texts]


def real_texts(shared: Path) -> list[str]:
    """Return lines of stories, and texts that are hard to tokenise."""
    text = (shared / "text" / "tinystories_test.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if len(line) > 20][:80]
    hard = [
        "  two  spaces ",
        "naïve café — 中文 🙂",
        "x=1;\n\ty = 2\n",
        "I'LL don't 12345",
        "<s>a</s>",
    ]
    return [*lines, *hard]


# -- real models --------------------------------------------------------------------------------
@needs_llama_cpp
@pytest.mark.parametrize("layout", ["dense", *LAYOUTS])
def test_stories3m(tmp_path: Path, stories3m: Path, layout: str) -> None:
    folder = stories3m
    if layout != "dense":
        folder = tmp_path / "out"
        with open_parent(stories3m) as parent:
            counts = {"attention": [2, 1, 2, 1, 1, 2], "ffn": [512, 300, 256, 128, 64, 384]}
            if layout == UNIFORM:
                counts = {"attention": [1] * 6, "ffn": [256] * 6}
            parent.shrink(keep_counts(parent.spec, counts), folder, layout)
        write_companions(stories3m, folder)
    summary = export(folder, tmp_path / "m.gguf")
    assert summary.architecture == ("deci" if layout == PER_LAYER else "llama")
    assert_same_tokens(folder, tmp_path / "m.gguf", ids_of(stories3m))


@needs_llama_cpp
def test_texts_are_split_as_transformers_does(
    tmp_path: Path, stories3m: Path, shared: Path
) -> None:
    """A text and its token ids give the same continuation and the same number of tokens."""
    export(stories3m, tmp_path / "m.gguf")
    assert_same_split(stories3m, tmp_path / "m.gguf", real_texts(shared))


@needs_llama_cpp
def test_the_byte_level_example(tmp_path: Path, shared: Path) -> None:
    from frugal_bonsai.checkpoint.locate import find_model

    folder = find_model("example")
    summary = export(folder, tmp_path / "m.gguf")
    assert summary.tokenizer == "gpt2 (gpt-2)"
    assert_same_tokens(folder, tmp_path / "m.gguf", ids_of(folder))
    assert_same_split(folder, tmp_path / "m.gguf", real_texts(shared))


def assert_same_split(folder: Path, gguf: Path, texts: list[str]) -> None:
    ids = ids_of(folder, tuple(texts))
    jobs: list[tuple[str | list[int], int]] = [(text, 5) for text in texts]
    answers = complete(gguf, jobs + [(tokens, 5) for tokens in ids])
    assert sum(bool(answer.ids) for answer in answers) > 0.9 * len(answers)
    for text, tokens, mine, theirs in zip(
        texts, ids, answers[: len(texts)], answers[len(texts) :], strict=True
    ):
        assert mine.prompt_tokens == len(tokens), text
        assert (mine.ids, mine.logprobs) == (theirs.ids, theirs.logprobs), text


# -- every feature of a Llama that is exported -----------------------------------------------------
FEATURES: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "mha": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
    },
}


@needs_llama_cpp
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("layout", [UNIFORM, PER_LAYER, PADDED])
def test_features(tmp_path: Path, stories260k: Path, feature: str, layout: str) -> None:
    changes = {"vocab_size": 512, "max_position_embeddings": 128, **FEATURES[feature]}
    with tiny_parent(tmp_path / "dense", seed=3, **changes) as parent:
        mask = random_mask(parent.spec, layout, seed=1)
        parent.shrink(mask, tmp_path / "out", layout)
    write_companions(stories260k, tmp_path / "out")
    summary = export(tmp_path / "out", tmp_path / "m.gguf")
    assert summary.architecture == ("deci" if layout == PER_LAYER else "llama")
    assert_same_next_tokens(tmp_path / "out", tmp_path / "m.gguf")
