"""What ``export`` writes comes back: the same tensors, and the same function in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from export.test_llama_cpp import export
from export.test_llama_cpp_families import FAMILIES, FULL
from tiny_models import Tiny, random_windows, save_pair_tokenizer, tiny_family
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from frugal_bonsai.errors import UnsupportedModelError
from frugal_bonsai.export.architecture import ARCHITECTURES
from frugal_bonsai.from_gguf.config import CLASSES, MODEL_TYPES
from frugal_bonsai.from_gguf.open import open_gguf
from frugal_bonsai.model.canonical_names import describe_checkpoint
from frugal_bonsai.rewrite.dense import write_dense


def test_every_exported_architecture_is_read() -> None:
    assert CLASSES == {key: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[key] for key in CLASSES}
    assert CLASSES.keys() == ARCHITECTURES.keys() - {NOT_READ}
    assert MODEL_TYPES.keys() == {own.name for own in ARCHITECTURES.values()} - {NOT_READ}


def test_experts_that_transformers_wants_in_one_tensor_are_not_read(tmp_path: Path) -> None:
    exported(tmp_path, NOT_READ, {})
    with pytest.raises(UnsupportedModelError, match=f"'{NOT_READ}'"):
        open_gguf(tmp_path / "m.gguf")


# llama.cpp's tensors would have to become transformers' for all experts of a layer.
NOT_READ = "granitemoe"
# The one is added to and taken from norms in fp32.
ROUNDED = ("gemma", "gemma2", "gemma3", "nemotron")
SCALED = {"gemma2": "q_proj", "gemma3": "q_norm"}  # by another query_pre_attn_scalar


def exported(folder: Path, family: str, changes: dict[str, Any]) -> tuple[Tiny, Path]:
    """Make a tiny model and its GGUF file ``m.gguf``; return it and an empty folder."""
    dense = tiny_family(folder / "dense", family, **{**FULL, **changes})
    save_pair_tokenizer(folder / "dense")
    export(folder / "dense", folder / "m.gguf")
    (folder / "out").mkdir()
    return dense, folder / "out"


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != NOT_READ])
@torch.no_grad()
def test_families_come_back(tmp_path: Path, family: str) -> None:
    changes, architecture = FAMILIES[family]
    dense, out = exported(tmp_path, family, changes)
    with open_gguf(tmp_path / "m.gguf") as read:
        assert read.header.metadata["general.architecture"] == architecture
        assert read.config["dtype"] == "float32" and read.notes == ()
        describe_checkpoint(read)
        for name, entry in dense.checkpoint.tensors.items():
            if name not in read.tensors:
                assert name == dense.spec.family.head and dense.spec.tied
                continue
            assert read.tensors[name].shape == entry.shape
            found, source = read.read(name), dense.checkpoint.read(name)
            if SCALED.get(family, "no scale") in name:
                assert found.shape == source.shape
            elif family in ROUNDED and "norm" in name:
                torch.testing.assert_close(found, source)
            else:
                assert torch.equal(found, source), name
        write_dense(read, out)
    windows = random_windows(2, 24)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    expected = dense.hugging_face()(windows).logits
    found = model(windows).logits
    if family in ROUNDED:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(found, expected)
    assert type(model) is type(dense.hugging_face()) or family in ("mistral", "qwen2", "phi3")
    text = "Some words, 12345 of them.\n"
    source = AutoTokenizer.from_pretrained(tmp_path / "dense")
    assert AutoTokenizer.from_pretrained(out)(text).input_ids == source(text).input_ids


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    **{
        f"llama-{kind}": ("llama", {"rope_parameters": rope, "head_dim": 32})
        for kind, rope in ROPES.items()
    },
    "phi3-part": ("phi3", {"sliding_window": None, "partial_rotary_factor": 0.5}),
    "gemma3-period": (
        "gemma3",
        {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "stablelm-part": ("stablelm", {"partial_rotary_factor": 0.5, "use_qkv_bias": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_variants_come_back(tmp_path: Path, variant: str) -> None:
    family, changes = VARIANTS[variant]
    dense, out = exported(tmp_path, family, changes)
    with open_gguf(tmp_path / "m.gguf") as read:
        write_dense(read, out)
    windows = random_windows(2, 24)
    found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()(windows).logits
    torch.testing.assert_close(found, dense.hugging_face()(windows).logits)
