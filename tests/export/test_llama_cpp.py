"""Exported models in a real llama.cpp: the tokens that transformers gives, layout by layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families.contract import legal_mask
from rewrite.models import greedy, keep_counts, open_parent, random_mask, tiny_parent
from tiny_models import open_tiny, save_pair_tokenizer, tiny_family
from transformers import AutoTokenizer

from export.llama_cpp import complete, needs_llama_cpp
from frugal_bonsai import load_pruned
from frugal_bonsai.export.gguf_file import write_gguf
from frugal_bonsai.model.layout import LAYOUTS, PADDED, PER_LAYER, UNIFORM, layout_rules
from frugal_bonsai.rewrite.companions import write_companions
from frugal_bonsai.rewrite.shrink import shrink

NEW_TOKENS = 40
WORDS = ("Once upon a time, there was", "Lily and Tom went to the park. They", "The big dog")


def export(folder: Path, out: Path, dtype: str = "f32") -> Any:
    opened = open_tiny(folder)
    return write_gguf(opened.checkpoint, opened.spec, out, name="test", dtype=dtype)


@torch.no_grad()
def expected_tokens(folder: Path, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """transformers' greedy tokens and their log-probabilities."""
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
    """Lines of stories, and what a tokenizer finds hard."""
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
    """A text and its tokens give the same next token with the same probability, and count."""
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


@needs_llama_cpp
@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_smaller_number_formats(tmp_path: Path, stories3m: Path, dtype: str) -> None:
    export(stories3m, tmp_path / "full.gguf")
    summary = export(stories3m, tmp_path / "m.gguf", dtype)
    # 13 norms stay f32; everything else is in the format asked for.
    assert summary.formats == {dtype: 43, "f32": 13}
    share = summary.size_bytes / (tmp_path / "full.gguf").stat().st_size
    assert share < {"f16": 0.53, "q8_0": 0.30}[dtype]
    prompts = ids_of(stories3m)
    answers = complete(tmp_path / "m.gguf", [(prompt, 1) for prompt in prompts])
    for answer, (_, logprobs) in zip(answers, expected_tokens(stories3m, prompts), strict=True):
        assert answer.logprobs == pytest.approx(logprobs[:1], abs=0.05)


@needs_llama_cpp
def test_q8_0_of_widths_that_are_no_multiple_of_32(tmp_path: Path, stories3m: Path) -> None:
    counts = {"attention": [1] * 6, "ffn": [100, 300, 256, 128, 64, 384]}
    with open_parent(stories3m) as parent:
        parent.shrink(keep_counts(parent.spec, counts), tmp_path / "out", PER_LAYER)
    write_companions(stories3m, tmp_path / "out")
    summary = export(tmp_path / "out", tmp_path / "m.gguf", "q8_0")
    assert summary.formats["f16"] == 2  # down_proj of the first two layers
    [answer] = complete(tmp_path / "m.gguf", [(ids_of(stories3m)[0], 1)])
    [(_, logprobs)] = expected_tokens(tmp_path / "out", ids_of(stories3m)[:1])
    assert answer.logprobs == pytest.approx(logprobs[:1], abs=0.05)


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


@torch.no_grad()
def assert_same_next_tokens(
    folder: Path, gguf: Path, *, first: int = 259, step: int = 1, within: float = 1e-4
) -> None:
    """Behind every beginning of a text of 60 random tokens, where the next one is ``first`` or up.

    llama.cpp's server puts tokens that are single bytes together and leaves their parts out.
    """
    generator = torch.Generator().manual_seed(0)
    text = [1, *torch.randint(first, 512, (60,), generator=generator).tolist()]
    logits = load_pruned(folder, dtype=torch.float32)(torch.tensor([text])).logits[0]
    best = logits.log_softmax(-1).max(-1)
    compared = [at for at, token in enumerate(best.indices.tolist()) if token >= first][::step]
    assert len(compared) > 15 // step
    answers = complete(gguf, [(text[: at + 1], 1) for at in compared])
    assert [answer.ids for answer in answers] == [[int(best.indices[at])] for at in compared]
    found = [answer.logprobs[0] for answer in answers]
    assert found == pytest.approx([float(best.values[at]) for at in compared], abs=within)


