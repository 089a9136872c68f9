"""Models that llama.cpp cannot compute are refused before a file is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from tiny_models import save_pair_tokenizer, tiny_family

from export.test_llama_cpp import export
from export.test_llama_cpp_families import DECI, FAMILIES, FULL
from frugal_bonsai.errors import CheckpointError, UnsupportedModelError
from frugal_bonsai.export.architecture import ARCHITECTURES, CONVERTED_ELSEWHERE
from frugal_bonsai.export.shape import describe_shape
from frugal_bonsai.model import families
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import ATTENTION, UnitTable

SMOLLM3 = FAMILIES["smollm3"][0]


def refused(folder: Path, tmp_path: Path, text: str, dtype: str = "f32") -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((UnsupportedModelError, CheckpointError), match=text):
        export(folder, tmp_path / "m.gguf", dtype)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_refusal_names_architectures_that_exist() -> None:
    assert set(CONVERTED_ELSEWHERE.values()) <= set(gguf.MODEL_ARCH_NAMES.values())
    assert CONVERTED_ELSEWHERE.keys() <= families.FAMILIES.keys() - ARCHITECTURES.keys()


def ragged(spec: ModelSpec) -> ModelSpec:
    """Return the model with one unit of each kind less in its second layer."""
    groups = [replace(g, count=g.count - g.layer) for g in spec.table.groups]
    return replace(spec, table=UnitTable(tuple(groups)))


@pytest.mark.parametrize("family", FAMILIES)
def test_which_families_are_a_deci_where_layers_differ(tmp_path: Path, family: str) -> None:
    spec = ragged(tiny_family(tmp_path / "m", family, **FULL, **FAMILIES[family][0]).spec)
    if family not in DECI:
        text = rf"layers of this {spec.family.model_type} differ in width.*; prune with --layout"
        with pytest.raises(UnsupportedModelError, match=text):
            describe_shape(spec)
        return
    shape = describe_shape(spec)
    assert (shape.architecture, shape.heads, shape.kv_heads) == ("deci", (6, 4), (3, 2))
    assert shape.traits.interleaved


# Name -> family, changes, error text.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mistral": ("mistral", {}, "sliding_window is 5; llama.cpp computes full attention"),
    "qwen2": ("qwen2", {}, "sliding_window is 5; llama.cpp computes full attention"),
    "phi3": ("phi3", {}, "sliding_window is 5; llama.cpp computes full attention"),
    "qwen3-biases": (
        "qwen3-biases",
        {},
        r"k_proj\.bias, and llama.cpp's architecture 'qwen3' has no such bias",
    ),
    "smollm3-biases": ("smollm3", {**SMOLLM3, "attention_bias": True}, r"o_proj\.bias, and llama"),
    "smollm3-rope": ("smollm3", {}, r"no_rope_layers is \[1, 0\]; .* a multiple of 4 \(dropped"),
    "opt": (
        "opt",
        {},
        "'opt' is not exported to GGUF; llama.cpp does not have this architecture; exported are",
    ),
    "gpt-oss": (
        "gpt-oss",
        {},
        "llama.cpp has it as 'gpt-oss': try its own convert_hf_to_gguf.py with an output whose",
    ),
    "gpt-neo": ("gpt-neo", {}, "model_type 'gpt_neo' is not exported to GGUF"),
    "gemma2-caps": (
        "gemma2",
        {"final_logit_softcapping": None},
        "final_logit_softcapping is None; .* 'gemma2' computes the model with it",
    ),
    "gemma2-untied": (
        "gemma2",
        {"tie_word_embeddings": False},
        r"'lm_head.weight' has no place in llama.cpp's architecture 'gemma2'",
    ),
    "gemma3-caps": (
        "gemma3",
        {"final_logit_softcapping": 3.0},
        "final_logit_softcapping is 3.0; .* 'gemma3' computes the model without",
    ),
    "gemma3-layers": (
        "gemma3",
        {"num_hidden_layers": 3, "layer_types": ["full_attention"] + ["sliding_attention"] * 2},
        r"full attention in the layers \[0\]; llama.cpp wants it at equal distances \(prune with",
    ),
    "gemma3-both-ways": (
        "gemma3",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention is True; .* 'gemma3' computes the model without",
    ),
    "gemma3-silu": (
        "gemma3",
        {"hidden_activation": "silu"},
        "hidden_activation is 'silu'; .* gelu",
    ),
    "granite-part": (
        "granite",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "2 of the 4 dimensions of a head are rotated; llama.cpp's architecture 'granite' rotates",
    ),
    "gpt2-scores": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx is True; llama.cpp's architecture 'gpt2' computes the",
    ),
    "gpt-neox-biases": (
        "gpt-neox-sequential",
        {},
        "attention_bias is False; llama.cpp's architecture 'gptneox' computes the model with it",
    ),
    "falcon-biases": (
        "falcon-groups",
        {},
        r"h\.bias, and llama.cpp's .* 'falcon' has",
    ),
    "falcon-sequential": (
        "falcon-sequential",
        {},
        "parallel_attn is False; llama.cpp's architecture 'falcon' computes the model with",
    ),
    "qwen3-moe": (
        "qwen3-moe",
        {"norm_topk_prob": False},
        "norm_topk_prob is False; llama.cpp's architecture 'qwen3moe' computes the model with it",
    ),
    "olmoe-clip": (
        "olmoe",
        {"num_key_value_heads": 6},
        "clip_qkv is 1.0; .* 'olmoe' computes the model without",
    ),
    "olmoe-heads": ("olmoe", {}, "has 6 query heads and 3 KV heads, and llama.cpp wants the same"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_refused(tmp_path: Path, name: str) -> None:
    family, changes, text = REFUSED[name]
    tiny_family(tmp_path / "dense", family, **{**FULL, **changes})
    save_pair_tokenizer(tmp_path / "dense")
    refused(tmp_path / "dense", tmp_path, text)


@pytest.mark.parametrize(
    ("family", "changes", "text"),
    [
        (
            "gpt2",
            {},
            r"this gpt2 has 16 rows of q, .* as the model is wide, 24; prune",
        ),
        (
            "phi3",
            {"sliding_window": None},
            r"2 of the 4 .* rotates them all \('phi3' takes no layers of these widths: prune FFN",
        ),
    ],
)
def test_fewer_heads_than_a_loader_takes(
    tmp_path: Path, family: str, changes: dict[str, Any], text: str
) -> None:
    spec = tiny_family(tmp_path / "m", family, **changes).spec
    groups = [replace(g, count=g.count - (g.kind == ATTENTION)) for g in spec.table.groups]
    with pytest.raises(UnsupportedModelError, match=text):
        describe_shape(replace(spec, table=UnitTable(tuple(groups))))
