"""Exported models of every family give transformers' tokens in a real llama.cpp."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from families.contract import legal_mask
from tiny_models import EXPERTS_PRUNED, Tiny, open_tiny, save_pair_tokenizer, tiny_family

from export.llama_cpp import assert_same_next_tokens, complete, needs_llama_cpp
from export.test_llama_cpp import FEATURES, export
from frugal_bonsai.errors import UnsupportedModelError
from frugal_bonsai.export.tensors import DTYPES
from frugal_bonsai.model.layout import PADDED, PER_LAYER, UNIFORM, layout_rules
from frugal_bonsai.model.units import ATTENTION, KeepMask
from frugal_bonsai.rewrite.shrink import shrink

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
    "gemma": ({}, "gemma"),
    "seed-oss": ({}, "seed_oss"),
    "arcee": ({"mlp_bias": False}, "arcee"),
    "starcoder2": ({"sliding_window": None}, "starcoder2"),
    "nemotron": ({}, "nemotron"),
    "ernie4_5": ({}, "ernie4_5"),
    "glm4": ({}, "glm4"),
    "glm": ({}, "chatglm"),
    "cohere": ({"tie_word_embeddings": True}, "command-r"),
    "cohere2": ({"tie_word_embeddings": True, "attention_bias": False}, "cohere2"),
    "exaone4": ({"sliding_window": None, "layer_types": ["full_attention"] * 2}, "exaone4"),
    "hunyuan": ({}, "hunyuan-dense"),
    "mixtral": ({}, "llama"),
    "qwen3-moe": ({}, "qwen3moe"),
    "granitemoe": ({}, "granitemoe"),
    "olmoe": ({"num_key_value_heads": 6, "clip_qkv": None}, "olmoe"),
}
# Families whose loader wants as many rows of q as the model is wide, and no llama that could help.
WHOLE_ATTENTION = ("starcoder2", "nemotron", "glm", "exaone4")
# Families whose layers may differ in width.
DECI = ("mistral", "qwen2", "phi3")


def tolerance(architecture: str) -> float:
    """Return the allowed difference: llama.cpp approximates gelu with a tanh and rounds to f16."""
    gelu = ("gemma", "gemma2", "gemma3", "gpt2", "gptneox", "falcon", "starcoder2")
    return 5e-3 if architecture in gelu else 1e-4


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
        mask = legal_mask(tiny, layout)
        if family in WHOLE_ATTENTION:
            prune(tiny, mask, tmp_path / "fewer", layout)
            save_pair_tokenizer(tmp_path / "fewer")
            with pytest.raises(UnsupportedModelError, match=r"rows of q, and llama.cpp's"):
                export(tmp_path / "fewer", tmp_path / "fewer.gguf")
            for group in tiny.spec.table.groups:
                if group.kind == ATTENTION:
                    mask.of(group)[:] = True
        prune(tiny, mask, folder, layout)
    save_pair_tokenizer(folder)
    summary = export(folder, tmp_path / "m.gguf")
    as_llama = family in ("qwen2", "phi3") and layout != "dense"
    expected = "deci" if layout == PER_LAYER else "llama" if as_llama else own
    assert summary.architecture == expected
    assert_same_next_tokens(folder, tmp_path / "m.gguf", first=3, within=tolerance(own))


@needs_llama_cpp
def test_a_real_gpt2(tmp_path: Path, gpt1m_bytes: Path) -> None:
    """The model was trained with the exact gelu. Its tokens are bytes."""
    folder = tmp_path / "dense"
    shutil.copytree(gpt1m_bytes, folder, ignore=shutil.ignore_patterns("*token*"))
    save_pair_tokenizer(folder, 256)
    export(folder, tmp_path / "m.gguf")
    text = b"Once upon a time, there was a little girl named Lily. She liked to play in the park"
    assert_same_next_tokens(folder, tmp_path / "m.gguf", text=list(text), first=3, within=5e-3)


def prune(tiny: Tiny, mask: KeepMask, folder: Path, layout: str) -> None:
    folder.mkdir()
    rules = layout_rules(tiny.spec, layout, tile=1)
    shrink(tiny.checkpoint, tiny.spec, mask, folder, rules=rules)


@needs_llama_cpp
@pytest.mark.parametrize("family", EXPERTS_PRUNED)
def test_dropped_experts(tmp_path: Path, family: str) -> None:
    tiny = tiny_family(tmp_path / "dense", family, seed=4, **FULL, **FAMILIES[family][0])
    mask = KeepMask(tiny.spec.table)
    for group in tiny.spec.table.groups:
        if group.expert is not None:  # another one in each layer, and channels of the others
            mask.of(group)[0 if group.expert == 1 + group.layer else 16 :] = False
    prune(tiny, mask, tmp_path / "out", UNIFORM)
    save_pair_tokenizer(tmp_path / "out")
    export(tmp_path / "out", tmp_path / "m.gguf")
    assert open_tiny(tmp_path / "out").spec.experts == 3
    assert_same_next_tokens(tmp_path / "out", tmp_path / "m.gguf", first=3)


# The largest of 32 values, divided by the largest error. Half a step of q8_0 is a 254th of it,
# which is rounded itself. q5_0 and q4_0 have 15 and 7 steps to one side, 16 and 8 to the other.
STEPS = {"q8_0": 240, "q5_1": 30, "q5_0": 15.5, "q4_1": 14.5, "q4_0": 7.75}
# Rows of these are multiples of 32.
WIDE = {"hidden_size": 96, "intermediate_size": 64, "head_dim": 16, "std": 0.05}


@needs_llama_cpp
@pytest.mark.parametrize(("family", "exact"), [("mixtral", 7), ("gemma3", 13), ("phi3", 5)])
def test_smaller_number_formats(tmp_path: Path, family: str, exact: int) -> None:
    """Norms and routers stay f32; experts and fused tensors do not."""
    from gguf import GGUFReader, dequantize

    tiny_family(tmp_path / "dense", family, seed=4, **{**FULL, **FAMILIES[family][0], **WIDE})
    save_pair_tokenizer(tmp_path / "dense")
    found = {}
    for dtype in DTYPES:
        summary = export(tmp_path / "dense", tmp_path / dtype, dtype)
        assert summary.formats.keys() == {"f32", dtype}
        assert dtype == "f32" or summary.formats["f32"] == exact
        tensors = GGUFReader(tmp_path / dtype).tensors
        found[dtype] = {t.name: dequantize(t.data, t.tensor_type) for t in tensors}
    for name, values in found["f32"].items():
        for dtype, steps in STEPS.items():
            assert abs(found[dtype][name] - values).max() <= abs(values).max() / steps, name
    assert_same_next_tokens(tmp_path / "dense", tmp_path / "f16", first=3, step=4, within=5e-3)
    for dtype in STEPS:
        assert len(complete(tmp_path / dtype, [([1, 5, 6], 2)])[0].ids) == 2


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