# -- other families ------------------------------------------------------------------------------
FULL = {"vocab_size": 512, "max_position_embeddings": 128}
# Name in tiny_models.FAMILY_CONFIGS -> changes, and the GGUF architecture.
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "mistral": ({"sliding_window": None}, "llama"),
    "qwen2": ({"use_sliding_window": False, "tie_word_embeddings": True}, "qwen2"),
    "qwen3": ({}, "qwen3"),
    "smollm3": ({"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1]}, "smollm3"),
    "granite": ({}, "granite"),
    "olmo2": ({}, "olmo2"),
    "stablelm": ({}, "stablelm"),
    "gemma2": ({}, "gemma2"),
    "gemma3": ({}, "gemma3"),
    "phi3": ({"sliding_window": None, "partial_rotary_factor": 1.0}, "phi3"),
    "gpt2": ({"n_positions": 128}, "gpt2"),
    "pythia": ({"rotary_pct": 0.5}, "gptneox"),
    "falcon-groups": ({"bias": False}, "falcon"),
    "falcon-multi-query": ({}, "falcon"),
    "mixtral": ({}, "llama"),
    "qwen3-moe": ({}, "qwen3moe"),
    "olmoe": ({"num_key_value_heads": 6, "clip_qkv": None}, "olmoe"),
}
# Of these, the ones that may differ layer by layer.
DECI = ("mistral", "qwen2", "phi3")


def tolerance(architecture: str) -> float:
    """llama.cpp's gelu is the one by a tanh, its input and output rounded to f16."""
    return 5e-3 if architecture in ("gemma2", "gemma3", "gpt2", "gptneox", "falcon") else 1e-4


@needs_llama_cpp
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        *((f, lay) for f in FAMILIES for lay in ("dense", UNIFORM, PADDED)),
        *((f, PER_LAYER) for f in DECI),
    ],
)
def test_families(tmp_path: Path, family: str, layout: str) -> None:
    changes, own = FAMILIES[family]
    folder = tmp_path / "dense"
    tiny = tiny_family(folder, family, seed=4, **FULL, **changes)
    if layout != "dense":
        folder = tmp_path / "out"
        folder.mkdir()
        rules = layout_rules(tiny.spec, layout, tile=1)
        shrink(tiny.checkpoint, tiny.spec, legal_mask(tiny, layout), folder, rules=rules)
    save_pair_tokenizer(folder)
    summary = export(folder, tmp_path / "m.gguf")
    as_llama = family in ("qwen2", "phi3") and layout != "dense"
    expected = "deci" if layout == PER_LAYER else "llama" if as_llama else own
    assert summary.architecture == expected
    assert_same_next_tokens(folder, tmp_path / "m.gguf", first=3, within=tolerance(own))


# Whatever else a family's graph has: name -> family and changes.
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 1.0,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 5.0],
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm3-every-layer-rotates": ("smollm3", {"no_rope_layers": [1, 1]}),
    "granite-tied-llama3": ("granite", {**FEATURES["llama3"], "tie_word_embeddings": True}),
    "stablelm-tied": ("stablelm", {"tie_word_embeddings": True}),
    "stablelm-parallel": ("stablelm-parallel", {}),
    "gemma2-27b": ("gemma2", {"num_hidden_layers": 46, "head_dim": 8, "std": 0.1}),
    "gemma3-27b": (
        "gemma3",
        {"num_hidden_layers": 62, "head_dim": 8, "layer_types": None, "std": 0.1},
    ),
    "gemma3-scaled": (
        "gemma3",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ),
    "phi3-part-of-a-head": ("phi3", {"sliding_window": None, "tie_word_embeddings": True}),
    "phi3-long": (
        "phi3",
        {
            "sliding_window": None,
            "rope_parameters": {**LONG, "original_max_position_embeddings": 16},
        },
    ),
    "phi3-short": (
        "phi3",
        {
            "sliding_window": None,
            "rope_parameters": {**LONG, "original_max_position_embeddings": 1024},
            "max_position_embeddings": 2048,
        },
    ),
    "gpt2-untied": ("gpt2-untied", {"n_positions": 128}),
    "gpt-neox-sequential": ("gpt-neox-sequential", {"rotary_pct": 1.0, "attention_bias": True}),
    "pythia-tanh": (
        "pythia",
        {"rotary_pct": 0.5, "hidden_act": "gelu_new", "tie_word_embeddings": True},
    ),
}


@needs_llama_cpp
@pytest.mark.parametrize("name", OTHERS)
def test_what_else_families_have(tmp_path: Path, name: str) -> None:
    family, changes = OTHERS[name]
    tiny_family(tmp_path / "dense", family, seed=4, **{**FULL, **changes})
    save_pair_tokenizer(tmp_path / "dense")
    summary = export(tmp_path / "dense", tmp_path / "m.gguf")
    assert_same_next_tokens(
        tmp_path / "dense",
        tmp_path / "m.gguf",
        first=3,
        step=8 if name.endswith("27b") else 1,
        within=tolerance(summary.architecture),
    )
