"""Checkpoints whose names and axes differ from the model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import Tiny, open_tiny, random_windows, relative, tiny_family
from transformers import AutoModelForCausalLM

from frugal_bonsai.errors import CheckpointError
from frugal_bonsai.model.layout import LAYOUTS, UNIFORM, layout_rules
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.rewrite.load import load_pruned
from frugal_bonsai.rewrite.shrink import shrink


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Save GPT-2 as on the hub: the base model's names, and causal masks that no model reads."""
    tiny_family(tmp_path / "bare", "gpt2").checkpoint.close()
    path = tmp_path / "bare" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64)
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, path, metadata={"format": "pt"})
    return tmp_path / "bare"


def test_transposed_tensors_are_read_turned(tmp_path: Path) -> None:
    tiny = tiny_family(tmp_path / "m", "gpt2")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    name = "transformer.h.1.attn.c_attn.weight"
    assert stored[name].shape == (24, 72)
    entry = tiny.checkpoint.tensors[name]
    assert (entry.shape, entry.stored_shape) == ((72, 24), (24, 72))
    read = tiny.checkpoint.read(name)
    assert torch.equal(read, stored[name].T) and read.is_contiguous()
    buffer = torch.full((entry.size_bytes + 8,), 7, dtype=torch.uint8)
    assert torch.equal(tiny.checkpoint.read_into(name, buffer), stored[name].T)
    assert (buffer[entry.size_bytes :] == 7).all()
    bias = "transformer.h.1.attn.c_attn.bias"
    assert torch.equal(tiny.checkpoint.read(bias), stored[bias])


def assert_streamed_logits_equal(tiny: Tiny, model: Any, tokens_NS: torch.Tensor) -> None:
    """The sweep's logits of two windows are those of Hugging Face's model."""
    engine = tiny.engine()
    with engine.native() as stream, torch.inference_mode():
        hidden = engine.sweep.run(stream, tokens_NS)
        found = engine.head.logits(hidden.read(slice(0, 2)))
        assert relative(found, model(tokens_NS).logits) < 1e-5


def half_mask(tiny: Tiny) -> KeepMask:
    """A mask without every second unit of every second group."""
    mask = KeepMask(tiny.spec.table)
    for group in tiny.spec.table.groups[1::2]:
        mask.of(group)[::2] = False
    return mask


def test_the_base_models_names_are_understood_and_written_again(bare: Path, tmp_path: Path) -> None:
    tiny = open_tiny(bare)
    tokens_NS = random_windows(2, 9)
    model = tiny.hugging_face()
    assert tiny.spec.parameters == sum(p.numel() for p in model.parameters())
    assert_streamed_logits_equal(tiny, model, tokens_NS)

    mask = half_mask(tiny)
    (tmp_path / "out").mkdir()
    rules = layout_rules(tiny.spec, UNIFORM, tile=1)
    shrink(tiny.checkpoint, tiny.spec, mask, tmp_path / "out", rules=rules)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["h.0.mlp.c_fc.weight"].shape == (24, 10)
    assert torch.equal(
        written["h.0.mlp.c_proj.weight"],
        load_file(bare / "model.safetensors")["h.0.mlp.c_proj.weight"][1::2],
    )
    assert "h.0.attn.bias" not in written and "wte.weight" in written
    pruned, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert pruned.transformer.h[1].mlp.c_fc.weight.shape == (24, 10)


@pytest.fixture(params=["llama", "gpt2", "gemma2", "opt"])
def head_alone(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Save a tied model under the head's name alone, as ``safetensors.torch.save_model`` may."""
    tiny = tiny_family(tmp_path / "tied", request.param, tie_word_embeddings=True)
    tiny.checkpoint.close()
    path = tmp_path / "tied" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors.pop(tiny.spec.family.embedding)
    save_file(tensors, path, metadata={"format": "pt"})
    return tmp_path / "tied"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tied_weight_may_be_stored_under_the_heads_name_alone(
    head_alone: Path, layout: str, tmp_path: Path
) -> None:
    tiny = open_tiny(head_alone)
    assert tiny.spec.tied and tiny.spec.family.head not in tiny.checkpoint.tensors
    tokens_NS, model = random_windows(2, 9), tiny.hugging_face()
    assert tiny.spec.parameters == sum(p.numel() for p in model.parameters())
    assert_streamed_logits_equal(tiny, model, tokens_NS)

    mask = half_mask(tiny)
    (tmp_path / "out").mkdir()
    rules = layout_rules(tiny.spec, layout, tile=1)
    shrink(tiny.checkpoint, tiny.spec, mask, tmp_path / "out", rules=rules)
    zeroed = tiny.hugging_face(mask)
    with torch.inference_mode():
        written = load_pruned(tmp_path / "out", dtype=torch.float32)
        assert relative(written(tokens_NS).logits, zeroed(tokens_NS).logits) < 1e-5


def test_a_head_alone_is_no_embedding_where_the_config_unties_them(tmp_path: Path) -> None:
    tiny_family(tmp_path / "m", "llama").checkpoint.close()  # tie_word_embeddings is false
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.embed_tokens\.weight'"):
        open_tiny(tmp_path / "m")


def test_a_base_models_names_with_the_tied_head_alone(bare: Path) -> None:
    path = bare / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors.pop("wte.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    tiny = open_tiny(bare)
    assert tiny.checkpoint.tensors["transformer.wte.weight"].name == "lm_head.weight"
