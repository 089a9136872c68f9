"""Contents of GGUF files, and errors before one is written; without llama.cpp."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from rewrite.models import keep_counts, open_parent, tiny_parent
from safetensors.torch import load_file, save_file
from tiny_models import save_pair_tokenizer, tiny_family

from export.test_llama_cpp import export
from export.test_llama_cpp_families import FULL
from export.test_refused_models import refused
from frugal_bonsai.export import gguf_tensor
from frugal_bonsai.export.gguf_file import write_gguf
from frugal_bonsai.export.gguf_tensor import by_kind, interleave
from frugal_bonsai.model.layout import PER_LAYER
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.rewrite.companions import write_companions


def test_rows_in_llama_cpps_order() -> None:
    rows = torch.arange(2 * 6)  # two heads of six: halves 0 1 2 | 3 4 5
    assert interleave(rows, 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    weight = rows[:, None] * torch.ones(1, 3)
    assert torch.equal(interleave(weight, 2)[:, 1], interleave(rows, 2).float())


def test_fused_rows_in_llama_cpps_order() -> None:
    # Two groups of two query heads, a key and a value, two rows each.
    rows = torch.arange(2 * 8)
    found = by_kind(rows, 2, 2).tolist()
    assert found == [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    assert torch.equal(by_kind(rows[:, None].expand(16, 3), 2, 2)[:, 2], by_kind(rows, 2, 2))


def test_what_the_file_says(tmp_path: Path, stories3m: Path) -> None:
    from gguf import GGUFReader

    counts = {"attention": [2, 1, 2, 1, 1, 2], "ffn": [512, 300, 256, 128, 64, 384]}
    with open_parent(stories3m) as parent:
        parent.shrink(keep_counts(parent.spec, counts), tmp_path / "out", PER_LAYER)
    write_companions(stories3m, tmp_path / "out")
    export(tmp_path / "out", tmp_path / "m.gguf")
    reader = GGUFReader(tmp_path / "m.gguf")
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert said["deci.attention.head_count"] == [6, 3, 6, 3, 3, 6]
    assert said["deci.attention.head_count_kv"] == counts["attention"]
    assert said["deci.feed_forward_length"] == counts["ffn"]
    assert said["deci.attention.key_length"] == said["deci.attention.value_length"] == 32
    assert said["tokenizer.ggml.model"] == "llama" and said["tokenizer.ggml.add_bos_token"]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert "output.weight" not in tensors  # tied
    source = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    found = torch.from_numpy(tensors["blk.1.ffn_down.weight"].data.copy())
    assert torch.equal(found, source[name].float())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; llama.cpp computes silu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type is 'dynamic'; .*default, linear and llama3",
        ),
    ],
)
def test_functions_that_llama_cpp_does_not_have(
    tmp_path: Path, stories260k: Path, changes: dict[str, Any], text: str
) -> None:
    with tiny_parent(tmp_path / "dense", vocab_size=512, **changes) as parent:
        write_companions(stories260k, parent.folder)
    refused(tmp_path / "dense", tmp_path, text)


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    with tiny_parent(tmp_path / "dense"):
        pass
    refused(
        tmp_path / "dense",
        tmp_path,
        r"has no tokenizer \(looked for tokenizer\.json, tokenizer\.model",
    )


@pytest.mark.parametrize(
    ("value", "dtype", "text"),
    [
        (float("nan"), "f32", "'model.layers.1.mlp.up_proj.weight' holds NaN or infinity"),
        (1e6, "f16", "values beyond 65504, too large for f16; take --dtype bf16 or f32"),
    ],
)
def test_values_that_the_format_cannot_hold(
    tmp_path: Path, stories260k: Path, value: float, dtype: str, text: str
) -> None:
    with tiny_parent(tmp_path / "dense", vocab_size=512) as parent:
        write_companions(stories260k, parent.folder)
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, file, metadata={"format": "pt"})
    refused(tmp_path / "dense", tmp_path, text, dtype)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_one_block_is_held_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """A block of rows and its converted values are freed before the next is read."""
    tiny = tiny_family(tmp_path / "dense", family, **FULL)
    save_pair_tokenizer(tmp_path / "dense")
    held: list[weakref.ref[Any]] = []
    convert = gguf_tensor._convert

    def spy_convert(tensor: Any, block: torch.Tensor, source: str) -> Any:
        # The loop's own variable holds the last block until it is given the next.
        assert sum(value() is not None for value in held) <= 1
        assert block.numel() <= max(8 * 24, block.shape[-1])
        chunk = convert(tensor, block, source)
        held.extend((weakref.ref(block), weakref.ref(chunk)))
        return chunk

    monkeypatch.setattr(gguf_tensor, "_BLOCK_VALUES", 8 * 24)
    monkeypatch.setattr(gguf_tensor, "_convert", spy_convert)
    write_gguf(tiny.checkpoint, tiny.spec, tmp_path / "m.gguf", name="m", dtype="f16")
    assert len(held) > 2 * len(tiny.checkpoint.tensors)


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    from gguf import GGUFReader

    tiny = tiny_family(tmp_path / "dense", "qwen3-moe", **FULL)
    save_pair_tokenizer(tmp_path / "dense")
    export(tmp_path / "dense", tmp_path / "m.gguf", "f16")
    reader = GGUFReader(tmp_path / "m.gguf")
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert said["qwen3moe.expert_count"] == 4 and said["qwen3moe.expert_used_count"] == 2
    assert said["qwen3moe.expert_feed_forward_length"] == 20
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    found = torch.from_numpy(tensors["blk.1.ffn_down_exps.weight"].copy())
    assert found.shape == (4, 24, 20)
    for expert in range(4):
        name = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
        assert torch.equal(found[expert], tiny.checkpoint.read(name).half())
    assert tensors["blk.1.ffn_gate_inp.weight"].dtype == "float32"  # llama.cpp wants the router so


def test_a_uniform_model_at_a_head_count_that_llamas_config_forbids(
    tmp_path: Path, stories260k: Path
) -> None:
    """LlamaConfig refuses five heads for a hidden size of 48; llama.cpp does not."""
    changes = {"num_attention_heads": 6, "num_key_value_heads": 6, "vocab_size": 512}
    with tiny_parent(tmp_path / "dense", **changes) as parent:
        mask = KeepMask(parent.spec.table)
        for group in parent.spec.table.groups:
            mask.of(group)[5:] = False
        parent.shrink(mask, tmp_path / "out", PER_LAYER)
    write_companions(stories260k, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_attention_heads"] == 5
    assert export(tmp_path / "out", tmp_path / "m.gguf").architecture == "llama"
